"""Flags: which values are refused, which flag was meant, and what a run that goes on takes over."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

import baselines
import evaluate
import rrr
import score
from helpers import ROOT
from training.command import parse_args, type_of

SCRIPTS = {"score": score, "rrr": rrr, "baselines": baselines, "evaluate": evaluate}
every = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def refused(capsys, script, *flags) -> str:
    """The one line that a script ends with before it has begun."""
    with pytest.raises(SystemExit) as ended:
        parse_args(script.Config, [str(flag) for flag in flags])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


def numbers(script):
    return [f for f in fields(script.Config) if type_of(f) in (int, float)]


@every
def test_a_number_that_is_not_finite_or_below_its_range_is_refused_by_name(script, capsys):
    for f in numbers(script):
        strange = ["nan", "inf", "-inf", "-1e-9"] if type_of(f) is float else [-1]
        for value in strange:
            assert f"--{f.name} " in refused(capsys, script, f"--{f.name}={value}")


@every
def test_a_default_is_within_its_own_range(script):
    parse_args(script.Config, [])


@pytest.mark.parametrize("flags", [
    "--lr 0", "--gamma 1", "--alpha 0", "--beta1 0", "--clip 1", "--stage1_steps 0", "--probe 0",
    "--eval_every 0", "--seed 0", "--warmup 0", "--shots 0", "--max_minutes 0.5",
])  # fmt: skip
def test_the_ends_of_a_range_are_within(flags):
    parse_args(score.Config, flags.split())


@pytest.mark.parametrize("flags, must", [
    ("--gamma 1.1", "at least 0 and at most 1"), ("--clip 0", "above 0 and at most 1"),
    ("--max_grad_norm 0", "above 0"), ("--kl_target 0", "above 0"), ("--problems 0", "at least 1"),
    ("--max_minutes 0", "above 0"), ("--code_timeout 0", "above 0"), ("--seed 1e3", "invalid int"),
    ("--lr x", "invalid float"), ("--resume maybe", "neither True nor False"),
    ("--kl_target nan", "a finite number"), ("--baseline mean", "invalid choice"),
])  # fmt: skip
def test_what_is_beyond_a_range_is_told_the_range(flags, must, capsys):
    assert must in refused(capsys, score, *flags.split())


@pytest.mark.parametrize("flags, said", [
    ("--stage1_step 3", "unknown flag --stage1_step: did you mean --stage1_steps?"),
    ("--max_token 3", "did you mean --max_new_tokens?"),
    ("--temprature=1", "did you mean --temperature?"),
    ("--stage2", "did you mean --stage2_steps?"),
    ("--zzz 3", "unknown flag --zzz: see --help"),
    ("--resume True false", "'false' belongs to no flag: see --help"),
])  # fmt: skip
def test_a_misspelt_flag_is_told_the_one_that_was_meant(flags, said, capsys):
    assert said in refused(capsys, score, *flags.split())


def test_dashes_and_both_ways_to_say_no_are_understood():
    config = parse_args(rrr.Config, ["--max-new-tokens=9", "--no-normalise", "--resume", "false"])
    assert (config.max_new_tokens, config.normalise, config.resume) == (9, False, False)
    assert parse_args(rrr.Config, ["--collect"]).collect is True
    assert parse_args(rrr.Config, ["--normalise", "False"]).normalise is False


def test_the_papers_preset_leaves_given_flags_alone_even_at_their_defaults():
    paper = parse_args(rrr.Config, ["--preset", "paper"])
    assert (paper.beta, paper.lr, paper.failures_per_step) == (0.001, 5e-7, 256)
    ours = rrr.Config()
    given = "--preset", "paper", "--steps", str(ours.steps), "--lr", str(ours.lr)
    config = parse_args(rrr.Config, [*given])
    assert (config.steps, config.lr, config.beta) == (ours.steps, ours.lr, 0.001)
    assert parse_args(rrr.Config, ["--steps", "5"]) == rrr.Config(steps=5)


# A run that goes on


@pytest.fixture
def run(tmp_path):
    """The directory of a run that was started with other flags than the defaults."""

    def started(script, **flags):
        config = script.Config(output_dir=str(tmp_path), **flags)
        text = json.dumps(vars(config) | {"contents": {}, "day": "2031-03-05"})
        (tmp_path / "config.json").write_text(text)
        return "--output_dir", str(tmp_path), "--resume"

    return started


def test_a_run_goes_on_with_its_own_flags(run):
    flags = run(score, lr=1e-6, task="countdown", token_budget=99, keep=5, max_minutes=3.0)
    config = parse_args(score.Config, [*flags])
    assert (config.lr, config.task, config.token_budget, config.keep) == (1e-6, "countdown", 99, 5)
    assert config.max_minutes is None and config.resume  # what is said of one call is not kept
    assert parse_args(score.Config, [*flags, "--lr", "0.000001"]).lr == 1e-6


def test_a_preset_does_not_come_over_the_flags_of_a_run(run):
    flags = run(rrr, preset="paper", lr=1e-3, beta=0.001)
    assert parse_args(rrr.Config, [*flags, "--preset", "paper"]).lr == 1e-3
    assert parse_args(rrr.Config, [*flags]).preset == "paper"


@pytest.mark.parametrize("flags", [
    "--alpha 1.5", "--seed 1", "--task countdown", "--max_new_tokens 8", "--stage1_steps 61",
    "--stage2_steps 259", "--eval_every 1", "--baseline none",
])  # fmt: skip
def test_a_flag_given_differently_is_refused_with_both_values(run, flags, capsys):
    name, value = flags.split()
    said = refused(capsys, score, *run(score), *flags.split())
    assert f"{name} was " in said and f", is {value}:" in said


@pytest.mark.parametrize("flags", [
    "--stage2_steps 261", "--max_minutes 1", "--token_budget 1", "--checkpointing", "--keep 9",
    "--save_every 7", "--dtype bfloat16", "--hsdp 2", "--cpu_offload", "--skip_damaged",
    "--model elsewhere", "--data other.jsonl",
])  # fmt: skip
def test_what_may_differ_is_taken_as_given(run, flags):
    name, _, value = flags[2:].partition(" ")
    config = parse_args(score.Config, [*run(score), *flags.split()])
    assert str(getattr(config, name)) in (value, value + ".0", "True")


def test_a_flag_that_an_older_run_does_not_know_had_its_defaults_effect(run, tmp_path, capsys):
    flags = run(score)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["gamma"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert parse_args(score.Config, [*flags]).gamma == score.Config().gamma
    assert "--gamma was 0.0, is 0.5" in refused(capsys, score, *flags, "--gamma", "0.5")


def test_without_a_run_there_resume_takes_what_is_given(tmp_path):
    flags = "--output_dir", str(tmp_path / "new"), "--resume", "--lr", "1e-3"
    assert parse_args(score.Config, [*flags]).lr == 1e-3


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "", '{"model', "3", "\x00"])
def test_the_config_of_something_else_and_a_damaged_one_are_named(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    said = refused(capsys, score, "--output_dir", tmp_path, "--resume")
    assert "config.json is not of a run" in said


@pytest.mark.parametrize("flags", ["--seed 1" + 400 * "0", "--shots 2147483648"])
def test_a_whole_number_without_end_is_refused(flags, capsys):
    assert "at most 2,147,483,647" in refused(capsys, score, *flags.split())


def test_help_comes_in_groups_and_loads_neither_transformers_nor_what_saves_states():
    code = "import sys; sys.argv[1:] = ['--help']\n"
    code += "try: import runpy; runpy.run_path('score.py', run_name='__main__')\n"
    code += "finally: print(sorted({'transformers', 'sympy', 'matplotlib', 'math_verify',"
    code += " 'torch.distributed.checkpoint', 'torch.distributed.tensor'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    places = [done.stdout.index(f"\n{group}:\n") for group in (
        "model and data", "algorithm", "run", "machine"
    )]  # fmt: skip
    assert places == sorted(places) and done.stdout.rstrip().endswith("[]")
    assert done.stdout.count("--stage1_steps ") == 1
