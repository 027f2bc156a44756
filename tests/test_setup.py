"""What is done before a run: problems that are too long for the model's context."""

from dataclasses import replace

import pytest

import evaluate
import helpers
import score
from helpers import save_random_model
from tasks import TASKS
from training.command import parse_args
from training.setup import prepare

LENGTHS = (3, 250, 4, 160, 5, 200, 6)  # numbers of a problem, for 192 positions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def long_problems(monkeypatch):
    """Turns the problems of the tiny task into such of so many numbers."""

    def among(*lengths):
        problems = [{"nums": [7] * length, "target": 9} for length in lengths]
        task = replace(TASKS["tiny"], generate=lambda split, seed: problems)
        monkeypatch.setitem(TASKS, "tiny", task)

    return among


def chosen(model_dir, count, overlong):
    config = evaluate.Config(model=model_dir, overlong=overlong)
    splits = prepare(config, {"train": count})[2]
    return [len(problem["nums"]) for problem in splits["train"]]


def test_a_problem_that_is_too_long_is_left_out_before_they_are_counted(
    model_dir, long_problems, capsys
):
    long_problems(*LENGTHS)
    assert chosen(model_dir, 3, "drop") == [3, 4, 5]
    said = capsys.readouterr().out
    assert said.startswith("train: 2 of 5 problems left out: a prompt of 254 tokens and up to ")
    assert "don't fit the model's context of 192 (--overlong error stops instead)" in said
    assert chosen(model_dir, None, "drop") == [3, 4, 5, 6]
    assert "train: 3 of 7 problems left out" in capsys.readouterr().out
    assert chosen(model_dir, 1, "drop") == chosen(model_dir, 1, "error") == [3]
    assert capsys.readouterr().out == ""


def test_what_just_fits_stays(model_dir, long_problems):
    config = evaluate.Config(model=model_dir, overlong="drop")
    long_problems(3)
    env, sampler, splits = prepare(config, {"train": None})
    room = sampler.limit - env.tokens_after(config) - len(env.prompts(splits["train"])[0])
    long_problems(3 + room + 1, 3 + room)
    assert chosen(model_dir, None, "drop") == [3 + room]


def test_a_problem_that_is_too_long_can_be_an_error(model_dir, long_problems):
    long_problems(*LENGTHS)
    where = r"train: problem 2: a prompt of 254 tokens .* context of 192: .*--overlong drop"
    with pytest.raises(ValueError, match=where):
        chosen(model_dir, None, "error")
    long_problems(250, 251)
    with pytest.raises(ValueError, match="train: all 2 problems are too long: a prompt of 255 tok"):
        chosen(model_dir, None, "drop")


def test_training_leaves_out_and_evaluation_stops_unless_told(
    model_dir, long_problems, tmp_path, capsys
):
    long_problems(3, 4, 250, 5, 6)
    flags = "--problems 2 --group_size 2 --second_attempts 2 --stage1_steps 0 --stage2_steps 1"
    rows = helpers.train_here(score, model_dir, tmp_path / "run", *flags.split())
    assert len(rows) == 1 and "1 of 5 problems left out" in capsys.readouterr().out
    more = "--max_new_tokens", "4", "--overlong"
    assert "was drop, is error" in helpers.refusal(
        score, capsys, "--model", model_dir, "--output_dir", tmp_path / "run", *more, "error",
        "--resume",
    )  # fmt: skip
    assert "problem 3" in helpers.refusal(evaluate, capsys, "--model", model_dir, *more[:2])
    evaluate.main(parse_args(evaluate.Config, ["--model", model_dir, *more, "drop"]))
    assert "4 validation problems" in capsys.readouterr().out
