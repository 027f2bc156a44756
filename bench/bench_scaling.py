"""Rows a second and memory of each rank, with 1 and 2 processes of one thread each.

    python bench/bench_scaling.py

A step is what score.py does in one: the ranks share the problems, sample, and make one update.
`plain` is a process without torchrun. The model is a random Llama, large enough to see what
sharding spares. Round by round, all sizes run one after the other.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import (
    ROOT,
    BenchConfig,
    finish,
    flag,
    parse_args,
    peak_mib,
    print_table,
    ratio,
    resident_mib,
    spread,
)
from loss import spread as per_token
from memory import How, Load, Shape, gib
from sampler import Sampler
from score import Config as ScoreConfig
from tiny import build_tokenizer
from training import distributed
from training.batches import row_seeds
from training.checkpoint import save_model
from training.loop import Hooks, train_step
from training.models import load_model, make_scorer
from training.policy import Batch

TOKENS = 1024  # of a micro-batch


@dataclass
class Config(BenchConfig):
    hidden_size: int = flag(768, "of the model")
    layers: int = flag(12, "of the model")
    vocabulary: int = flag(32000, "of the model")
    problems: int = flag(8, "prompts a step, of all ranks")
    group_size: int = flag(4, "attempts at each")
    prompt: int = flag(64, "tokens of a prompt")
    new_tokens: int = flag(64, "tokens of an attempt")
    steps: int = flag(3, "steps a run; the first is not counted")
    sizes: str = flag("plain,1,2", "numbers of processes")
    worker: str | None = flag(None, "for this script's own use: the job of one of its processes")


def build(config: Config, path: Path) -> int:
    """Saves the random model; its number of parameters."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.hidden_size // 64),
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(shape)
    save_model(model, build_tokenizer(), path)
    return sum(p.numel() for p in model.parameters())


def work(job: dict) -> dict:
    """One rank: seconds a step, peak memory of loading and of training beyond the libraries'."""
    config = Config(**job["config"])
    flags = ScoreConfig(model=job["model"], checkpointing=True, token_budget=TOKENS)
    torch.set_num_threads(1)
    distributed.start()
    libraries = resident_mib("VmRSS")
    model, tokenizer = load_model(job["model"], dtype=torch.float32)
    model.generation_config.eos_token_id, sampler = None, Sampler(model, tokenizer)
    sampler.is_stop.zero_()  # every attempt has the same length
    scorer = make_scorer(model, flags)
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    hooks = Hooks(partial(make_batch, config, sampler), evaluate=None, plot=None)
    loading = peak_mib() - libraries
    rows = [
        train_step(flags, scorer, sampler, optimizer, step, hooks, {})
        for step in range(config.steps)
    ]
    seconds = [row["seconds_rollout"] + row["seconds_update"] for row in rows[1:]]
    done = {"seconds": seconds, "loading_mib": loading, "training_mib": peak_mib() - libraries}
    distributed.finish()
    return done


def make_batch(config: Config, sampler: Sampler, step: int, state: dict) -> Batch:
    """Of prompts that differ and advantages of 1 and -1: no verdicts, for they cost no time."""
    mine = distributed.share(config.problems)
    prompts = [[(7 * row + i) % 100 + 5 for i in range(config.prompt)] for row in mine]
    limits = {"max_new_tokens": config.new_tokens}
    limits["seeds"] = row_seeds(mine, step, each=config.group_size)
    rollout = sampler.generate(prompts, config.group_size, **limits)
    rollout.cache = None
    signs = torch.tensor([[(-1.0) ** row] for row in range(len(rollout.ids))])
    rows, kl_coef = config.problems * config.group_size, 0.1 * rollout.action_mask
    return Batch(rollout, per_token(signs, rollout), kl_coef, rows, {"stage": 1})


def measure(size: str, model: str, config: Config) -> list[dict]:
    """What each rank of a run says of itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world, processes = 1 if size == "plain" else int(size), []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(world):
            job = {"config": asdict(config) | {"worker": None}, "model": model}
            job["output"] = f"{directory}/{rank}"
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if size != "plain":
                env |= meeting | {"WORLD_SIZE": size, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, "--worker", json.dumps(job)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env))
        if any([process.wait() for process in processes]):
            raise RuntimeError(f"a run of {size} failed")
        return [json.loads(Path(f"{directory}/{rank}").read_text()) for rank in range(world)]


def main(config: Config) -> None:
    sizes = config.sizes.split(",")
    runs = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/model"
        N = build(config, Path(model))
        for _ in range(config.repeats):
            for size in sizes:
                runs[size].append(measure(size, model, config))
    rows = config.problems * config.group_size
    speed = {s: [rows / median(run[0]["seconds"]) for run in runs[s]] for s in sizes}
    peaks = {key: {s: highest(runs[s], key) for s in sizes} for key in ("loading", "training")}
    formula = {s: by_formula(N, int(s), config) for s in sizes if s != "plain"}
    table = []
    for size in sizes:
        mib = [", ".join(f"{x:.0f}" for x in peaks[key][size]) for key in peaks]
        table.append((size, spread(speed[size]), *mib, f"{formula.get(size, 0):.0f}"))
    header = ("processes", "rows a second", "MiB a rank, loading", "training", "by the formula")
    print_table(header, table)
    figures = {"parameters": N, "rows_per_second": speed, "peak_mib": peaks, "formula_mib": formula}
    others = [size for size in sizes if size != "1" and "1" in sizes]
    figures |= {f"speedup_{size}": ratio(speed[size], speed["1"]) for size in others}
    finish(config, **figures)


def highest(runs: list[list[dict]], phase: str) -> list[float]:
    """MiB of each rank in a phase, in the worst of the runs."""
    return [max(rank[f"{phase}_mib"] for rank in same) for same in zip(*runs, strict=True)]


def by_formula(N: int, ranks: int, config: Config) -> float:
    """MiB of a rank by the arithmetic of memory.py, in float32."""
    H, heads = config.hidden_size, max(1, config.hidden_size // 64)
    shape = Shape(N, config.vocabulary, H, config.layers, heads, heads, 64, 4 * H, True)
    rows, width = config.problems * config.group_size // ranks, config.prompt + config.new_tokens
    some = min(rows, TOKENS // width)  # of a micro-batch
    prompts, answers = -(-some // config.group_size) * config.prompt, some * config.new_tokens
    fed = config.problems // ranks * config.prompt
    load = Load(rows * width, fed, rows, fed, prompts + answers, some * width, answers)
    return 1024 * gib(shape, load, How(ranks, c=4, cpu=True))


if __name__ == "__main__":
    config = parse_args(Config)
    if config.worker:
        job = json.loads(config.worker)
        done = work(job)
        Path(job["output"]).write_text(json.dumps(done))
    else:
        main(config)
