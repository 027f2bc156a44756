"""training/card.py: what stands beside a published model is true of it, and loads it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import baselines
import helpers
import score
from helpers import SMALL
from report.tables import format_table
from training import card, lora
from training.flags import parse_args
from training.models import load_model

FLAGS = [*SMALL, *"--stage1_steps 1 --stage2_steps 1 --problems 2 --group_size 2".split()]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


def trained(model_dir, out: Path, *more) -> tuple:
    config = parse_args(
        score.Config, ["--model", model_dir, "--output_dir", str(out), *FLAGS, *more]
    )
    score.main(config)
    return config, (out / "checkpoint" / "README.md").read_text()


def test_a_run_leaves_a_card_with_its_table_its_words_and_its_command(model_dir, tmp_path, capsys):
    config, text = trained(model_dir, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert format_table(results) in text and format_table(results) in capsys.readouterr().out
    assert f"`{model_dir}`" in text
    command = re.search(r"```sh\n(.*)\n```", text)[1]
    script, *flags = shlex.split(command)[1:]
    assert script == "score.py" and not {"--output_dir", "--resume"} & {*flags}
    again = parse_args(score.Config, [*flags, "--output_dir", str(config.output_dir)])
    assert again == config


@pytest.mark.parametrize(
    "given",
    [
        "--model a/b --task gsm8k --max_new_tokens 16 --lr 1.5e-4",
        "--model a/b --lora_rank 4 --lr 1.5e-4",
        "--model a/b --preset paper --stage1_steps 60 --alpha 2",
        "--task mbpp --data x.jsonl --shots 0",
    ],
)
def test_its_command_makes_the_same_run(given):
    config = parse_args(score.Config, given.split())
    again = shlex.split(card.command(config, "score.py"))[2:]
    assert parse_args(score.Config, again) == config


@pytest.mark.parametrize("more", [(), ("--lora_rank", "2")], ids=["whole", "adapters"])
def test_what_it_says_loads_the_model(tmp_path, monkeypatch, more):
    if more:
        pytest.importorskip("peft")
    _, text = trained("models/tiny", tmp_path / "run", *more)
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "run" / "checkpoint")
    found = {}
    exec(code, found)
    ours, _ = load_model(str(tmp_path / "run" / "checkpoint"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs = found["model"](ids).logits.float()
        assert torch.allclose(theirs, ours(ids).logits, atol=1e-4)
    assert found["tokenizer"].get_vocab()


def test_a_hubs_name_is_the_base_of_its_page_and_before_the_end_it_says_so(tmp_path):
    (tmp_path / lora.CONFIG).write_text("{}")
    config = score.Config(model="someone/model-1B", task="gsm8k")
    card.write_card(config, tmp_path)
    text = (tmp_path / "README.md").read_text()
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["base_model"] == "someone/model-1B" and about["library_name"] == "peft"
    assert card.NO_TABLE in text and "# model-1B after score.py" in text
    card.write_card(baselines.Config(method="star"), tmp_path)
    assert "# tiny after baselines.py --method star" in (tmp_path / "README.md").read_text()
