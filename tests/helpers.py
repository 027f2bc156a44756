"""Whole runs of a training script on a random model, in this process or from the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import policy
import tiny
from tasks import TASKS

ROOT = Path(__file__).parent.parent
SMALL = ["--max_new_tokens", "4", "--final_problems", "4", "--eval_problems", "4", "--eval_every", "2",
         "--save_every", "2", "--probe", "0"]  # fmt: skip


def save_random_model(path: Path) -> str:
    torch.manual_seed(0)
    policy.save_model(tiny.build_model(), tiny.build_tokenizer(), path)
    return str(path)


def from_command_line(script: str, *flags):
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def refusal(script, capsys, *flags) -> str:
    """What a script says to input that it refuses with exit code 2, all of it on stderr."""
    with pytest.raises(SystemExit) as exit_:
        script.main(policy.parse_args(script.Config, [str(flag) for flag in flags]))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def arbitrary_verdict(text, problem):
    """Right half the time, for a random model too: else all rewards agree and half of what happens can't be seen."""
    return (sum(map(ord, text)) + problem["target"]) % 2 == 0


def train_here(script, model_dir, out, *flags):
    """Runs a script's `main` with arbitrary verdicts; the lines of its metrics.jsonl."""
    task = dataclasses.replace(TASKS["tiny"], verify=arbitrary_verdict)
    arguments = ["--model", model_dir, "--output_dir", str(out), *SMALL, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "tiny", task)
        script.main(policy.parse_args(script.Config, arguments))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))} for row in rows]
