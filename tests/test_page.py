"""The page of rollouts: its rows have what tokens got, and the page shows them as text."""

import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import browser
import evaluate
import helpers
import score
import tiny
from loss import Scores
from report import page
from sampling.rollout import rollout_of
from test_chat import character_tokenizer
from training import pages
from training.distributed import Stopped
from training.flags import parse_args
from training.models import load_model
from training.policy import Batch
from training.scorer import Scorer

FLAGS = "--problems 2 --group_size 2 --second_attempts 2 --final_problems 2 --eval_problems 2"
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
CHAT = "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nAdd.\n1 + 1?<|im_end|>\n"
CHAT += "<|im_start|>assistant\n"
needs_browser = pytest.mark.skipif(not browser.FOUND, reason="no chromium, which .ci/run installs")


def read(run):
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def evaluate_here(*flags):
    evaluate.main(parse_args(evaluate.Config, [*flags]))


def data_in(path) -> dict:
    text = path.read_text().partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_a_row_has_what_every_token_got_and_told_tokens_get_nothing():
    tokenizer = tiny.build_tokenizer()
    told, said, more, again = (tokenizer(x).input_ids for x in ("8 19", "ok 3", "fix", "bad"))
    sampler = SimpleNamespace(
        model=torch.nn.Linear(1, 1), pad_id=0, is_stop=torch.zeros(len(tokenizer), dtype=torch.bool)
    )
    sampler.model.device = torch.device("cpu")
    rollout = rollout_of([[told, said, more, again], [told, said[:1], more, again]], 2, sampler)
    number = torch.arange(rollout.ids.numel()).view_as(rollout.ids).float()
    scores = Scores(-number, -number / 2, number / 4, number)
    rewards = torch.tensor([[0.0, 1.0], [math.nan, 0.9999]], dtype=torch.float64)
    batch = Batch(rollout, number * 10, number, 1.0, {}, rewards=rewards)
    first, second = page.rows_of(tokenizer, 7, batch, scores)
    at = len(told)
    assert first["step"] == 7 and first["turns"][0] == {
        "told": "8 19",
        "said": ["ok", " 3"],
        "reward": 0.0,
        "cut": True,  # these words are no stop tokens
        "advantage": [10.0 * at, 10.0 * (at + 1)],
        "log_ratio": [-at / 2, -(at + 1) / 2],
        "kl": [at / 4, (at + 1) / 4],
        "logprob": [-at, -at - 1],
    }
    assert [turn["said"] for turn in second["turns"]] == [["ok"], ["bad"]]
    assert [turn["reward"] for turn in second["turns"]] == [None, 0.9999]  # not right


def test_pieces_are_the_text_and_a_letter_of_several_tokens_is_that_of_its_last():
    tokenizer = character_tokenizer("", "<eot>")
    ids = tokenizer("aé漢!").input_ids
    assert page.pieces_of(tokenizer, ids) == ["a", "", "é", "", "", "漢", "!"]
    assert page.pieces_of(tokenizer, ids[:5]) == ["a", "", "é", "", "\ufffd"]  # cut off
    words = tiny.build_tokenizer()
    assert page.pieces_of(words, words("8 + 19").input_ids) == ["8", " +", " 19"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 steps, evaluated after the second."""
    out = tmp_path_factory.mktemp("runs") / "score"
    flags = f"{FLAGS} --stage1_steps 1 --stage2_steps 2 --eval_every 2 --max_new_tokens 16"
    helpers.train_here(score, "models/tiny", out, *flags.split())
    return out


def test_a_run_keeps_rollouts_of_its_first_step_of_evaluated_ones_and_its_last(run):
    rows, metrics = read(run), helpers.metrics(run)
    assert [row["step"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert data_in(run / "rollouts.html")["rows"] == rows
    for line in metrics:
        turns = [row["turns"] for row in rows if row["step"] == line["step"]]
        for number in (0, 1):
            rewards = [turn[number]["reward"] for turn in turns]
            assert sum(rewards) / 8 == line[f"acc_t{number + 1}"]
            kl = sum(sum(turn[number]["kl"]) for turn in turns) / 8
            assert kl == pytest.approx(line[f"kl_t{number + 1}"], rel=0.01, abs=1e-5)
    first = [turn["advantage"] for row in rows[:8] for turn in row["turns"][:1]]
    assert not any(map(any, first))  # Stage I rewards second attempts alone


def test_what_a_page_has_no_room_for_is_left_out_of_every_step(monkeypatch):
    rows = [json.dumps({"step": step, "row": n}) for step in (0, 19) for n in range(4)]
    monkeypatch.setattr(page, "SHOWN", 5)
    assert page.thinned(rows) == [rows[0], rows[1], rows[4], rows[5]]
    monkeypatch.setattr(page, "ROOM", 3 * len(rows[0]))
    assert page.thinned(rows) == [rows[0], rows[4]] and page.thinned([]) == []


METHODS = {"self_correct": 2, "self_refine": 3, "reflect_retry": 3, "blind_retry": 2}
METHODS |= {"generic_reflection": 2, "fresh_attempt": 2}  # method: turns of the longest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["itself", "the run's base"])
def test_evaluate_has_the_log_probs_of_its_tokens_beside_the_references(
    model, method, tmp_path, run
):
    out, html, checkpoint = tmp_path / "x.json", tmp_path / "x.html", str(run / "checkpoint")
    flags = ["--model", checkpoint, *"--task tiny --limit 6 --temperature 1".split()]
    flags += ["--reference", checkpoint] if model == "itself" else []
    if (model, method) == ("itself", "reflect_retry"):
        flags += ["--reflector", checkpoint]  # which encodes anew what another one has said
    evaluate_here(*flags, "--method", method, "--html", str(html), "--output", str(out))
    talks, data = json.loads(out.read_text())["conversations"], data_in(html)
    assert "contexts" not in talks[0] and len(data["rows"]) == 6
    used = checkpoint if model == "itself" else "models/tiny"  # what the run began with
    assert f"reference: {used}" in data["about"]
    assert max(len(row["turns"]) for row in data["rows"]) == METHODS[method]
    for talk, row in zip(talks, data["rows"], strict=True):
        judged = [turn for turn in row["turns"] if turn["reward"] is not None]
        assert [turn["reward"] for turn in judged] == [y["right"] for y in talk["attempts"]]
        for turn, attempt in zip(judged, talk["attempts"], strict=True):
            assert "".join(turn["said"]).removesuffix(" <end>") == attempt["text"]
        for turn in row["turns"]:
            far = max(map(abs, turn["log_ratio"]))
            assert (far < 1e-3 if model == "itself" else far > 0) and min(turn["logprob"]) < 0


def test_the_reference_scores_at_the_temperature_that_was_sampled_at():
    model, tokenizer = load_model("models/tiny")
    told = tokenizer("<user> 8 19 16 make 24 <assistant>").input_ids
    context = [told, [9, 4], True, [-1.0, -2.0]]
    pages.add_reference(Scorer(model), [[[context]]], 0.5)
    logits = model(torch.tensor([told + [9, 4]])).logits[0, -3:-1] / 0.5
    wanted = logits.log_softmax(-1)[[0, 1], [9, 4]]
    torch.testing.assert_close(torch.tensor(context[4]), wanted, atol=1e-5, rtol=1e-5)


def test_what_the_data_gave_has_no_log_probs():
    turn = [[5], [9, 4], True, [0.0, 0.0], [-1.0, -2.0]]
    talk = {"contexts": [[turn]], "attempts": [{"right": 0, "reward": 0.4}]}
    [shown] = page.row_of_talk(tiny.build_tokenizer(), talk)["turns"]
    assert (
        shown["reward"] == 0.4
        and shown.keys() == {"told", "said", "reward", "cut"}
        and len(shown["said"]) == 2
    )


def test_an_evaluation_goes_on_with_its_page_and_one_without_does_not(tmp_path, capsys):
    flags = "--task tiny --limit 6 --temperature 1 --output".split() + [str(tmp_path / "x.json")]
    html, cut = ["--html", str(tmp_path / "x.html")], pages.write_page

    def stop(*arguments):
        cut(*arguments)
        raise Stopped(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pages, "write_page", stop)
        evaluate_here(*flags, *html)
    whole = (tmp_path / "x.html").read_text()
    assert "left by an evaluation with another html" in helpers.refusal(evaluate, capsys, *flags)
    evaluate_here(*flags, *html)
    assert (tmp_path / "x.html").read_text() == whole and (tmp_path / "x.json").exists()


def test_a_page_that_cannot_be_written_loses_no_figures(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "write_page", full)
    flags = ["--output", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")]
    with pytest.raises(SystemExit):
        evaluate_here("--task", "tiny", "--limit", "2", *flags)
    said = capsys.readouterr()
    assert "x.html can't be written: No space left" in said.err and "acc_t1" in said.out
    assert (tmp_path / "x.json.partial").exists()  # the same call goes on from there


def test_a_page_that_is_there_or_a_reference_without_one_is_refused(tmp_path, capsys):
    there = tmp_path / "x.html"
    there.write_text("mine")
    said = helpers.refusal(evaluate, capsys, "--html", there)
    assert f"--html {there}: it exists; name a new file" in said
    assert there.read_text() == "mine"
    said = helpers.refusal(evaluate, capsys, "--reference", "models/tiny")
    assert "--reference is for --html" in said
    said = helpers.refusal(evaluate, capsys, "--html", "x", "--output", "x")
    assert "--html and --output are both x" in said


def test_a_base_that_is_gone_is_done_without_unless_it_was_asked_for(tmp_path, capsys, run):
    checkpoint = tmp_path / "run" / "checkpoint"
    shutil.copytree(run / "checkpoint", checkpoint)
    (tmp_path / "run" / "config.json").write_text('{"model": "./gone"}')
    flags = ["--model", str(checkpoint), "--task", "tiny", "--limit", "2"]
    evaluate_here(*flags, "--html", str(tmp_path / "x.html"))
    assert "no log-ratios: --reference ./gone: " in capsys.readouterr().out
    asked = ["--html", tmp_path / "y.html", "--reference", "./gone"]
    assert "--reference ./gone: " in helpers.refusal(evaluate, capsys, *flags, *asked)
    evaluate_here(*flags, "--html", str(tmp_path / "z.html"), "--reference", "none")
    assert "reference" not in data_in(tmp_path / "z.html")["about"]


def test_reflections_before_and_after_are_of_the_same_failures():
    def talk(right, *said):
        attempts = [{"text": "1", "right": 1 - len(said)}, {"text": "2", "right": right}]
        return {"problem": {"n": 3}, "attempts": attempts, "said": [*said]}

    pairs = page.pairs_of([talk(0, "so"), talk(1)], [talk(1, "no"), talk(1)])
    half = {"retry": "2"}
    assert pairs == [{
        "asked": '{"n": 3}', "failed": "1",
        "before": half | {"said": "so", "right": False},
        "after": half | {"said": "no", "right": True},
    }]  # fmt: skip


@pytest.fixture(scope="module")
def window():
    with browser.browser() as opened:
        yield opened


def turn(said, reward, advantage, told="told"):
    n = len(said)
    values = {"advantage": [advantage] * n, "logprob": [-0.5] * n}
    return {"told": told, "said": said, "reward": reward, "cut": False} | values


def write_page(path, title, rows, pairs=()):
    page.write_page(path, title, "about", [json.dumps(row) for row in rows], pairs)


def click(window, start):
    """The button whose text begins so."""
    window.run(
        "[...document.querySelectorAll('button')]"
        ".find((b) => b.textContent.startsWith(arguments[0])).click()",
        start,
    )


@needs_browser
def test_a_reader_filters_steps_searches_and_sees_what_a_token_got(window, tmp_path):
    rows = [
        {"step": 0, "turns": [turn(["a"], 1.0, 0.0), turn(["b"], 0.0, -2.0)]},
        {"step": 0, "turns": [turn(["c"], 0.0, 0.0), turn(["d", "\n"], 1.0, 2.0)]},
        {"step": 5, "turns": [turn(["e"], 0.0, 0.0, CHAT), turn(["f"], 0.5, 1.0)]},
    ]
    half = {"said": "hm", "retry": "x", "right": False}
    pair = {"asked": "p", "failed": "y", "before": half, "after": half | {"right": True}}
    write_page(tmp_path / "x.html", "title", rows, [pair])
    window.open(tmp_path / "x.html")

    def shown():
        return window.run(
            "return [...document.querySelectorAll('#list > button')]"
            ".map((b) => b.innerText.split('\\n')[0])"
        )

    assert shown() == ["○ ○ wrong → 0.5"]  # of the last step
    asked = window.run("return document.querySelector('#list .what').innerText")
    assert asked == "Add. 1 + 1?"
    click(window, "wrong → wrong 1")  # a part of a reward is not right
    assert shown() == ["○ ○ wrong → 0.5"]
    click(window, "all 1")
    window.run("document.getElementById('before').click()")
    assert shown() == ["● ○ right → wrong", "○ ● wrong → right"]
    click(window, "wrong → right 1")
    assert shown() == ["○ ● wrong → right"]
    said = "return [...document.querySelectorAll('.said')].map((b) => b.innerText)"
    assert window.run(said) == ["c", "d↵\n"]
    token = "document.querySelectorAll('.said span')[arguments[0]]"
    assert "--more" in window.run(f"return {token}.getAttribute('style')", 1)
    assert window.run(f"return {token}.getAttribute('style')", 0) is None
    window.run(f"{token}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))", 1)
    tip = window.run("return document.getElementById('tip').innerText").split()
    assert tip == ['"d"', "advantage", "2", "log-prob", "−0.5"]
    click(window, "all 2")
    window.run("const s = document.getElementById('search'); s.value = 'B'; s.oninput()")
    assert shown() == ["● ○ right → wrong"]
    window.run("const s = document.getElementById('search'); s.value = ''; s.oninput()")
    window.run("document.getElementById('down').focus(); document.getElementById('down').click()")
    place = "return document.getElementById('place').innerText"
    assert window.run(place) == "2 of 2, step 0: wrong → right"
    assert window.run("return document.activeElement.id") == "down"
    click(window, "reflections")
    assert shown() == ["○ ● wrong → right"] and window.run(said) == ["y", "hm", "x", "hm", "x"]
    assert window.faults() == []


@needs_browser
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_2000_rollouts_open_fast_fit_the_window_and_nothing_they_say_is_run(
    width, dark, window, tmp_path
):
    said = [HOSTILE, *("word " * 60).split(" ")]
    rows = [{"step": i, "turns": [turn(said, 1.0, 1.0, HOSTILE * 20)] * 2} for i in range(2000)]
    write_page(tmp_path / "x.html", HOSTILE, rows)
    window.open(tmp_path / "x.html", width, dark)
    opened = "return performance.timing.domContentLoadedEventEnd - performance.timing.fetchStart"
    assert window.run(opened) < 5000  # half a second where nothing else runs
    window.run("const s = document.querySelector('#step'); s.value = 'null'; s.onchange()")
    assert window.run("return document.querySelectorAll('#list > button').length") == 101
    click(window, "1900 more")
    assert window.run("return document.querySelectorAll('#list > button').length") == 2000
    window.run("document.querySelector('#list > button').click()")
    assert HOSTILE in window.run("return document.querySelector('#detail .said').innerText")
    assert window.run("return document.title") == HOSTILE
    assert window.run("return [window.hit, document.images.length]") == [None, 0]
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.faults() == []


def test_a_page_asks_for_nothing_from_elsewhere(run):
    text = (run / "rollouts.html").read_text()
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<script") == 2  # its own and the data's
