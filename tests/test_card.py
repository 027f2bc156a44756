"""training/card.py: what stands beside a published model is true of it, and loads it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import helpers
import score
from helpers import SMALL
from report.tables import format_table
from tasks import TASKS
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
    assert "\n> fix\n" in text and "\n> reflect\n\n> retry\n" in text and f"`{model_dir}`" in text
    command = re.search(r"```sh\n(.*)\n```", text)[1]
    script, *flags = shlex.split(command)[1:]
    assert script == "score.py" and not {"--output_dir", "--resume"} & {*flags}
    again = parse_args(score.Config, [*flags, "--output_dir", str(config.output_dir)])
    assert again == config


@pytest.mark.parametrize("more", [(), ("--lora_rank", "2")], ids=["whole", "adapters"])
def test_what_it_says_loads_the_model(model_dir, tmp_path, monkeypatch, more):
    _, text = trained(model_dir, tmp_path / "run", *more)
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "run" / "checkpoint")
    if more:
        pytest.importorskip("peft")
    found = {}
    exec(code, found)
    ours, _ = load_model(str(tmp_path / "run" / "checkpoint"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs = found["model"](ids).logits.float()
        assert torch.allclose(theirs, ours(ids).logits, atol=1e-4)
    assert found["tokenizer"].get_vocab()
    assert text.startswith(f"---\nlibrary_name: {'peft' if more else 'transformers'}\ntags:")


def test_a_hubs_name_is_the_base_of_its_page_and_before_the_end_it_says_so(tmp_path):
    (tmp_path / lora.CONFIG).write_text("{}")
    config = score.Config(model="someone/model-1B", task="gsm8k")
    card.write_card(config, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "\nbase_model: someone/model-1B\n" in text and card.NO_TABLE in text
    assert "# model-1B after score.py" in text and TASKS["gsm8k"].reflect in text
    assert "PeftModel.from_pretrained(model, here)" in text
