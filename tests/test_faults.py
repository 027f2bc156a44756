"""What may happen to a run of days, done to a run of seconds: each fault, and what is left then."""

import dataclasses
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

import evaluate
import helpers
import rrr
import score
import tiny
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training import checkpoint, distributed, models, policy
from training import loop as training
from training import run as run_module

STOPS = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("Ctrl-C", 130)}
UMASK = os.umask(0o022)
os.umask(UMASK)
SCRIPTS = {"score": score, "rrr": rrr}
both = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def references(model_dir, tmp_path_factory):
    """Uninterrupted runs, {script: directory}, made once."""
    runs = tmp_path_factory.mktemp("references")
    for script in SCRIPTS:
        assert helpers.run(script, model_dir, runs / script) == [0]
    return {script: runs / script for script in SCRIPTS}


@pytest.fixture(scope="module")
def stopped(model_dir, tmp_path_factory):
    """Runs killed after the states of 2 and 4 steps, {script: directory}: to be copied first."""
    runs = tmp_path_factory.mktemp("stopped")
    for script in SCRIPTS:
        harm = partial(helpers.die_after_save, 4)
        assert helpers.run(script, model_dir, runs / script, harm=harm) == [-signal.SIGKILL]
    return {script: runs / script for script in SCRIPTS}


def assert_same(out: Path, reference: Path):
    """Bit for bit, apart from times."""
    assert helpers.metrics(out) == helpers.metrics(reference)
    for name in ("results.json", "transcripts.txt", "rollouts.jsonl"):
        assert (out / name).read_text() == (reference / name).read_text()
    ours, theirs = (models.load_model(str(run / "checkpoint"))[0] for run in (out, reference))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_only_states(out: Path):
    """No save has left anything else behind."""
    assert all(path.name.startswith("step_") for path in (out / "states").iterdir())


def names_of_states(out: Path) -> list[str]:
    return [path.name for path in checkpoint.states(out)]


def said(out: Path) -> str:
    return Path(f"{out}.log.0").read_text()


def wait_for(path: Path, seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def resume_flags(script, model_dir, out, *flags):
    """For a refusal in this process, which must have the flags that the run was started with."""
    sizes = *helpers.SMALL, *helpers.FEW[script]
    return ("--model", model_dir, "--output_dir", out, *sizes, "--resume", *flags)


# Killed


def die_at_file_operation(number: int, directory: str):
    """Harm: SIGKILL at the so many-th time that something in the run's directory is touched."""
    left = [number]

    def watch(event, arguments):
        if (
            event.partition(".")[0] in ("open", "os", "shutil")
            and directory in map(str, arguments[:2])
            or any(str(a).startswith(directory + "/") for a in arguments[:2])
        ):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.slow
@both
def test_sigkill_at_20_random_moments_changes_nothing(script, model_dir, tmp_path, references):
    """The very same command again and again, as a job script has it; the earliest at once.

    Every other one at a file operation, mostly within a save; runs not hit start again.
    """
    rng, kills, runs, duration = random.Random(script), 0, 0, 2.0
    while kills < 20:
        out, done, started = tmp_path / f"{runs}", None, time.monotonic()
        while done != 0:
            harm = None
            if kills % 2 == 1 and kills < 20:
                harm = partial(die_at_file_operation, rng.randrange(1, 120), str(out))
            (process,) = helpers.start_run(script, model_dir, out, "--resume", harm=harm)
            if kills % 2 == 0 and kills < 20:
                process.join(rng.uniform(0, duration) if kills else rng.uniform(0, 1))
                process.kill()
            (done,) = helpers.finish([process])
            assert done in (0, -signal.SIGKILL), said(out)
            kills += done != 0
        assert_same(out, references[script])
        assert_only_states(out)
        duration, runs = min(duration, time.monotonic() - started), runs + 1


def command_line(out: Path, *flags) -> list[str]:
    """A short run of score.py on the embedded model, as a user or a job script starts it."""
    sizes = "--problems 2 --group_size 2 --second_attempts 2 --probe 16 --eval_every 2"
    sizes += (
        " --eval_problems 4 --final_problems 4 --save_every 2 --stage1_steps 2 --stage2_steps 2"
    )
    command = [sys.executable, "score.py", *sizes.split(), "--output_dir", str(out)]
    return [*command, "--resume", *flags]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def started(command: list[str], log: Path, **options):
    with open(log, "a") as file:
        options |= {"stdout": file, "stderr": file, "env": ONE_THREAD, "cwd": helpers.ROOT}
        return subprocess.Popen(command, **options)


@pytest.mark.slow
def test_the_very_command_line_can_be_killed_from_its_first_second_on(tmp_path):
    rng = random.Random(0)
    assert started(command_line(tmp_path / "whole"), tmp_path / "log").wait(300) == 0
    for moment in (0.2, 0.9, *(rng.uniform(1, 12) for _ in range(6))):
        with suppress(subprocess.TimeoutExpired):
            process = started(command_line(tmp_path / "run"), tmp_path / "log")
            process.wait(moment)
        process.kill()
        process.wait()
    assert started(command_line(tmp_path / "run"), tmp_path / "log").wait(300) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_model_loads_is_one_line_in_a_job_of_the_background_too(number, tmp_path):
    code = "import signal, sys, time; sys.argv[0] = 'score.py'\n"
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as `score.py &` in a script
    code += "from training import command\nimport score\n"
    code += "score.prepare = lambda *a, **k: print('loading', flush=True) or time.sleep(60)\n"
    code += "command.run_script(score.main, score.Config)\n"
    command = [sys.executable, "-c", code, "--output_dir", str(tmp_path / "run")]
    process = started(command, tmp_path / "log")
    while not (tmp_path / "log").read_text():
        time.sleep(0.05)
    process.send_signal(number)
    name, exit_code = STOPS[number]
    assert process.wait(60) == exit_code
    said = f"loading\nscore.py: stopped by {name}: what was saved is as it was\n"
    assert (tmp_path / "log").read_text() == said and not (tmp_path / "run").exists()


@both
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_killed_at_the_stage_boundary_or_after_the_last_step_goes_on(
    script, step, model_dir, tmp_path, references
):
    out, flags = tmp_path / "run", ("--save_every", "1", "--resume")
    harm = partial(helpers.die_after_save, step)
    assert helpers.run(script, model_dir, out, *flags, harm=harm) == [-signal.SIGKILL]
    (out / "states" / "old_step_000000").mkdir()  # as if killed in that save, maybe the last one
    assert helpers.run(script, model_dir, out, *flags) == [0]
    assert_only_states(out)
    # --save_every is also the window of the best checkpoint: only metrics are the reference's
    assert helpers.metrics(out) == helpers.metrics(references[script])
    assert "trained" in json.loads((out / "results.json").read_text())


@both
def test_a_complete_run_says_so_and_is_left_as_it_is(script, model_dir, tmp_path, references):
    out = shutil.copytree(references[script], tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert helpers.run(script, model_dir, out, "--resume") == [0]  # a job of one line has an end
    assert "is complete" in said(out) and said(out).count("\n") == 1
    assert helpers.run(script, model_dir, out) == [2]
    assert "holds a finished run: name another" in said(out) and "run_2 is free" in said(out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@both
def test_a_complete_run_is_made_longer_as_if_it_had_been_from_the_start(
    script, model_dir, tmp_path, references
):
    more = {"score": "--stage2_steps 4", "rrr": "--steps 6"}[script].split()
    more += ["--schedule", "constant"]
    same = [] if script == "score" else ["--schedule", "constant"]
    out = tmp_path / "run"
    assert helpers.run(script, model_dir, out, *same) == [0]
    short = (out / "results.json").read_bytes()
    assert helpers.run(script, model_dir, out, *more, "--resume") == [0]
    assert helpers.run(script, model_dir, tmp_path / "whole", *more) == [0]
    assert_same(out, tmp_path / "whole")
    assert (out / "results_step_000004.json").read_bytes() == short


def test_a_complete_run_without_its_states_keeps_its_figures(model_dir, tmp_path, references):
    out = shutil.copytree(references["score"], tmp_path / "run")
    shutil.rmtree(out / "states")
    assert helpers.run("score", model_dir, out, "--stage2_steps", "4", "--resume") == [2]
    assert "has no saved state left" in said(out) and (out / "results.json").exists()
    (out / "results.json").unlink()
    assert helpers.run("score", model_dir, out, "--resume") == [2] and (out / "checkpoint").exists()


@both
def test_max_minutes_end_a_run_with_a_state_and_a_checkpoint_time_and_again(
    script, model_dir, tmp_path, references
):
    out, flags = tmp_path / "run", ("--max_minutes", "1e-6", "--resume")
    for step in (1, 2, 3, 4):
        assert helpers.run(script, model_dir, out, *flags) == [0]
        assert names_of_states(out)[0] == f"step_00000{step}"
        checkpoint.publish_best(out, checkpoint.states(out)[0])  # as when it is resumed
        assert (out / "checkpoint" / "model.safetensors").is_file()
        last = said(out).splitlines()[-1]
        assert f"{step} of 4 steps after --max_minutes 1e-06" in last and "--resume" in last
        assert (out / "curves.png").is_file()
    assert not (out / "results.json").exists()
    assert helpers.run(script, model_dir, out, "--resume") == [0]
    assert_same(out, references[script])


@both
def test_a_state_has_what_is_trained_and_none_is_made_before_a_step(script, model_dir, stopped):
    out, weights = stopped[script], sum(p.numel() for p in tiny.build_model().parameters())
    assert names_of_states(out) == ["step_000004", "step_000002"]
    held = 12 * weights + 4 * weights * (script == "score")  # it has Stage I as its reference
    size = (out / "states" / "step_000004" / "tensors" / "__0_0.distcp").stat().st_size
    assert held < size < 1.2 * held  # a name and a place for each tensor, of which there are many


def test_a_checkpoint_is_in_the_models_own_dtype_and_readable_by_all(tmp_path):
    path = tmp_path / "half"
    model = tiny.build_model().bfloat16()
    checkpoint.save_model(model, tiny.build_tokenizer(), path)
    read, tokenizer = models.load_model(str(path))
    assert read.dtype == torch.float32  # it is trained in
    checkpoint.save_model(read, tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        ours = tmp_path / "again" / name
        assert ours.stat().st_size == (path / name).stat().st_size  # tied weights once, too
        assert ours.stat().st_mode & 0o777 == 0o666 & ~UMASK
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("place", ["/proc/not_here", "file/run", "file", "x" * 300, "\udcff"])
def test_a_directory_that_cant_be_is_refused_before_anything_is_loaded(
    place, resumed, model_dir, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(score, "prepare", lambda *a, **k: 1 / 0)
    places = "--output_dir", tmp_path / place, "--resume", resumed
    refused = helpers.refusal(score, capsys, *places)
    told = ascii(place)[1:-1].replace("\\", "\\\\")
    assert refused.count("\n") == 1 and re.search(f"{told} can't be (written|read): ", refused)


def test_a_run_without_stage_2_is_not_made_longer_by_one(model_dir, tmp_path, capsys):
    flags = [*helpers.FEW["score"], "--stage2_steps", "0", "--reference", "base"]
    helpers.train_here(score, model_dir, tmp_path / "run", *flags)
    places = "--model", model_dir, "--output_dir", tmp_path / "run", "--resume"
    assert "--stage2_steps was 0, is 4" in helpers.refusal(
        score, capsys, *places, "--stage2_steps", "4"
    )


def test_a_log_that_has_lost_lines_is_named(model_dir, stopped, tmp_path, capsys):
    out = shutil.copytree(stopped["score"], tmp_path / "run")
    os.truncate(out / "metrics.jsonl", 10)
    refused = helpers.refusal(score, capsys, *resume_flags("score", model_dir, out))
    assert "metrics.jsonl has lost lines: 10 bytes of " in refused


def test_a_tokenizer_with_several_templates_is_published_with_them(tmp_path):
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": tiny.CHAT_TEMPLATE}
    checkpoint.save_model(tiny.build_model(), tokenizer, tmp_path / "state" / "best")
    checkpoint.publish_best(tmp_path, tmp_path / "state")
    folder = tmp_path / "checkpoint" / "additional_chat_templates"
    assert [file.name for file in folder.iterdir()] == ["tool_use.jinja"]
    weights = [path / "model.safetensors" for path in (folder.parent, tmp_path / "state" / "best")]
    assert len({path.stat().st_ino for path in weights}) == 1


def test_resume_starts_where_there_is_no_more_than_a_log_or_what_a_kill_left(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", "config.json.new"):
        (out / name).write_text("")
    assert run_module.check_run(score.Config(output_dir=str(out)))
    (out / "log.txt").write_text("")  # of python score.py ... > run/log.txt
    with pytest.raises(ValueError, match="is in use, and holds no run"):
        run_module.check_run(score.Config(output_dir=str(out)))
    assert run_module.check_run(score.Config(output_dir=str(out), resume=True))
    for harm in (lambda: (out / "sources").mkdir(), lambda: (out / "metrics.jsonl").touch()):
        harm()
        with pytest.raises(ValueError, match="is in use, and holds no run"):
            run_module.check_run(score.Config(output_dir=str(out), resume=True))
        shutil.rmtree(out / "sources", ignore_errors=True)


def test_a_run_goes_on_with_its_model_and_data_elsewhere_if_they_are_the_same(
    model_dir, stopped, tmp_path, references
):
    out = shutil.copytree(stopped["score"], tmp_path / "run")
    shutil.rmtree(checkpoint.states(out)[0])
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    assert helpers.run("score", moved, out, "--resume") == [0]
    assert_same(out, references["score"])
    assert json.loads((out / "config.json").read_text())["model"] == str(moved)


# Told to stop


def slow_generation(step: int, marker: Path):
    """Harm: in this step's second turn the sampler takes ten minutes."""
    extend, steps, pick = Sampler.extend, [], score.pick

    def noting(things, count, seed, at):
        steps.append(at)
        return pick(things, count, seed, at)

    def slowly(*arguments, **more):
        if steps and steps[-1] == step:
            marker.touch()
            time.sleep(600)
        return extend(*arguments, **more)

    score.pick = rrr.pick = noting
    Sampler.extend = slowly


@pytest.mark.parametrize("script, world, number", [
    ("score", 0, signal.SIGTERM), ("score", 2, signal.SIGTERM), ("score", 0, signal.SIGINT),
    ("rrr", 0, signal.SIGINT), ("rrr", 2, signal.SIGINT), ("rrr", 2, signal.SIGTERM),
])  # fmt: skip
def test_sigterm_or_ctrl_c_during_generation_saves_the_state_and_says_one_line(
    script, world, number, model_dir, tmp_path, references
):
    out, marker = tmp_path / "run", tmp_path / "generating"
    harm = partial(slow_generation, 1, marker)
    processes = helpers.start_run(script, model_dir, out, world=world, harm=harm)
    wait_for(marker)
    time.sleep(0.2)
    for process in processes:
        os.kill(process.pid, number)
    name, code = STOPS[number]
    assert set(helpers.finish(processes)) == {code}
    assert checkpoint.states(out)[0].name == "step_000001" and "\r" not in said(out)
    assert f"stopped by {name}: the newest saved state is step_000001" in said(out).splitlines()[-1]
    assert "Traceback" not in said(out)
    assert checkpoint.damage(checkpoint.states(out)[0]) is None
    if world == 0:
        assert helpers.run(script, model_dir, out, "--resume") == [0]
        assert_same(out, references[script])


def slow_evaluation(marker: Path):
    """Harm: the second evaluation, after step 4, takes ten minutes."""
    summarize, calls = evaluate.format_transcripts, []

    def slowly(*arguments):
        calls.append(1)
        if len(calls) == 2:
            marker.touch()
            time.sleep(600)
        return summarize(*arguments)

    evaluate.format_transcripts = slowly


@both
def test_sigterm_during_an_evaluation_keeps_the_update_before_it(
    script, model_dir, tmp_path, references
):
    out, marker = tmp_path / "run", tmp_path / "evaluating"
    (process,) = helpers.start_run(script, model_dir, out, harm=partial(slow_evaluation, marker))
    wait_for(marker)
    process.terminate()
    assert helpers.finish([process]) == [143]
    assert json.loads((checkpoint.states(out)[0] / "memory.json").read_text())["row"]["step"] == 3
    assert helpers.run(script, model_dir, out, "--resume") == [0]
    assert_same(out, references[script])


def slow_save(marker: Path):
    """Harm: the second save hangs."""
    save, calls = checkpoint.save_state, []

    def slowly(*arguments):
        calls.append(1)
        if len(calls) == 2:
            marker.touch()
            time.sleep(600)
        return save(*arguments)

    checkpoint.save_state = slowly


@both
def test_a_second_sigterm_exits_at_once(script, model_dir, tmp_path):
    out, marker = tmp_path / "run", tmp_path / "saving"
    (process,) = helpers.start_run(script, model_dir, out, harm=partial(slow_save, marker))
    wait_for(marker)
    process.terminate()
    time.sleep(0.3)
    assert process.is_alive()  # a save is not cut short by the first
    while process.is_alive():  # two at once would be heard as one
        process.terminate()
        time.sleep(0.3)
    assert helpers.finish([process]) == [143]
    assert names_of_states(out) == ["step_000002"]


@both
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_before_the_first_step_ends_without_a_state_or_a_traceback(
    script, number, model_dir, tmp_path
):
    out, marker = tmp_path / "run", tmp_path / "generating"
    (process,) = helpers.start_run(script, model_dir, out, harm=partial(slow_generation, 0, marker))
    wait_for(marker)
    os.kill(process.pid, number)
    name, code = STOPS[number]
    assert helpers.finish([process]) == [code] and names_of_states(out) == []
    assert f"stopped by {name}: the newest saved state is none" in said(out).splitlines()[-1]


# Disk and files


def small_files(step: int):
    """Harm: once this step is logged, no file may grow beyond 100 kB."""
    log = training.log

    def log_and_limit(run, row, text):
        log(run, row, text)
        if row["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    training.log = log_and_limit


def full_disk(step: int):
    """Harm: after this step, as if the disk was full when something is synced."""
    log, sync = training.log, checkpoint.sync

    def log_and_fill(run, row, text):
        log(run, row, text)
        if row["step"] == step:
            checkpoint.sync = fail

    def fail(path):
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    training.log = log_and_fill


@pytest.mark.parametrize("script, harm, world", [
    ("score", small_files, 0), ("score", full_disk, 2), ("score", full_disk, 0),
    ("rrr", full_disk, 0),
])  # fmt: skip
def test_a_full_disk_leaves_the_state_before_it_and_says_so(
    script, harm, world, model_dir, tmp_path, references
):
    out = tmp_path / "run"
    assert set(helpers.run(script, model_dir, out, world=world, harm=partial(harm, 3))) == {1}
    (line,) = [line for line in said(out).splitlines() if "can't be written" in line]
    assert "the newest saved state is step_000002" in line and "Traceback" not in said(out)
    assert names_of_states(out) == ["step_000002"]
    assert checkpoint.damage(out / "states" / "step_000002") is None
    if world == 0 and harm is full_disk:
        assert helpers.run(script, model_dir, out, "--resume") == [0]
        assert_same(out, references[script])


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@both
@pytest.mark.parametrize("change, file, message", [
    (truncate, "tensors/__0_0.distcp", "bytes in place of"),
    (flip_one_bit, "tensors/__0_0.distcp", "tensors/__0_0.distcp has changed"),
    (flip_one_bit, "memory.json", "memory.json has changed"),
    (Path.unlink, "memory.json", "memory.json is missing"),
    (Path.unlink, "manifest.json", "manifest.json is missing"),
    (truncate, "manifest.json", "manifest.json is no JSON"),
])  # fmt: skip
def test_a_damaged_state_is_named_and_never_used(
    script, change, file, message, model_dir, stopped, tmp_path, capsys
):
    out = shutil.copytree(stopped[script], tmp_path / "run")
    change(out / "states" / "step_000004" / file)
    refused = helpers.refusal(SCRIPTS[script], capsys, *resume_flags(script, model_dir, out))
    for part in ("step_000004 is damaged", message, "--skip_damaged"):
        assert part in refused
    assert (out / "states" / "step_000004").exists()
    run_module._locks.clear()


@both
def test_the_state_before_a_damaged_one_is_used_only_if_told_so(
    script, model_dir, stopped, tmp_path, references
):
    out = shutil.copytree(stopped[script], tmp_path / "run")
    flip_one_bit(out / "states" / "step_000004" / "tensors" / "__0_0.distcp")
    (out / "states" / "new_000006" / "tensors").mkdir(parents=True)  # a save that was cut off
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": 2, "st')  # and a line
    assert helpers.run(script, model_dir, out, "--resume", "--skip_damaged") == [0]
    assert_same(out, references[script])
    names = {path.name for path in (out / "states").iterdir()}
    assert names == {"step_000004", "step_000002", "damaged_step_000004"}


def test_without_any_whole_state_nothing_is_made_up(model_dir, stopped, tmp_path, capsys):
    out = shutil.copytree(stopped["score"], tmp_path / "run")
    for state in checkpoint.states(out):
        (state / "manifest.json").unlink()
    flags = resume_flags("score", model_dir, out, "--skip_damaged")
    refused = helpers.refusal(score, capsys, *flags)
    assert "no saved state that is whole" in refused


def test_the_last_states_are_kept_and_the_best_model_belongs_to_its_state(model_dir, tmp_path):
    out = tmp_path / "run"
    flags, harm = "--save_every 1 --keep 2".split(), partial(helpers.die_after_save, 4)
    assert helpers.run("score", model_dir, out, *flags, harm=harm) == [-signal.SIGKILL]
    assert names_of_states(out) == ["step_000004", "step_000003"]
    for state in checkpoint.states(out):
        files = {path.name for path in (state / "best").iterdir()}
        assert files >= {"model.safetensors", "config.json"}
    newest = checkpoint.states(out)[0] / "best" / "model.safetensors"
    assert newest.read_bytes() == (out / "checkpoint" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint")  # as if it was killed between the state and the export
    shutil.rmtree(checkpoint.states(out)[0])
    kept = checkpoint.states(out)[0] / "best" / "model.safetensors"
    checkpoint.publish_best(out, checkpoint.states(out)[0])
    assert kept.read_bytes() == (out / "checkpoint" / "model.safetensors").read_bytes()


def test_there_is_a_whole_checkpoint_at_every_moment_of_its_replacement(
    model_dir, tmp_path, monkeypatch
):
    old, fresh = (shutil.copytree(model_dir, tmp_path / name) for name in ("checkpoint", "fresh"))
    seen, watching = [], [True]

    def watch(event, arguments):
        if watching and str(tmp_path) in str(arguments[:1]):
            seen.append((tmp_path / "checkpoint" / "model.safetensors").exists())

    sys.addaudithook(watch)
    checkpoint.publish(fresh, old)
    assert len(seen) > 5 and all(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    watching.clear()  # for there is no way to take it out


# Other input, other processes


def other_template(model_dir: str, monkeypatch):
    file = Path(model_dir) / "chat_template.jinja"
    file.write_text(file.read_text().replace("<user> ", "<user> <user> "))
    return "the tokenizer"


def other_weights(model_dir: str, monkeypatch):
    model, tokenizer = models.load_model(model_dir)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    checkpoint.save_model(model, tokenizer, Path(model_dir))
    return "the model's weights"


def other_data(model_dir: str, monkeypatch):
    generate = TASKS["tiny"].generate
    task = dataclasses.replace(TASKS["tiny"], generate=lambda *a: generate(*a)[::-1])
    monkeypatch.setitem(TASKS, "tiny", task)
    return "train"


@both
@pytest.mark.parametrize("change", [other_template, other_weights, other_data])
def test_resuming_with_other_data_tokenizer_or_weights_is_refused(
    script, change, model_dir, stopped, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(stopped[script], tmp_path / "run")
    used = tmp_path / "model"
    shutil.copytree(model_dir, used)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model": str(used)}))
    changed = change(str(used), monkeypatch)
    (out / "failures.jsonl").unlink(missing_ok=True)  # which would be refused before
    refused = helpers.refusal(SCRIPTS[script], capsys, *resume_flags(script, str(used), out))
    assert f"was started with another content of: {changed}" in refused or changed in refused


@both
def test_a_run_that_goes_on_another_day_has_the_prompts_of_its_first(
    script, tmp_path, monkeypatch, capsys
):
    tiny = TASKS["tiny"]
    few = dataclasses.replace(tiny, generate=lambda *which: tiny.generate(*which)[:20])
    monkeypatch.setitem(TASKS, "tiny", few)
    model = helpers.save_dated_model(tmp_path / "model")
    module, flags, configs = SCRIPTS[script], helpers.FEW[script], []
    for out, day in (("run", "2031-03-05"), ("later", "2031-03-06")):
        with monkeypatch.context() as patch:
            helpers.on_day(patch, day)
            patch.setattr(training, "update", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                helpers.train_here(module, model, tmp_path / out, *flags)
        configs.append(json.loads((tmp_path / out / "config.json").read_text()))
    first, later = (config["contents"]["train"] for config in configs)
    assert first != later and configs[0]["day"] == "2031-03-05T12:00:00"
    helpers.on_day(monkeypatch, "2031-03-06")
    rows = helpers.train_here(module, model, tmp_path / "run", *flags, "--resume")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def days_of_ranks(out: Path):
    """Each rank's clock shows another day."""
    distributed.start()
    with pytest.MonkeyPatch.context() as patch:
        helpers.on_day(patch, f"2031-03-{5 + distributed.rank():02}")
        day = run_module.check_run(score.Config(output_dir=str(out / "run")))
    (out / f"day_{distributed.rank()}").write_text(day)
    distributed.finish()


def test_all_ranks_have_the_first_ones_day(tmp_path):
    assert helpers.finish(helpers.start(days_of_ranks, tmp_path, world=2)) == [0, 0]
    days = [(tmp_path / f"day_{rank}").read_text() for rank in (0, 1)]
    assert days == ["2031-03-05T12:00:00"] * 2


def hang(marker: Path):
    """Harm: the first update takes ten minutes."""

    def slowly(*arguments):
        marker.touch()
        time.sleep(600)

    training.update = slowly


@both
def test_a_second_run_on_the_directory_refuses(script, model_dir, tmp_path):
    out, marker = tmp_path / "run", tmp_path / "running"
    (first,) = helpers.start_run(script, model_dir, out, harm=partial(hang, marker))
    wait_for(marker)
    before = sorted(path.name for path in out.iterdir())
    assert helpers.run(script, model_dir, out, "--resume") == [2] and "still running" in said(out)
    assert helpers.run(script, model_dir, out) == [2]
    assert sorted(path.name for path in out.iterdir()) == before
    first.kill()
    first.join()


@both
def test_when_one_rank_is_killed_the_others_end(script, model_dir, tmp_path):
    out, marker = tmp_path / "run", tmp_path / "generating"
    harm = partial(slow_generation_of_0, marker)
    processes = helpers.start_run(script, model_dir, out, world=2, harm=harm)
    wait_for(marker)
    os.kill(processes[1].pid, signal.SIGKILL)
    codes = helpers.finish(processes)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)


def slow_generation_of_0(marker: Path):
    """Harm: one rank is in a turn of three seconds while the other waits for it."""
    if os.environ["RANK"] == "0":
        extend = Sampler.extend

        def slowly(*arguments, **more):
            marker.touch()
            time.sleep(3)
            return extend(*arguments, **more)

        Sampler.extend = slowly


def test_torchrun_ends_all_ranks_when_one_is_killed(tmp_path):
    """The README's command line, with real processes."""
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 score.py".split()
    command += "--problems 2 --group_size 2 --probe 0 --eval_problems 4 --save_every 1".split()
    command = [sys.executable, *command, "--output_dir", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, cwd=helpers.ROOT, stdout=log, stderr=log, env=env)
    wait_for(tmp_path / "run" / "states" / "step_000001")
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert run.wait(120) == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert checkpoint.damage(checkpoint.states(tmp_path / "run")[0]) is None


# Numbers that are none


def poison_loss(bad):
    loss = policy.policy_loss
    return policy, "policy_loss", lambda *a, **how: loss(*a, **how) + bad


def poison_gradient(bad):
    accumulate = policy.accumulate_gradients

    def poisoned(scorer, *rest):
        scores, loss = accumulate(scorer, *rest)
        next(scorer.model.parameters()).grad.view(-1)[-1] = bad
        return scores, loss

    return policy, "accumulate_gradients", poisoned


def poison_logits(bad):
    sample = import_module("sampler").sample
    return import_module("sampler"), "sample", lambda logits, *rest: sample(logits + bad, *rest)


def poison_reward(bad):
    verdicts = Env.verdicts

    def poisoned(*arguments):
        found = verdicts(*arguments)
        found.rewards[-1:] = bad
        return found

    return Env, "verdicts", poisoned


POISONS = {
    "loss": poison_loss,
    "gradient": poison_gradient,
    "log-probs of the sampler": poison_logits,
    "reward": poison_reward,
}


def train_only(script, model_dir, out, *flags):
    """`helpers.train_here` without the evaluation at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Exam, "before_and_after", lambda *arguments: {})
        patch.setattr(rrr, "with_controls", lambda *arguments: {})
        patch.setattr(SCRIPTS[script], "conclude", lambda *arguments: None)
        return helpers.train_here(SCRIPTS[script], model_dir, out, *helpers.FEW[script], *flags)


def poisoned_run(script, model_dir, out, poison, bad, seen, *flags):
    """A run in this process, poisoned while it makes some steps.

    bad:  {step: number}, what it is poisoned with
    seen: gets (skipped, untouched) of every step
    """
    step_of = training.train_step

    def trained(scorer, optimizer) -> list[torch.Tensor]:
        tensors = checkpoint.tensors_of(scorer, optimizer, with_reference=False)
        return [tensor.clone() for tensor in tensors.values()]

    def one_step(config, scorer, sampler, optimizer, step, *rest):
        before = trained(scorer, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            if step in bad:
                where, name, harmful = poison(bad[step])
                patch.setattr(where, name, harmful)
            row = step_of(config, scorer, sampler, optimizer, step, *rest)
        pairs = zip(before, trained(scorer, optimizer), strict=True)
        seen.append((row["skipped"], all(torch.equal(a, b) for a, b in pairs)))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", one_step)
        return train_only(script, model_dir, out, *flags)


@both
@pytest.mark.parametrize("what", POISONS)
def test_what_is_not_finite_changes_no_weight_and_is_counted(script, what, model_dir, tmp_path):
    seen, bad = [], {1: float("nan"), 2: float("inf")}
    how = POISONS[what], bad, seen, "--eval_every", "0", "--seed", "1"  # with 0 a step is idle
    rows = poisoned_run(script, model_dir, tmp_path / "run", *how)
    assert seen == [(0, False), (1, True), (1, True), (0, False)]
    assert what in rows[1]["not_finite"] and what in rows[2]["not_finite"]
    assert not re.search("NaN|Infinity", (tmp_path / "run" / "metrics.jsonl").read_text())
    model, _ = models.load_model(str(tmp_path / "run" / "checkpoint"))
    assert policy.finite_weights(model)


@both
def test_training_stops_after_so_many_bad_steps_in_a_row(script, model_dir, tmp_path, capsys):
    seen, bad = [], dict.fromkeys((1, 2, 3), float("nan"))
    flags = ("--max_skipped", "2", "--save_every", "1")
    with pytest.raises(SystemExit) as exit_:
        poisoned_run(script, model_dir, tmp_path / "run", poison_loss, bad, seen, *flags)
    assert exit_.value.code == 1 and [skipped for skipped, _ in seen] == [0, 1, 1]
    assert "step 2: not finite in 2 steps in a row: loss" in capsys.readouterr().err
    assert checkpoint.states(tmp_path / "run")[0].name == "step_000002"


def test_weights_that_are_not_finite_are_neither_saved_nor_published(model_dir, tmp_path, capsys):
    def ruin(*arguments):
        row = step_of(*arguments)
        next(arguments[1].model.parameters()).data[0, 0] = torch.inf
        return row

    step_of, flags = training.train_step, [*helpers.FEW["score"], "--save_every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", ruin)
        with pytest.raises(SystemExit):
            helpers.train_here(score, model_dir, tmp_path / "run", *flags)
    assert "after 1 steps the weights are not finite" in capsys.readouterr().err
    assert names_of_states(tmp_path / "run") == []
    assert not (tmp_path / "run" / "checkpoint").exists()


# Batches without a signal, and other odd ones


@both
@pytest.mark.parametrize("flags", [(), ("--group_size", "1", "--baseline", "none")])
def test_equal_rewards_and_groups_of_one_train_on(script, flags, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "arbitrary_verdict", lambda text, problem: False)
    more = ("--normalise", "False") if flags and script == "rrr" else ()
    rows = train_only(script, model_dir, tmp_path / "run", *flags, *more)
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert all(row["zero_advantage"] == 1 and row["reward"] == 0 for row in rows)
    assert all(row["idle"] for row in rows)  # the policy stays the base, so no KL acts either


@both
def test_completions_that_are_empty_train_on(script, model_dir, tmp_path, monkeypatch):
    sampler = import_module("sampler")
    sample = sampler.sample

    def stop_at_once(logits, temperature, u):
        token, _ = sample(logits, temperature, u)
        token = torch.where(u < 0.5, 1, token)  # <end>
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]

    monkeypatch.setattr(sampler, "sample", stop_at_once)
    rows = train_only(script, model_dir, tmp_path / "run")
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert all(row["response_length"] < 3 for row in rows)


# Determinism

PROGRAM = """
import dataclasses, os, sys
import torch
import helpers, rrr, score
from tasks import TASKS
torch.set_num_threads(1)
os.cpu_count = lambda: {workers}
TASKS["tiny"] = dataclasses.replace(TASKS["tiny"], warm_up=lambda: True)  # verdicts in threads
torch.manual_seed({workers})
for script in (score, rrr):
    name = script.__name__
    helpers.train_here(script, {model!r}, helpers.Path({out!r}) / name, *helpers.FEW[name])
"""


def test_hash_seeds_workers_and_global_random_state_change_nothing(model_dir, tmp_path, references):
    runs, quiet = [], {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for workers in (1, 7):
        out = tmp_path / f"{workers}"
        program = PROGRAM.format(workers=workers, model=model_dir, out=str(out))
        env = os.environ | {"PYTHONHASHSEED": f"{workers}", "OMP_NUM_THREADS": "1"}
        runs.append((out, subprocess.Popen([sys.executable, "-c", program], env=env, **quiet)))
    for out, run in runs:
        assert run.wait() == 0
        for script in SCRIPTS:
            assert_same(out / script, references[script])
