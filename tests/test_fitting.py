"""Defaults that fit the model: whose they are, what comes over them, and that a run says so."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import baselines
import evaluate
import helpers
import loss
import rrr
import score
from training import fitting, setup
from training.command import parse_args
from training.fitting import fit_update, memory_of, speaks_as_embedded

SCRIPTS = {"score": score, "rrr": rrr, "baselines": baselines, "evaluate": evaluate}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return helpers.save_other_model(tmp_path_factory.mktemp("other") / "model")


def test_the_embedded_model_is_known_by_its_words_wherever_it_lies(other, tmp_path, monkeypatch):
    trained = helpers.save_random_model(tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    assert speaks_as_embedded("models/tiny") and speaks_as_embedded(trained)
    assert not speaks_as_embedded(other) and not speaks_as_embedded("Qwen/Qwen2.5-1.5B-Instruct")
    for number, text in enumerate(["", "{", "[]", '{"model": []}', "null", "\udcff"]):
        broken = tmp_path / str(number)
        broken.mkdir()
        (broken / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
        assert not speaks_as_embedded(str(broken)), text


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_embedded_model_has_the_defaults_of_the_flags(script):
    config = parse_args(script.Config, [])
    assert config == script.Config() and config.chosen == {}


PAPERS = {"lr": 5e-6, "beta1": 0.01, "beta2": 0.1}
RRR = {"lr": 5e-7, "beta": 0.001, "anchor": 0.001, "kl_on": "both"}
OF_COUNTDOWN = {"max_new_tokens": 256, "max_reflection_tokens": 128}
LORA = ["--lora_rank", "8"]


@pytest.mark.parametrize("script, flags, expected", [
    ("score", [], PAPERS),
    ("score", ["--task", "math"], PAPERS | {"max_new_tokens": 1024}),
    ("score", ["--task", "mbpp"], {"lr": 1e-5, "beta2": 0.25, "max_new_tokens": 512}),
    ("score", ["--task", "no such one"], PAPERS),
    ("baselines", ["--task", "humaneval"], {"lr": 1e-5, "max_new_tokens": 768}),
    ("rrr", ["--task", "countdown"], RRR | OF_COUNTDOWN | {"schedule": "cosine"}),
    ("evaluate", ["--task", "countdown"], OF_COUNTDOWN),
    ("score", LORA, {"lr": 5e-5}),
    ("rrr", LORA, {"lr": 5e-6}),
    ("score", [*LORA, "--task", "mbpp"], {"lr": 1e-4}),
    ("score", [*LORA, "--task", "mbpp", "--problems", "8"], {"lr": 1e-4}),  # 128 rows
    ("score", [*LORA, "--task", "mbpp", "--problems", "7"], {"lr": 5e-5}),  # fewer
    ("score", [*LORA, "--lr", "1e-3"], {"lr": 1e-3}),
    ("score", [*LORA, "--preset", "paper"], {"lr": 5e-5}),
])  # fmt: skip
def test_another_model_gets_the_papers_numbers_and_its_tasks(script, flags, expected, other):
    config = parse_args(SCRIPTS[script].Config, ["--model", other, *flags])
    assert {name: getattr(config, name) for name in expected} == expected


def test_adapters_of_the_embedded_model_learn_ten_times_as_fast_in_small_steps_too():
    assert (
        parse_args(score.Config, LORA).lr == parse_args(score.Config, [*LORA, "--problems", "1"]).lr
    )
    assert parse_args(score.Config, LORA).lr == pytest.approx(10 * score.Config().lr)


@pytest.mark.parametrize("task, steps, rows, own", [
    ("math", (600, 2400), 512, {"lr": 5e-6, "beta1": 0.01, "beta2": 0.1}),
    ("mbpp", (300, 1200), 128, {"lr": 1e-5, "beta1": 0.01, "beta2": 0.25}),
])  # fmt: skip
def test_scores_preset_has_the_papers_sizes_of_the_task(task, steps, rows, own):
    config = parse_args(score.Config, ["--preset", "paper", "--task", task])
    assert (config.stage1_steps, config.stage2_steps) == steps and config.rows == rows
    own |= {"alpha": 10.0, "temperature": 1.0, "schedule": "constant"}
    assert {name: getattr(config, name) for name in own} == own
    samples = parse_args(baselines.Config, ["--preset", "paper", "--task", task])
    assert (samples.steps, samples.rows, samples.lr) == (sum(steps), rows, own["lr"])


def test_what_was_given_goes_over_the_runs_flags_the_preset_and_what_fits(other, tmp_path):
    flags = "--model", other, "--task", "mbpp", "--output_dir", str(tmp_path)
    new = parse_args(rrr.Config, [*flags, "--preset", "paper", "--beta", "0.5"])
    assert (new.beta, new.steps, new.anchor, new.max_new_tokens) == (0.5, 1750, 0.001, 512)
    assert {"max_new_tokens", "max_reflection_tokens"} <= new.chosen.keys()
    assert not {"beta", "lr", "anchor", "steps"} & new.chosen.keys()
    saved = vars(rrr.Config(model=other, task="mbpp", output_dir=str(tmp_path))) | {"contents": {}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    old = parse_args(rrr.Config, [*flags[-2:], "--resume", "--steps", "900"])
    assert (old.lr, old.beta, old.max_new_tokens) == (5e-4, 0.005, 16) and old.chosen == {}
    assert old.steps == 900


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help_says_both_values(script, capsys):
    with pytest.raises(SystemExit):
        parse_args(script.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    if script in (score, baselines):
        assert "(default: 0.00015; another model: 5e-06, code 1e-05)" in said
        assert "(default: 16; --preset paper: 32, code 8)" in said
    if script is rrr:
        assert "(default: all; another model: both)" in said and "--preset paper: 1750)" in said
    assert "token limit of an attempt (default: 16; another model: the task's)" in said


def test_whose_defaults_they_are_is_known_without_loading_a_model(other):
    code = "import sys, score; from training.command import parse_args\n"
    code += "print(parse_args(score.Config, ['--model', sys.argv[1]]).lr)\n"
    code += "print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, other]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["5e-06", "False"]


GB = 1e9
SMOL, QWEN7 = (576, 30), (3584, 28)  # width, layers


@pytest.mark.parametrize("size, itemsize, memory, given, expected", [
    (SMOL, 4, 39 * GB, {}, (16384, False)),  # 4 * 34 * 576 * 30 * 16384 = 38.5 GB
    (SMOL, 4, 38 * GB, {}, (16384, True)),  # 4 * 64 * 576 * 16384 = 2.4 GB
    (SMOL, 2, 20 * GB, {}, (16384, False)),  # half of it
    (SMOL, 4, 1 * GB, {}, (6144, True)),  # 6,781
    (QWEN7, 2, 6 * GB, {}, (13312, True)),  # 13,500
    (QWEN7, 2, 0.1 * GB, {}, (1024, True)),  # the least
    (SMOL, 4, 1 * GB, {"token_budget": 16000}, (16000, True)),
    (SMOL, 4, 1 * GB, {"token_budget": 400}, (400, False)),
    (SMOL, 4, 30 * GB, {"checkpointing": False}, (12288, False)),  # 12,765
    (SMOL, 4, 99 * GB, {"checkpointing": True}, (16384, True)),
])  # fmt: skip
def test_an_updates_activations_fit_the_memory_and_what_is_given_stays(
    size, itemsize, memory, given, expected
):
    assert fit_update(*size, itemsize, memory, **given) == expected


def test_a_node_shares_its_memory_among_its_ranks(monkeypatch):
    alone = memory_of(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 1e8 < memory_of(torch.device("cpu")) < alone / 2


def test_a_run_goes_on_with_the_budget_that_its_machine_was_found_to_have(
    other, tmp_path, monkeypatch
):
    few = "--problems 2 --group_size 2 --stage1_steps 0 --stage2_steps 2".split()
    monkeypatch.setattr(fitting, "memory_of", lambda device: 4 * 20e6)
    assert helpers.train_here(score, other, tmp_path / "run", *few)
    flags = json.loads((tmp_path / "run" / "config.json").read_text())
    # 20 MB are 16384 * 4 * 34 * 96 * 3 bytes no more, but 1408 tokens with checkpointing
    assert (flags["token_budget"], flags["checkpointing"]) == (1024, True)
    monkeypatch.setattr(fitting, "memory_of", lambda device: 1e15)
    again = ["--output_dir", str(tmp_path / "run"), "--resume", "--stage2_steps", "3"]
    config = parse_args(score.Config, again)
    assert (config.token_budget, config.checkpointing, config.chosen) == (1024, True, {})
    given = "--model", other, "--token_budget", "500", "--output_dir", str(tmp_path / "new")
    config = parse_args(score.Config, [*given])
    setup.prepare(config, {"train": 1})
    assert (config.token_budget, config.checkpointing) == (500, False)
    assert config.chosen["checkpointing"] == "fits 1/4 of 1000000 GB"
    assert "token_budget" not in config.chosen


def test_a_run_says_what_was_chosen_and_whose_it_is(other, tmp_path, capsys):
    few = "--problems 2 --group_size 2 --stage1_steps 0 --stage2_steps 1 --beta1 0.5".split()
    helpers.train_here(score, other, tmp_path / "run", *few)
    said = capsys.readouterr().out.splitlines()
    [line] = [line for line in said if line.startswith("chosen  ")]
    assert said.index(line) == 2
    assert "--lr 5e-06 --beta2 0.1 (the paper's)" in line and "beta1" not in line
    assert "max_new_tokens" not in line  # which was given
    assert re.search(r"--token_budget 16384 --checkpointing False \(fits 1/4 of \d+ GB\)$", line)
    evaluate.main(parse_args(evaluate.Config, ["--model", other, "--limit", "2"]))
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("self_correct; --max_new_tokens 16 (the task's)")  # and no reflections


@pytest.mark.parametrize("gigabytes, power", [(16, 24), (24, 25), (40, 26), (80, 27), (141, 27)])
def test_logits_at_once_grow_with_a_gpu_but_not_on_a_cpu(gigabytes, power, monkeypatch):
    gpu = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert loss.logits_at_once(torch.device("cuda", 0)) == 2**power
    assert loss.logits_at_once(torch.device("cpu")) == 2**24
