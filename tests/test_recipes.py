"""The recipes: what they hand to the scripts, and what they do with the clock and what is brought.

Where the scripts themselves don't matter an interpreter stands in for them that writes down what it
is asked for, and leaves a run or an evaluation's file that is empty.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import rrr
import score
from helpers import ROOT
from training.flags import parse_args

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
BOXED = {
    "gpu_score_calls.sh": ("MODEL", "-"),
    "gpu_score_mbpp.sh": ("MODEL", "-", "-"),
    "gpu_rrr.sh": ("MODEL", "tiny", "-"),
}
STAND_IN = """
import json, os, pathlib, sys
script, *words = sys.argv[1:]
with open(os.environ["SAID"], "a") as file:
    print(json.dumps([pathlib.Path(script).name, *words]), file=file)
flags = {word[2:]: more for word, more in zip(words, words[1:] + [""]) if word[:2] == "--"}
if script.endswith("evaluate.py"):
    how = os.environ.get("EVALUATION", "")
    if how == "sleeps":
        import time
        time.sleep(60)
    if how == "fails":
        sys.exit("no such thing")
    pathlib.Path(flags["output"]).write_text("{}")
else:
    run = pathlib.Path(flags["output_dir"])
    steps = sorted(int(path.name[5:]) for path in run.glob("states/step_*"))
    state = run / "states" / f"step_{max(steps, default=0) + 1:06d}"
    state.mkdir(parents=True)
    (run / "checkpoint").mkdir(exist_ok=True)
    (state / "memory.json").write_text(flags["model"])
    kept = {name: flags[name] for name in ("task", "max_new_tokens") if name in flags}
    (run / "config.json").write_text(json.dumps(kept | {"shots": None, "unsafe": True}))
    with open(run / "metrics.jsonl", "a") as file:
        print(state.name, file=file)
"""
CALL = {
    "tools": [{"name": "add", "parameters": {}}],
    "answers": [{"name": "add", "arguments": {"a": 1}}],
}


@pytest.fixture
def recipe(tmp_path):
    """recipe(name, *arguments, **environment) -> (finished process, what scripts were asked)."""
    real, said = sys.executable, tmp_path / "said"
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "python"
    ours = "*/score.py | */rrr.py | */evaluate.py"
    stand_in = f'case "$1" in {ours}) exec {real} {tmp_path}/stand_in.py "$@" ;; esac'
    python.write_text(f'#!/usr/bin/env bash\n{stand_in}\nexec {real} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text("{}")

    def run(name, *arguments, **environment):
        said.write_text("")
        given = {"PYTHON": python, "SAID": said, "OUT": tmp_path / "out"} | environment
        env = os.environ | {key: str(value) for key, value in given.items()}
        command = ["bash", ROOT / "recipes" / name, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done, [json.loads(line) for line in said.read_text().splitlines()]

    return run


def value(words: list[str], name: str) -> str:
    """Of a flag: the last one counts."""
    return words[len(words) - words[::-1].index(name)]


def calls_file(path: Path, count: int, seed: int = 0) -> Path:
    rows = [CALL | {"query": f"add {n}"} for n in range(count)]
    rows += rows[:5]  # published sets have some twice
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_shell_and_says_first_where_it_has_run(path):
    subprocess.run(["bash", "-n", path], check=True)
    second = path.read_text().splitlines()[1]
    assert re.match(r"# (Has run, to its end, on|Rehearsed on CPU)", second)
    told = ("has not run on a GPU", "GPUs", "on an H200")
    assert any(text in second for text in told) or path.name == "laptop.sh"


@pytest.mark.parametrize("name", BOXED)
def test_bad_input_is_one_line_before_any_work(recipe, tmp_path, name):
    good = BOXED[name]
    stateless = tmp_path / "stateless"
    stateless.mkdir()
    for arguments, environment, named in (
        (good[:-1], {}, "give MODEL_DIR"),
        (("nowhere", *good[1:]), {}, "MODEL_DIR nowhere"),
        ((*good[:-1], "nothing.jsonl"), {}, "nothing.jsonl: no such file"),
        (good, {"MINUTES": "ten"}, "MINUTES=ten"),
        (good, {"EVAL_MINUTES": "-1"}, "EVAL_MINUTES=-1"),
        (good, {"MINUTES": "2", "EVAL_MINUTES": "2"}, "MINUTES=2"),
        (good, {"LIMIT": "0"}, "LIMIT=0"),
        (good, {"STATE": stateless}, f"STATE={stateless}"),
        (good, {"METHOD": "best"}, "METHOD=best") if name != "gpu_rrr.sh" else
        (("MODEL", "mbpp", "-"), {}, "TASK mbpp"),
    ):  # fmt: skip
        done, asked = recipe(name, *arguments, **environment)
        assert done.returncode == 2 and named in done.stderr, (arguments, environment)
        assert len(done.stderr.splitlines()) == 1 and not asked and not done.stdout


@pytest.mark.parametrize(
    "name, method", [*((name, "score") for name in BOXED), ("gpu_score_calls.sh", "plain")]
)
def test_what_the_scripts_are_asked_for_is_what_they_take(recipe, name, method):
    more = "--max_new_tokens", "9", "--problems" if "score" in name else "--steps", "3"
    done, (trained, *evaluated) = recipe(name, *BOXED[name], *more, METHOD=method)
    assert done.returncode == 0, done.stderr
    script = score if "score" in name else rrr
    assert "--resume" in trained
    asked = parse_args(script.Config, [word for word in trained[1:] if word != "--resume"])
    assert (asked.lora_rank, asked.keep) == (4, 1)
    given = asked.problems if script is score else asked.steps
    assert asked.max_new_tokens == 9 and given == 3  # flags of the call go over the recipe's
    if script is score:
        assert asked.stage1_steps + asked.stage2_steps == 200
        assert (asked.alpha, asked.stage1_steps) == {"score": (10, 40), "plain": (0, 0)}[method]
    for words in evaluated:
        looked = parse_args(evaluate.Config, words[1:])
        # by the run's flags, as its config.json has them
        assert looked.max_new_tokens == 9 and looked.unsafe and looked.shots is None
        assert looked.split == "test" and looked.limit == 200
    named = [Path(value(words, "--output")).stem for words in evaluated]
    assert len({*named}) == len(named) >= 4
    assert {"base_greedy", "base_sampled", "trained_000001_greedy"} <= {*named}
    for name, words in zip(named, evaluated, strict=True):
        own = name.startswith("trained") and "base_retries" not in name
        assert value(words, "--model").endswith("/run/checkpoint" if own else "MODEL")
        assert not own or value(words, "--base") == "MODEL"  # which adapters may not know by now
        assert ("--temperature" in words) == name.endswith("sampled")


def test_rrr_has_controls_after_the_same_failures(recipe):
    _, (_, *evaluated) = recipe("gpu_rrr.sh", *BOXED["gpu_rrr.sh"])
    methods = [(value(w, "--model") == "MODEL", value(w, "--method")) for w in evaluated]
    for method in ("reflect_retry", "blind_retry", "fresh_attempt", "generic_reflection"):
        assert (True, method) in methods
    assert (False, "blind_retry") in methods
    (crossed,) = [words for words in evaluated if "--reflector" in words]
    assert value(crossed, "--model") == value(crossed, "--base") == "MODEL"


def test_humaneval_is_tried_without_mbpps_examples(recipe, tmp_path):
    (tmp_path / "mbpp.jsonl").touch(), (tmp_path / "humaneval.jsonl").touch()
    _, (trained, *evaluated) = recipe("gpu_score_mbpp.sh", "MODEL", "mbpp.jsonl", "humaneval.jsonl")
    assert value(trained, "--data") == "mbpp.jsonl" and value(trained, "--task") == "mbpp"
    others = [words for words in evaluated if value(words, "--task") == "humaneval"]
    assert len(others) == 4 and len(evaluated) == 8
    for words in others:
        assert value(words, "--data") == "test=humaneval.jsonl" and value(words, "--shots") == "0"


def test_200_problems_are_held_out_whatever_their_order(recipe, tmp_path):
    held = []
    for seed in (0, 1):
        file, out = calls_file(tmp_path / f"{seed}.jsonl", 320, seed), tmp_path / f"out_{seed}"
        done, (trained, *_) = recipe("gpu_score_calls.sh", "MODEL", file, OUT=out)
        assert done.returncode == 0, done.stderr
        train, test = f"{out}/data/train.jsonl", f"{out}/data/test.jsonl"
        assert value(trained, "--data") == f"train={train},test={test}"
        parts = [
            {json.loads(row)["query"] for row in Path(path).read_text().splitlines()}
            for path in (train, test)
        ]
        assert not parts[0] & parts[1] and [*map(len, parts)] == [120, 200]
        held.append(parts[1])
    assert held[0] == held[1]
    done, asked = recipe("gpu_score_calls.sh", "MODEL", calls_file(tmp_path / "few", 220))
    assert done.returncode == 2 and not asked
    assert "220 problems are too few to hold out 200" in done.stderr


def minutes_of_training(words: list[str]) -> float:
    return float(value(words, "--max_minutes"))


def test_base_figures_that_are_there_leave_more_time_and_are_not_made_again(recipe, tmp_path):
    name, arguments = "gpu_score_calls.sh", BOXED["gpu_score_calls.sh"]
    done, (first, *evaluated) = recipe(name, *arguments, MINUTES=10)
    assert done.returncode == 0 and len(evaluated) == 4
    assert 7.2 < minutes_of_training(first) <= 7.5
    _, (second, *evaluated) = recipe(name, *arguments, MINUTES=10)
    assert 8.2 < minutes_of_training(second) <= 8.5
    named = [Path(value(words, "--output")).stem for words in evaluated]
    assert named == ["trained_000002_sampled", "trained_000002_greedy"]
    _, (third, *_) = recipe(name, *arguments, MINUTES=10, EVAL_MINUTES=0.5)
    assert 9.2 < minutes_of_training(third) <= 9.5


def test_a_run_that_was_brought_goes_on_from_its_newest_state(recipe, tmp_path):
    name, arguments = "gpu_score_calls.sh", BOXED["gpu_score_calls.sh"]
    old, new = tmp_path / "old", tmp_path / "new"
    for _ in range(2):
        recipe(name, *arguments, OUT=old)
    (old / "run" / ".lock").touch()
    shutil.copytree(old / "run", alone := tmp_path / "alone")
    done, (_, *evaluated) = recipe(name, *arguments, OUT=new, STATE=old)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (new / "run" / "states").iterdir())
    assert names == ["step_000002", "step_000003"] and len(evaluated) == 2
    assert (new / "run" / "metrics.jsonl").read_text().split() == [
        f"step_00000{n}" for n in (1, 2, 3)
    ]
    assert not (new / "run" / ".lock").exists()
    # a run's directory does as well, but has no figures of the base model beside it
    done, (_, *evaluated) = recipe(name, *arguments, OUT=tmp_path / "more", STATE=alone)
    assert done.returncode == 0 and len(evaluated) == 4


def test_what_is_newer_than_the_run_that_was_brought_stays(recipe, tmp_path):
    name, arguments = "gpu_score_calls.sh", BOXED["gpu_score_calls.sh"]
    old, new = tmp_path / "old", tmp_path / "new"
    recipe(name, *arguments, OUT=old)
    for step in (2, 3):
        done, _ = recipe(name, *arguments, OUT=new, STATE=old)
        assert done.returncode == 0 and (new / "run/states" / f"step_00000{step}").exists()
    assert "step_000002 already" in done.stdout
    done, asked = recipe(name, *arguments, OUT=old, STATE=new)  # and what is older is not mixed
    assert done.returncode == 2 and not asked and "name a new OUT" in done.stderr
    shutil.rmtree(old / "run/states")
    done, asked = recipe(name, *arguments, OUT=old, STATE=new)
    assert done.returncode == 2 and not asked and "has no saved state" in done.stderr


def test_an_evaluation_ends_with_the_time_and_a_fault_of_one_is_not_hidden(recipe, tmp_path):
    name, arguments = "gpu_score_calls.sh", BOXED["gpu_score_calls.sh"]
    done, asked = recipe(name, *arguments, EVALUATION="sleeps", MINUTES=0.1, EVAL_MINUTES=0.05)
    assert done.returncode == 0 and len(asked) <= 2  # no time is left for the second one
    assert not [*tmp_path.glob("out/eval/*.json")]  # nor was the first one waited for
    assert "run/states/step_000001/memory.json" in done.stdout
    done, asked = recipe(name, *arguments, EVALUATION="fails")
    assert done.returncode == 1 and len(asked) == 5 and "no such thing" in done.stderr
    assert recipe(name, *arguments)[0].returncode == 0


TINY = "--max_new_tokens 16 --probe 0 --save_every 1 --eval_every 1 --eval_problems 2"
TINY += " --final_problems 2"
SIZES = {"score": "--problems 2 --group_size 2 --stage1_steps 1 --stage2_steps 40"}
SIZES["rrr"] = "--failures_per_step 2 --group_size 2 --steps 40 --queries 8"
SIZES["rrr"] += " --max_reflection_tokens 16"


@pytest.mark.slow
@pytest.mark.parametrize("name", BOXED)
def test_a_run_stops_by_the_clock_and_goes_on_with_its_model_elsewhere(tmp_path, name):
    flags = f"{TINY} {SIZES['rrr' if 'rrr' in name else 'score']}".split()
    steps, figures = [], []
    for part in ("here", "there"):
        model, out = tmp_path / part / "model", tmp_path / part / "out"
        shutil.copytree(ROOT / "models" / "tiny", model)
        given = {"PYTHON": sys.executable, "TASK": "tiny", "OUT": str(out), "LIMIT": "4"}
        given |= {"MINUTES": "60", "EVAL_MINUTES": "59.99", "OMP_NUM_THREADS": "1"}
        if steps:
            given["STATE"] = str(tmp_path / "brought")
        arguments = [model, *BOXED[name][1:], *flags]
        command = ["bash", ROOT / "recipes" / name, *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "after --max_minutes" in done.stderr  # the clock has stopped it
        rows = (out / "run" / "metrics.jsonl").read_text().splitlines()
        steps.append([json.loads(row)["step"] for row in rows])
        assert (out / "run" / "checkpoint" / "adapter_config.json").exists()
        assert len([*(out / "run" / "states").iterdir()]) == 1
        assert "right: " in (out / "run" / "transcripts.txt").read_text()
        found = {path.stem: path for path in (out / "eval").glob("*.json")}
        now = f"trained_{steps[-1][-1] + 1:06d}"
        assert {"base_greedy", "base_sampled", f"{now}_greedy", f"{now}_sampled"} <= {*found}
        assert json.loads(found["base_greedy"].read_text())["n"] == 4
        figures.append(found["base_greedy"].read_text())
        if part == "here":
            out.rename(tmp_path / "brought")
            shutil.rmtree(tmp_path / "here")
    assert steps[1][: len(steps[0])] == steps[0] and len(steps[1]) > len(steps[0])
    assert steps[1] == [*range(len(steps[1]))]
    assert figures[0] == figures[1]
