"""Whole runs of a training script on a random model, in this process or from the command line."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from importlib import import_module
from pathlib import Path

import pytest
import torch

import tiny
from report import curves
from sampling import turns
from tasks import TASKS
from tasks.tiny import tiny_splits
from training import checkpoint
from training.flags import parse_args

ROOT = Path(__file__).parent.parent
SMALL = "--max_new_tokens 4 --final_problems 4 --eval_problems 4 --eval_every 2".split()
SMALL += "--save_every 2 --probe 0".split()


# A run makes all its prompts before its first step: of 13,004 that takes longer than a few steps.
# Listed here and now, for all processes that are forked from one that has imported this.
SHORT = tiny_splits() | {"train": tiny_splits()["train"][:600]}
TASKS["tiny"] = dataclasses.replace(TASKS["tiny"], generate=lambda split, seed: SHORT[split])


def save_random_model(path: Path) -> str:
    torch.manual_seed(0)
    checkpoint.save_model(tiny.build_model(), tiny.build_tokenizer(), path)
    return str(path)


def save_other_model(path: Path) -> str:
    """One with a word that the embedded model has not, in place of a number."""
    save_random_model(path)
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"99": ', '"ninety-nine": '))
    return str(path)


def save_dated_model(path: Path) -> str:
    """Another one, whose prompts begin with the parity of the day: `<user>` twice, or thrice."""
    save_random_model(path)
    template = path / "chat_template.jinja"
    dated = "<user> <user> {% if strftime_now('%d') | int % 2 %}<user> {% endif %}"
    template.write_text(dated + template.read_text())
    return str(path)


def on_day(patch, day: str) -> None:
    """Makes it this day, at noon, for all that our scripts start from now on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(f"{day}T12:00:00")

    patch.setattr(turns, "datetime", Clock)


def from_command_line(script: str, *flags):
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def refusal(script, capsys, *flags) -> str:
    """What a script says to input that it refuses with exit code 2, all of it on stderr."""
    with pytest.raises(SystemExit) as exit_:
        script.main(parse_args(script.Config, [str(flag) for flag in flags]))
    assert exit_.value.code == 2
    return capsys.readouterr().err


# Processes that have all modules already: a fraction of a second each.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
FORKS = multiprocessing.get_context("forkserver")
OURS = ["score", "rrr", "baselines", "helpers"]
LATE = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.models.auto"]
FORKS.set_forkserver_preload([*OURS, *LATE, "torch._dynamo", "matplotlib.pyplot"])


def start(function, *arguments, world=0, log="/dev/null") -> list:
    """Processes that call function(*arguments), which say what they say in log.0, log.1, ...

    world: ranks as torchrun starts them; 0: one process without it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(max(1, world)):
        ranks = group | {"RANK": rank, "LOCAL_RANK": rank} if world else {}
        said = log if log == "/dev/null" else f"{log}.{rank}"
        processes.append(FORKS.Process(target=_call, args=(function, arguments, ranks, said)))
        processes[-1].start()
    return processes


def _call(function, arguments, ranks, log):
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    function(*arguments)


def finish(processes, seconds=240) -> list[int]:
    """Their exit codes; fails if one does not end in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "processes hang"
    return [process.exitcode for process in processes]


# Smallest runs of each script: four steps, of which score.py's first two are Stage I.
FEW = {
    "score": "--problems 2 --group_size 2 --second_attempts 2 --stage1_steps 2 --stage2_steps 2 "
    "--reference stage1 --kl_target 0.001",
    "rrr": "--steps 4 --queries 6 --tries 2 --failures_per_step 2 --group_size 2 "
    "--max_reflection_tokens 6",
    "baselines": "--problems 2 --group_size 2 --second_attempts 2 --steps 4 --plus",
}
FEW = {script: flags.split() for script, flags in FEW.items()}


def start_run(script: str, model_dir, out, *flags, world=0, harm=None) -> list:
    """Processes that run a script as `train_here` does, after `harm()`; output: out.log.0, ..."""
    arguments = (script, str(model_dir), Path(out), [*FEW[script], *map(str, flags)], harm)
    return start(_run, *arguments, world=world, log=f"{out}.log")


def _run(script, model_dir, out, flags, harm):
    if harm is not None:
        harm()
    train_here(import_module(script), model_dir, out, *flags)


def run(script: str, model_dir, out, *flags, world=0, harm=None) -> list[int]:
    return finish(start_run(script, model_dir, out, *flags, world=world, harm=harm))


def metrics(out) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def arbitrary_verdict(text, problem):
    """Right half the time, for a random model too: if all rewards agree, little can be seen."""
    return (sum(map(ord, text)) + problem["target"]) % 2 == 0


def train_here(script, model_dir, out, *flags):
    """Runs a script's `main` with arbitrary verdicts; the lines of its metrics.jsonl.

    Its pictures are empty files: test_report.py draws some.
    """
    task = dataclasses.replace(TASKS["tiny"], verify=arbitrary_verdict)
    arguments = ["--model", model_dir, "--output_dir", str(out), *SMALL, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "tiny", task)
        patch.setattr(curves, "_draw", lambda path, *rest: path.touch())
        script.main(parse_args(script.Config, arguments))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    times = ("seconds", "memory", "tokens_per_second", "share_of_time", "mfu")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def die_after_save(step: int):
    """Harm: SIGKILL once the state of `step` is saved."""
    save = checkpoint.save_state

    def save_and_die(run, scorer, optimizer, memory, *rest):
        save(run, scorer, optimizer, memory, *rest)
        if memory["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_state = save_and_die
