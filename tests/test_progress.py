"""What a run says: six lines before its first step, then bars, or in a log file lines."""

import io
import re
import sys
import time

import pytest
import torch

import helpers
import rrr
import score
import tiny
from training import announce, checkpoint, loop, progress
from training.command import parse_args
from training.loop import show

FEW = ["--problems", "2", "--group_size", "2", "--second_attempts", "2"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("model") / "model")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(monkeypatch, capsys):
    """What is on stderr, which is no terminal and where a line is due at once."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return lambda: capsys.readouterr().err


def test_a_run_says_in_six_lines_what_it_is_about_to_do(model_dir, tmp_path, capsys):
    flags = "--stage1_steps 1 --stage2_steps 2 --probe 2 --final_problems 4 --warmup 3".split()
    helpers.train_here(score, model_dir, tmp_path / "run", *FEW, *flags)
    said = capsys.readouterr().out.splitlines()
    threads = torch.get_num_threads()
    assert said[:3] == [
        f"model   {model_dir}: 344,064 parameters, float32 on cpu ({threads} threads)",
        "task    tiny: 600 train, 4 validation problems; 3 steps of 8 rows",
        'prompt  "<user> 14 6 14 make 5 <assistant>"',
    ]
    assert re.fullmatch(rf"run     {tmp_path}/run, takes up to 16.5 MB of the .* free .*", said[3])
    assert said[4] == "note    --warmup 3: the learning rate rises to the very end of this run"
    assert re.fullmatch(r"probe   of 2 problems at T = 1: acc_t1 \d+.0%, acc_t2 \d+.0%", said[5])
    assert re.fullmatch(r"time    about \d+ \w+( to \d+ \w+)?, a guess from the probe .*", said[6])
    assert "now the final table: 16 conversations, about " in said[7]


@pytest.mark.parametrize("script, flags, rows", [
    (score, "--problems 3 --group_size 5 --second_attempts 7", 105),
    (score, "--problems 3 --group_size 5 --single_turn", 15),
    (rrr, "--failures_per_step 3 --group_size 5 --retries 2", 30),
])  # fmt: skip
def test_rows_of_a_step_are_those_that_are_trained_on(script, flags, rows):
    assert parse_args(script.Config, flags.split()).rows == rows


@pytest.mark.parametrize("reference", ["base", "stage1"])
def test_a_run_takes_no_more_disk_than_it_said_and_not_much_less(reference, model_dir, tmp_path):
    out, most, save = tmp_path / "run", [], checkpoint.publish

    def weigh(fresh, path):
        files = {file.stat().st_ino: file.stat().st_size for file in out.rglob("*.*")}
        most.append(sum(files.values()))
        save(fresh, path)

    flags = f"--stage1_steps 1 --stage2_steps 4 --save_every 1 --reference {reference}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "close_window", lambda *a: True)  # each state has a best of its own
        patch.setattr(checkpoint, "publish", weigh)
        helpers.train_here(score, model_dir, out, *FEW, *flags)
    count = sum(p.numel() for p in tiny.build_model().parameters())
    said = announce.disk(score.Config(reference=reference), count, 4 * count)
    announced = float(re.match(r"takes up to (\S+) MB", said)[1]) * 1e6
    assert 0.8 * announced < max(most) < 1.05 * announced  # a name for each tensor comes to that


def test_a_long_prompt_is_shown_with_its_end_on_one_line():
    shown = announce.shortened("a\n" * 400 + "make 5 <assistant>")
    assert "\n" not in shown and shown.endswith('make 5 <assistant>"') and len(shown) < 600


def test_a_log_file_gets_lines_without_carriage_returns_and_the_last_one(log):
    with progress.bar("training", 3) as bar:
        for step in range(3):
            row = {"reward": float(step), "kl_t2": 0.5, "tokens_per_second_update": 22.4}
            row |= {"tokens_per_second_rollout": 2.0, "mfu": 0.25} if step else {}
            show(bar, row, rrr.Config.shown, idle=step)
    text = log()
    first, *_, last = lines = text.splitlines()
    assert first.startswith("training: 0 of 3") and "training: 3 of 3" in last and len(lines) == 4
    assert last.endswith(
        "left, retry=2.000, kl_reflection=0.500, idle_steps=2, tokens_s=2/22, mfu=0.250"
    )
    assert lines[1].endswith("kl_reflection=0.500, tokens_s=-/22")
    assert "\r" not in text and "\x1b" not in text


def test_a_bar_within_a_bar_and_one_that_ends_early_leave_no_control_characters(log):
    with pytest.raises(KeyboardInterrupt), progress.bar("training", 3) as outer:
        with progress.bar("validation", 2) as inner:
            inner.update(2)
        outer.update()
        raise KeyboardInterrupt
    text = log()
    assert "training: 1 of 3" in text and re.sub(r"[ -~\n]", "", text) == ""


def test_lines_of_a_log_grow_rarer(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar("training", 100) as bar:
        bar.start_t -= 36_000
        bar.refresh()
        assert bar.mininterval == pytest.approx(1200, rel=0.01)


def test_what_is_over_in_a_moment_says_nothing(log):
    with progress.bar("validation", 2, delay=60) as bar:
        bar.update(2)
    assert log() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar("training", 2) as bar:
        bar.update(2)
    assert "\rtraining: 100%" in screen.getvalue()
    assert [*progress.over([4, 5], "collecting")] == [4, 5]
    assert screen.getvalue().endswith("\r")  # what is over leaves no line behind


def test_tokens_are_counted_while_they_come_beside_what_is_shown(log):
    class Sampler:
        on_tokens = None

    sampler = Sampler()
    with progress.bar("probe", 2) as bar:
        bar.set_postfix_str("t1=0.5")
        with progress.counted(bar, sampler):
            sampler.on_tokens([0, 1], [[5, 6], [7]])
            sampler.on_tokens([0], [[8]])
        assert sampler.on_tokens is None
    text = log()
    assert "t1=0.5, 3 tokens so far\n" in text and "t1=0.5, 4 tokens so far\n" in text


@pytest.mark.parametrize("seconds, said", [
    (0.2, "about 2 seconds"), (40, "about 40 seconds"), (119, "about 119 seconds"),
    (121, "about 2 minutes"), (7100, "about 118 minutes"), (7300, "about 2 hours"),
    (200_000, "about 2 days"),
])  # fmt: skip
def test_a_time_is_said_as_people_say_it(seconds, said):
    assert progress.about(seconds) == said


def test_what_takes_a_while_says_so_and_what_does_not_says_nothing(capsys):
    with progress.said_if_slow("loading", seconds=60):
        pass
    with progress.said_if_slow("still loading", seconds=0.01):
        time.sleep(0.5)
    assert capsys.readouterr().out == "still loading\n"
