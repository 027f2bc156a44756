"""talk.py: what it prints is the conversation that an evaluation has, as it is sampled."""

import io
import json

import pytest

import evaluate
import talk
from helpers import ROOT, refusal
from tasks import TASKS
from training.batches import row_seeds
from training.flags import parse_args

TINY = str(ROOT / "models" / "tiny")
WRONG, RIGHT = "11 5 10 make 22", "8 19 16 make 24"


def say(capsys, *args, typed=None, monkeypatch=None) -> str:
    if typed is not None:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    talk.main(parse_args(talk.Config, ["--model", TINY, *args]))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model():
    return talk.load(TINY, parse_args(talk.Config, ["--model", TINY]))


def test_the_conversation_is_that_of_an_evaluation_with_its_verdicts(model, capsys, tmp_path):
    flags = ["--model", TINY, "--limit", "1", "--output", str(tmp_path / "out.json")]
    evaluate.main(parse_args(evaluate.Config, [*flags, "--temperature", "1"]))
    capsys.readouterr()
    (own,) = json.loads((tmp_path / "out.json").read_text())["conversations"]
    asked = f"{' '.join(map(str, own['problem']['nums']))} make {own['problem']['target']}"
    config = parse_args(talk.Config, ["--model", TINY, "--temperature", "1"])
    (seed,) = row_seeds(1, "evaluate", 0)
    attempts = [f"{y['text']}  {('wrong', 'right')[int(y['right'])]}" for y in own["attempts"]]
    lines = [["user", asked], ["model", attempts[0]], ["user", "fix"], ["model", attempts[1]]]
    assert talk.heard(*model, asked, config, seed) == lines
    talk.converse(*model, asked, config, seed, talk.aloud)
    assert capsys.readouterr().out == "".join(f"{who:<9}{text}\n" for who, text in lines)


def test_tokens_are_told_one_at_a_time_and_together_are_the_answer(model):
    told = []
    config = parse_args(talk.Config, ["--model", TINY])
    talk.converse(*model, RIGHT, config, 0, lambda *event: told.append(event))
    first = told[1 : told.index(("verdict", "right"))]
    assert told[0] == ("user", RIGHT) and {kind for kind, _ in first} == {"model"}
    assert len(first) > 9 and "".join(text for _, text in first) == "19 - 16 = 3 ; 3 * 8 = 24"


def test_after_a_right_answer_nothing_is_reflected_on(capsys):
    wrong, right = (say(capsys, q, "--method", "reflect_retry") for q in (WRONG, RIGHT))
    assert [line.split()[0] for line in wrong.splitlines()] == ["user", "model"] * 3
    assert wrong.splitlines()[2] == "user     reflect" and wrong.splitlines()[4] == "user     retry"
    assert right == f"user     {RIGHT}\nmodel    19 - 16 = 3 ; 3 * 8 = 24  right\n"


def test_without_a_question_it_asks_until_the_end_and_goes_on_after_a_bad_one(capsys, monkeypatch):
    said = say(capsys, typed=f"hello\n\n{RIGHT}\n", monkeypatch=monkeypatch)
    assert "> error: the model has no word for 'hello'\n> > user     8 19" in said
    assert said.endswith("24  right\n> \n")


def test_two_models_stand_side_by_side(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(TINY)
    lines = say(capsys, WRONG, "--model", "one", "--beside", "two").splitlines()
    both = "5 + 11 = 16 ; 16 + 10 = 26  wrong"
    assert lines[:2] == [f"{'':<9}{'one':<55}two", f"{'user':<9}{WRONG:<55}{WRONG}"]
    assert lines[2] == f"{'model':<9}{both:<55}{both}"


def test_long_texts_stay_in_their_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    talks = [[["user", "a b c d e f"], ["model", "x"]], [["user", "q"]]]
    assert talk.side_by_side(["one", "two"], talks).splitlines() == [
        "         one       two",
        "user     a b c d   q",
        "         e f",
        "model    x",
    ]


def test_what_a_task_can_not_judge_has_no_verdict_and_goes_on(model, capsys):
    config = parse_args(talk.Config, ["--model", TINY, "--method", "reflect_retry"])
    lines = talk.heard(*model, "8 make", config, 0)
    assert [who for who, _ in lines] == ["user", "model"] * 3
    assert not any(text.endswith(("right", "wrong")) for _, text in lines)
    assert model[1].task.first == "{numbers} make {target}"  # nothing of the question stays


def test_a_question_fills_the_one_gap_of_a_tasks_prompt():
    task, problem, judges = talk.asked(TASKS["gsm8k"], "What is 2 + 2?")
    assert task.prompt(problem) == TASKS["gsm8k"].prompt({"problem": "What is 2 + 2?"})
    assert not judges and talk.asked(TASKS["mbpp"], "Sort {x}.")[0].first == "{question}"
    assert talk.asked(TASKS["countdown"], "3 4 make 7")[1:] == ({"nums": [3, 4], "target": 7}, True)


def test_bad_input_is_one_line(capsys):
    assert "has no word for 'hello'" in refusal(talk, capsys, "hello", "--model", TINY)
    assert "this is --model" in refusal(talk, capsys, "--model", TINY, "--beside", TINY)
    assert "'2' belongs to no flag" in refusal(talk, capsys, "1", "2", "--model", TINY)
