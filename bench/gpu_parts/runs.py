"""Whole runs of score.py with the embedded model: stopped and resumed, and whether it learns."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import score
from gpu_parts.lines import gpu, wrong
from training.command import run_script

FORKS = multiprocessing.get_context("fork")  # what was imported is there, and CUDA was not touched

FEW = "--stage1_steps 4 --stage2_steps 8 --problems 4 --save_every 2"
SMALL = "--stage1_steps 2 --stage2_steps 4 --problems 2 --group_size 2 --save_every 2"
QUICK = "--eval_every 0 --final_problems 20 --probe 0"
LEARN = "--stage1_steps 15 --stage2_steps 45 --eval_every 0 --final_problems 200 --probe 0"
FIGURES = ("reward", "kl_t2", "ratio_error", "grad_norm")
FIGURES += ("seconds_rollout", "seconds_update", "memory_mib")


def rank_alone() -> dict[str, str]:
    """The environment of torchrun's only rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    return {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}


def run(folder: Path, flags: str, env: dict, stop_after: int | None = None, wanted=0) -> dict:
    """score.py in a process of its own; SIGTERM once it has logged `stop_after` steps."""
    log, arguments = folder.with_suffix(".log"), f"--output_dir {folder} {flags}".split()
    process = FORKS.Process(target=as_called, args=(arguments, env, log))
    process.start()
    while stop_after is not None and process.is_alive():
        if len(metrics(folder)) >= stop_after:
            os.kill(process.pid, signal.SIGTERM)
            break
        time.sleep(0.01)
    process.join()
    code, says = process.exitcode, log.read_text(errors="replace")
    found = {"rc": code, "steps": len(metrics(folder)), "says": says[-1500:]}
    return found | wrong(**{f"exit_code_is_not_{wanted}": code == wanted})


def as_called(arguments: list[str], env: dict, log: Path) -> None:
    """What `python score.py ARGUMENTS > LOG` does."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ |= env
    sys.argv = ["score.py", *arguments]
    run_script(score.main, score.Config)


def metrics(folder: Path) -> list[dict]:
    log = folder / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # not a line half written
    return [json.loads(line) for line in whole.splitlines()]


def resume(part):
    """One rank of torchrun's (NCCL, FSDP2, DCP): stopped, gone on with, beside one that was not.

    Then weights in the CPU's memory, and adapters.
    """
    flags = f"{SMALL if part.small else FEW} {QUICK}"
    cases = {"cpu_offload": "--cpu_offload True", "LoRA": "--lora_rank 4"}
    with tempfile.TemporaryDirectory() as directory:
        whole, cut = Path(directory) / "whole", Path(directory) / "cut"
        part.measure("whole run", run, whole, flags, rank_alone(), needs=5)
        stop = 3 if part.small else 5
        part.measure("SIGTERM", run, cut, flags, rank_alone(), stop, 143, needs=5)
        part.measure("resumed", run, cut, f"{flags} --resume", rank_alone(), needs=5)
        part.measure("compared", compare, whole, cut, stop)
        for name, more in cases.items():
            folder = Path(directory) / name
            part.measure(name, run, folder, f"{flags} {more}", rank_alone(), needs=5)


def compare(whole: Path, cut: Path, stop: int) -> dict:
    """Up to the stop the same rewards; after it on a GPU up to the order of atomic sums."""
    runs = [metrics(folder) for folder in (whole, cut)]
    rewards = [[row["reward"] for row in rows] for rows in runs]
    same = sum(a == b for a, b in zip(*rewards))
    before = rewards[0][:stop] == rewards[1][:stop]
    last = [{key: row.get(key) for key in FIGURES} for row in (rows[-1] for rows in runs)]
    steps = [len(rows) for rows in runs]
    found = {"steps": steps, "rewards_the_same": same, "last": last}
    fine = before if gpu() else same == steps[0]
    return found | wrong(steps=steps[0] == steps[1], rewards=fine)


def train(part):
    """The embedded model, 60 steps: does the reward rise here as on a CPU?

    ratio_error is a step's largest, and a word of one in a million is off by 1 in bfloat16: so its
    mean over the steps is looked at (on a CPU 0.16).
    """
    flags = f"{SMALL} {QUICK}" if part.small else LEARN
    for dtype, error in (("bfloat16", 0.4), ("float32", 1e-3)):
        part.measure(dtype, learn, part, f"{flags} --dtype {dtype}", error, needs=5)


def learn(part, flags: str, error: float) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "run"
        found, rows = run(folder, flags, {}), metrics(folder)
    if not rows:
        return found
    ends = [mean(some, "reward") for some in (rows[:10], rows[-10:])]
    found["reward_first_last"] = ends
    for key in ("ratio_error", "seconds_rollout", "seconds_update"):
        found[key] = mean(rows[5:] or rows, key)
    learns = part.small or ends[1] > ends[0]  # a few steps teach nothing
    return wrong(reward_does_not_rise=learns, ratio_error=found["ratio_error"] < error) | found


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)
