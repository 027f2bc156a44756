"""Time and memory of a GRPO step, ours and TRL's: rollout, reference, loss, backward, AdamW.

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
from itertools import product
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
from tasks import TASKS
from training.flags import TrainConfig
from training.policy import Batch, update
from training.scorer import Scorer

TRL_SIDES = {
    "TRL": {"checkpointing": True, "micro": None},
    "TRL, no checkpointing": {"checkpointing": False, "micro": None},
    "TRL, no checkpointing, 8 rows at a time": {"checkpointing": False, "micro": 8},
}
OUR_SIDES = {
    "ours, k3": {"kl": "k3", "checkpointing": False},
    "ours, exact": {"kl": "exact", "checkpointing": False},
    "ours, k3, checkpointing": {"kl": "k3", "checkpointing": True},
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
    rng, prompts = random.Random(config.seed), []
    for _ in range(config.prompts):
        problem = {"nums": rng.sample(range(1, 100), 3), "target": rng.randint(10, 99)}
        prompt = TASKS["countdown"].prompt(problem)
        prompts.append(prompt.partition(", without")[0])  # about 50 tokens
    rows = config.prompts * config.group_size
    lengths = draw_lengths(rng, rows, config.median_tokens, config.max_new_tokens)
    lengths[rng.randrange(rows)] = config.max_new_tokens  # for it everybody waits
    return asdict(config) | {"prompts": prompts, "lengths": lengths}


def our_batch(sampler: Sampler, prompts: list, job: dict, rng: torch.Generator) -> Batch:
    """GRPO's advantages of random rewards, averaged over tokens as TRL's default loss does."""
    rollout = sampler.generate(prompts, job["group_size"], max_new_tokens=job["lengths"])
    rollout.cache = None  # its memory is wanted for the update
    rewards = torch.rand(len(prompts), job["group_size"], generator=rng)
    advantages = divide_by_std(subtract_baseline(rewards, "group_mean"), dim=1).view(-1, 1)
    kl_coef = torch.full_like(advantages, job["beta"])
    spread_out = spread_turns(advantages, rollout), spread_turns(kl_coef, rollout)
    return Batch(rollout, *spread_out, float(rollout.action_mask.sum()), {})


def our_steps(job: dict) -> dict:
    """What trl_step.py does, with this project's parts."""
    bench = BenchConfig(device=job["device"], dtype=job["dtype"])
    longest = max(map(len, job["prompts"])) + job["max_new_tokens"]
    model, tokenizer = load(job["model"], bench, longest)
    scorer = Scorer(model, copy.deepcopy(model), checkpointing=job["checkpointing"])
    sampler = Sampler(model, tokenizer)
    sampler.is_stop[:] = False  # lengths are the job's
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    train_config = TrainConfig(kl=job["kl"])
    rng = torch.Generator().manual_seed(job["seed"])
    prompts = [tokenizer(prompt).input_ids for prompt in job["prompts"]]
    result = {"seconds": [], "rollout": [], "loaded_mib": memory_mib(job["device"], peak=False)}
    for _ in range(job["steps"] + 1):
        roll_out = partial(our_batch, sampler, prompts, job, rng)
        rollout_seconds, batch = clock(roll_out, job["device"])
        learn = partial(update, scorer, optimizer, batch, train_config)
        update_seconds, _ = clock(learn, job["device"])
        result["seconds"].append(rollout_seconds + update_seconds)
        result["rollout"].append(rollout_seconds)
    result |= {key: result[key][1:] for key in ("seconds", "rollout")}  # the first is not counted
    result["prompt_tokens"] = sum(map(len, prompts)) * job["group_size"]
    result["sampled_tokens"] = int(batch.rollout.action_mask.sum())
    return result | {"peak_mib": memory_mib(job["device"])}


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
        counts = f"{work} (prompt tokens, sampled tokens)"
        raise RuntimeError(f"the sides did not do the same work: {counts}")
    return {name: merge(side) for name, side in runs.items()}


def merge(runs: list[dict]) -> dict:
    """Steps of all processes in one list, memory one value a process."""
    lists = {key: [second for run in runs for second in run[key]] for key in ("seconds", "rollout")}
    pairs = zip(lists["seconds"], lists["rollout"], strict=True)
    lists["rest"] = [whole - rollout for whole, rollout in pairs]
    lists["peak_mib"] = [run["peak_mib"] for run in runs]
    lists["above_mib"] = [run["peak_mib"] - run["loaded_mib"] for run in runs]
    return lists | {key: runs[0].get(key) for key in ("prompt_tokens", "sampled_tokens", "trl")}


def show(sides: dict[str, dict], config: Config) -> None:
    some = next(iter(sides.values()))
    sizes = f"{some['prompt_tokens']} prompt tokens, {some['sampled_tokens']} sampled"
    rows = config.prompts * config.group_size
    print(f"{rows} rows: {sizes}, at most {config.max_new_tokens} a row")
    table = []
    for name, side in sides.items():
        seconds = [spread(side[key]) for key in ("seconds", "rollout", "rest")]
        table.append((name, *seconds, *(spread(side[key], 0) for key in ("peak_mib", "above_mib"))))
    times, memory = ("step, s", "rollout, s", "the rest, s"), "above the loaded models, MiB"
    print_table(("", *times, "peak, MiB", memory), table)
    if not config.trl_python:
        print("TRL left out: --trl_python names no python")


def main(config: Config) -> None:
    sides = compare(config)
    show(sides, config)
    kinds = dict(zip(("k3", "exact", "k3_checkpointing"), OUR_SIDES, strict=True))
    labels = dict(zip(("trl", "trl_no_checkpointing", "trl_8_rows"), TRL_SIDES, strict=True))
    keys = {"speedup": "seconds", "memory_ratio": "peak_mib", "above_ratio": "above_mib"}
    figures = {}
    for (label, theirs), (kind, ours) in product(labels.items(), kinds.items()):
        for prefix, key in keys.items():
            other = sides.get(theirs)
            figure = ratio(other[key], sides[ours][key]) if other else None
            figures[f"{prefix}_{kind}_over_{label}"] = figure
    finish(config, **figures, sides=sides)


if __name__ == "__main__":
    config = parse_args(Config)
    if config.worker:
        print(json.dumps(our_steps(json.loads(Path(config.worker).read_text()))))
    else:
        main(config)
