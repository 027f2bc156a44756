"""How time grows: sampling against rows, length and model size, and the update against tokens.

    python bench/bench_growth.py

Random Llama models, so nothing to download. Writes results/growth.csv and a log-log plot,
results/growth.png, in which a slope of 1 is proportional. A slope is fitted to the three largest
sizes of a series.
"""

import copy
import csv
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common import (
    ROOT,
    BenchConfig,
    clock,
    draw_ids,
    finish,
    flag,
    interleave,
    parse_args,
    print_table,
    ready,
    spread,
)
from report.growth import draw_growth, slope
from sampler import Sampler
from training.flags import TrainConfig
from training.policy import Batch, update
from training.scorer import Scorer

HEAD, VOCABULARY, PROMPT = 32, 4096, 32
LABELS = {
    "batch": "sampled rows",
    "length": "sampled tokens a row",
    "model": "parameters",
    "update": "tokens of an update",
}


@dataclass
class Config(BenchConfig):
    hidden_size: int = flag(256, "of the model in which the other sizes grow")
    layers: int = flag(4, "of every model")
    batches: str = flag("1,2,4,8,16,32,64,128,256", "rows, 32 tokens each")
    lengths: str = flag("16,32,64,128,256,512", "sampled tokens a row, 32 rows")
    hidden_sizes: str = flag("128,256,512,1024", "of the models that grow, 32 rows of 32 tokens")
    tokens: str = flag(
        "512,1024,2048,4096,8192", "tokens of an update, half of them sampled, 64 a row"
    )
    output: str = flag("results/growth", "the files, without their endings")

    def sizes(self, name: str) -> list[int]:
        return [int(size) for size in getattr(self, name).split(",")]


def make_model(hidden_size: int, config: Config):
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=hidden_size // HEAD,
        num_key_value_heads=max(1, hidden_size // HEAD // 4),
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    longest = PROMPT + max(config.sizes("lengths"))
    return ready(AutoModelForCausalLM.from_config(shape), config, longest)


def make_sampler(model) -> Sampler:
    sampler = Sampler(model, SimpleNamespace(eos_token_id=None, pad_token_id=0))
    sampler.is_stop[:] = False
    return sampler


def roll_out(sampler: Sampler, rows: int, length: int):
    rng = random.Random(rows)
    prompts = [draw_ids(rng, PROMPT, VOCABULARY) for _ in range(rows)]
    return sampler.generate(prompts, max_new_tokens=length)


def update_job(sampler: Sampler, tokens: int, config: Config):
    """An update of one batch at every call: forward, reference, loss, backward, AdamW."""
    rollout = roll_out(sampler, max(1, tokens // (2 * PROMPT)), PROMPT)
    rollout.cache = None
    weights = rollout.action_mask.float()
    batch = Batch(rollout, weights, 0.05 * weights, float(weights.sum()), {})
    scorer = Scorer(sampler.model, copy.deepcopy(sampler.model))
    optimizer = torch.optim.AdamW(sampler.model.parameters(), lr=1e-6, fused=True)
    return lambda: update(scorer, optimizer, batch, TrainConfig())


def make_jobs(config: Config) -> dict[tuple[str, int], object]:
    """(series, size) -> what is timed."""
    base, jobs = make_sampler(make_model(config.hidden_size, config)), {}
    for rows in config.sizes("batches"):
        jobs["batch", rows] = partial(roll_out, base, rows, 32)
    for length in config.sizes("lengths"):
        jobs["length", length] = partial(roll_out, base, 32, length)
    for hidden_size in config.sizes("hidden_sizes"):
        sampler = make_sampler(make_model(hidden_size, config))
        jobs["model", sampler.model.num_parameters()] = partial(roll_out, sampler, 32, 32)
    trained = make_sampler(make_model(config.hidden_size, config))
    for tokens in config.sizes("tokens"):
        jobs["update", tokens] = update_job(trained, tokens, config)
    return jobs


def measure(config: Config) -> dict[str, dict[int, list[float]]]:
    """{series: {size: seconds of each round}}"""
    jobs = make_jobs(config)
    for job in jobs.values():
        job()

    def seconds(job) -> float:
        return clock(job, config.device)[0]

    timed = {key: partial(seconds, job) for key, job in jobs.items()}
    series = {name: {} for name in LABELS}
    for (name, size), runs in interleave(timed, config.repeats).items():
        series[name][size] = runs
    return series


def write_csv(path: Path, series: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("series", "size", "round", "seconds"))
        for name, points in series.items():
            for size, runs in points.items():
                writer.writerows((name, size, i, f"{run:.5g}") for i, run in enumerate(runs))


def main(config: Config) -> None:
    series, path = measure(config), ROOT / config.output
    write_csv(path.with_suffix(".csv"), series)
    drawn = {LABELS[name]: points for name, points in series.items() if points}
    draw_growth(path.with_suffix(".png"), drawn)
    rows = []
    for name, points in series.items():
        rows += [(LABELS[name], size, spread(seconds, 4)) for size, seconds in points.items()]
    print_table(("", "size", "seconds"), rows)
    slopes = {f"slope_{name}": points and slope(points) for name, points in series.items()}
    finish(config, **{key: value and round(value, 3) for key, value in slopes.items()})


if __name__ == "__main__":
    main(parse_args(Config))
