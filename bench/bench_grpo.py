"""One whole GRPO step, ours against TRL's: rollout, reference pass, loss, backward, AdamW; time and
peak memory.

    python bench/bench_grpo.py --model DIR --trl_python TRL_ENVIRONMENT/bin/python

Single-turn, P prompts x a group of G, a KL to the reference, one update of one batch, the same
response lengths on both sides. Each side runs in processes of its own, in turn, so that peaks are
theirs alone. bench/requirements-trl.txt is TRL's environment. TRL runs as it comes (gradient
checkpointing on, all rows in one micro-batch), with checkpointing off, and that in micro-batches of
8 rows; ours runs with and without checkpointing, all rows in one micro-batch.
"""

import copy
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from common import (
    BenchConfig,
    clock,
    draw_lengths,
    finish,
    flag,
    interleave,
    last_json,
    load,
    memory_mib,
    parse_args,
    print_table,
    ratio,
    spread,
)
from loss import divide_by_std, subtract_baseline
from loss import spread as spread_turns
from sampler import Sampler
from tasks.base import TASKS
from training.flags import TrainConfig
from training.policy import Batch, update
from training.scorer import Scorer

TRL_SIDES = {
    "TRL": {"checkpointing": True, "micro": None},
    "TRL, no checkpointing": {"checkpointing": False, "micro": None},
    "TRL, no checkpointing, 8 rows at a time": {"checkpointing": False, "micro": 8},
}
OUR_SIDES = {
    "ours, k3": {"kl": "k3", "token_budget": TrainConfig.token_budget, "checkpointing": False},
    "ours, exact": {
        "kl": "exact",
        "token_budget": TrainConfig.token_budget,
        "checkpointing": False,
    },
    "ours, k3, checkpointing": {
        "kl": "k3",
        "token_budget": TrainConfig.token_budget,
        "checkpointing": True,
    },
}


@dataclass
class Config(BenchConfig):
    model: str = flag("models/tiny", "model directory")
    trl_python: str | None = flag(
        None, "python of an environment with TRL; without it only our side runs"
    )
    dtype: str | None = flag(
        "float32", "float32 or bfloat16, of weights and arithmetic on both sides"
    )
    prompts: int = flag(4, "P, prompts a step")
    group_size: int = flag(8, "G, completions of each")
    median_tokens: float = flag(11.0, "median response length; of 32 rows the mean is about 20")
    max_new_tokens: int = flag(64, "longest response")
    steps: int = flag(2, "steps timed in each process, after one that isn't")
    beta: float = flag(0.04, "weight of the KL")
    lr: float = flag(1e-6, "learning rate")
    worker: str | None = flag(None, "for this script's own use: the job of one of its processes")


def make_job(config: Config) -> dict:
    """All that either side needs to know, of plain types."""
    rng = random.Random(config.seed)
    problems = [
        {"nums": rng.sample(range(1, 100), 3), "target": rng.randint(10, 99)}
        for _ in range(config.prompts)
    ]
    # about 50 tokens
    prompts = [TASKS["countdown"].prompt(problem).partition(", without")[0] for problem in problems]
    rows = config.prompts * config.group_size
    lengths = draw_lengths(rng, rows, config.median_tokens, config.max_new_tokens)
    # the longest is always there: it decides how long one waits
    lengths[rng.randrange(rows)] = config.max_new_tokens
    return asdict(config) | {"prompts": prompts, "lengths": lengths}


def our_batch(sampler: Sampler, prompts: list, job: dict, rng: torch.Generator) -> Batch:
    """GRPO's advantages of random rewards, averaged over tokens as TRL's default loss does."""
    rollout = sampler.generate(prompts, job["group_size"], max_new_tokens=job["lengths"])
    rollout.cache = None  # its memory is wanted for the update
    rewards = torch.rand(len(prompts), job["group_size"], generator=rng)
    advantages = divide_by_std(subtract_baseline(rewards, "group_mean"), dim=1).view(-1, 1)
    kl_coef = torch.full_like(advantages, job["beta"])
    tokens = float(rollout.action_mask.sum())
    return Batch(
        rollout, spread_turns(advantages, rollout), spread_turns(kl_coef, rollout), tokens, {}
    )


def our_steps(job: dict) -> dict:
    """What trl_step.py does, with this project's parts."""
    bench = BenchConfig(device=job["device"], dtype=job["dtype"])
    model, tokenizer = load(
        job["model"], bench, max(map(len, job["prompts"])) + job["max_new_tokens"]
    )
    scorer = Scorer(model, copy.deepcopy(model), checkpointing=job["checkpointing"])
    sampler = Sampler(model, tokenizer)
    sampler.is_stop[:] = False  # lengths are the job's
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    train_config, rng = (
        TrainConfig(kl=job["kl"], token_budget=job["token_budget"]),
        torch.Generator().manual_seed(job["seed"]),
    )
    prompts = [tokenizer(prompt).input_ids for prompt in job["prompts"]]
    result = {"seconds": [], "rollout": [], "loaded_mib": memory_mib(job["device"], peak=False)}
    for _ in range(job["steps"] + 1):
        rollout_seconds, batch = clock(lambda: our_batch(sampler, prompts, job, rng), job["device"])
        update_seconds, _ = clock(
            lambda: update(scorer, optimizer, batch, train_config), job["device"]
        )  # noqa: B023
        result["seconds"].append(rollout_seconds + update_seconds)
        result["rollout"].append(rollout_seconds)
    result = {key: value[1:] if isinstance(value, list) else value for key, value in result.items()}
    sampled = int(batch.rollout.action_mask.sum())
    prompt_tokens = sum(map(len, prompts)) * job["group_size"]
    return result | {
        "prompt_tokens": prompt_tokens,
        "sampled_tokens": sampled,
        "peak_mib": memory_mib(job["device"]),
    }


def compare(config: Config) -> dict[str, dict]:
    """Each side's figures, lists over processes and steps."""
    sides = OUR_SIDES | (TRL_SIDES if config.trl_python else {})
    with tempfile.TemporaryDirectory() as directory:
        jobs = {}
        for number, (name, options) in enumerate(sides.items()):
            path = Path(directory) / f"{number}.json"
            path.write_text(json.dumps(make_job(config) | options))
            ours = [sys.executable, __file__, "--worker", path]
            theirs = [config.trl_python, Path(__file__).with_name("trl_step.py"), path]
            jobs[name] = partial(last_json, ours if name in OUR_SIDES else theirs)
        runs = interleave(jobs, config.repeats)
    work = {(run["prompt_tokens"], run["sampled_tokens"]) for side in runs.values() for run in side}
    if len(work) > 1:
        raise RuntimeError(
            f"the sides did not do the same work: {work} (prompt tokens, sampled tokens)"
        )
    return {name: merge(side) for name, side in runs.items()}


def merge(runs: list[dict]) -> dict:
    """Steps of all processes in one list, memory one value a process."""
    lists = {key: [second for run in runs for second in run[key]] for key in ("seconds", "rollout")}
    lists["rest"] = [
        whole - part for whole, part in zip(lists["seconds"], lists["rollout"], strict=True)
    ]
    lists["peak_mib"] = [run["peak_mib"] for run in runs]
    lists["above_mib"] = [run["peak_mib"] - run["loaded_mib"] for run in runs]
    return lists | {key: runs[0].get(key) for key in ("prompt_tokens", "sampled_tokens", "trl")}


def main(config: Config) -> None:
    sides = compare(config)
    some = next(iter(sides.values()))
    print(f"{config.prompts * config.group_size} rows: {some['prompt_tokens']} prompt tokens, {some['sampled_tokens']} "
          f"sampled, at most {config.max_new_tokens} a row")  # fmt: skip
    header = (
        "",
        "step, s",
        "rollout, s",
        "the rest, s",
        "peak, MiB",
        "above the loaded models, MiB",
    )
    memory, seconds = ("peak_mib", "above_mib"), ("seconds", "rollout", "rest")
    cells = {
        name: [spread(side[k]) for k in seconds] + [spread(side[k], 0) for k in memory]
        for name, side in sides.items()
    }
    print_table(header, [(name, *row) for name, row in cells.items()])
    if not config.trl_python:
        print("TRL left out: --trl_python names no python")
    figures = {}
    for label, theirs in zip(("trl", "trl_no_checkpointing", "trl_8_rows"), TRL_SIDES, strict=True):
        for kind, name in zip(("k3", "exact", "k3_checkpointing"), OUR_SIDES, strict=True):
            ours, other = sides[name], sides.get(theirs)
            for prefix, key in (
                ("speedup", "seconds"),
                ("memory_ratio", "peak_mib"),
                ("above_ratio", "above_mib"),
            ):
                figures[f"{prefix}_{kind}_over_{label}"] = (
                    ratio(other[key], ours[key]) if other else None
                )
    finish(config, **figures, sides=sides)


if __name__ == "__main__":
    config = parse_args(Config)
    if config.worker:
        print(json.dumps(our_steps(json.loads(Path(config.worker).read_text()))))
    else:
        main(config)
