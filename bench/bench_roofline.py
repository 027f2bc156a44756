"""A decode step against the hardware: its time beside what its bytes or its arithmetic must take.

    python bench/bench_roofline.py --model DIR

The floor of a step at batch B and context C is the larger of bytes / bandwidth and FLOPs / rate.
Bytes: every weight and every cached key and value once. FLOPs: 2 a weight and row, and 4 C a layer,
row and width of all heads. Bandwidth and rate are the best that torch reaches here on a large
tensor and a large product, measured again in every round.
"""

import random
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F

from common import (
    BenchConfig,
    clock,
    draw_ids,
    finish,
    flag,
    generate_step,
    interleave,
    load,
    parse_args,
    print_table,
    ratio,
    spread,
)
from sampler import Sampler

WARM = 8  # steps in both of the calls whose difference is taken, as is what a call costs once


@dataclass
class Config(BenchConfig):
    repeats: int = flag(5, "rounds; in each of them everything compared runs once, in turn")
    model: str = flag("models/tiny", "model directory")
    batches: str = flag("1,8,32,64,128", "rows decoded together")
    context: int | None = flag(
        None, "tokens in the cache, on average over the steps timed; default: 200, on a GPU 440"
    )
    steps: int = flag(32, "decode steps timed, a difference of two calls")
    probe_mib: int | None = flag(
        None, "size of the tensor read to measure bandwidth; default: 1024, on a GPU 8192"
    )
    probe_size: int | None = flag(
        None,
        "rows of the matrix product that measures the arithmetic; default: 4096, on a GPU 8192",
    )
    probe_columns: int | None = flag(None, "its columns; default: half as many, on a GPU as many")

    def __post_init__(self):
        super().__post_init__()
        cpu = self.device == "cpu"
        # 440: no row crosses a multiple of 128 while it is timed, where steps are captured anew
        self.context = self.context or (200 if cpu else 440)
        self.probe_mib = self.probe_mib or (1024 if cpu else 8192)
        self.probe_size = self.probe_size or (4096 if cpu else 8192)
        self.probe_columns = self.probe_columns or max(1, self.probe_size // (2 if cpu else 1))


def fastest(functions: list, device: str, tries: int = 4) -> float:
    """Seconds of the fastest try of the fastest function, each tried once before."""
    return min(clock(function, device)[0] for function in functions for _ in range(tries + 1))


def bandwidth(config: Config) -> float:
    """Bytes a second of reading a large tensor: a sum, or a product with a vector."""
    x = torch.ones(config.probe_mib * 2**10, 256, device=config.device)  # float32
    v = torch.ones(256, device=config.device)
    return x.numel() * 4 / fastest([x.sum, lambda: x @ v], config.device)


def arithmetic(config: Config) -> dict[str, float]:
    """FLOPs a second of a large product, of each way that torch offers for this device."""
    rows, columns = config.probe_size, config.probe_columns
    x = torch.randn(rows, columns, device=config.device).to(getattr(torch, config.dtype))
    weight = torch.randn(columns, columns, device=config.device).to(x)
    ways = {"F.linear": lambda: F.linear(x, weight), "matmul": lambda: x @ weight}
    if config.device == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        product = torch.ops.mkldnn._linear_pointwise
        ways["packed weight"] = lambda: product(x, packed, None, "none", [], "")
    flops = 2 * rows * columns**2
    return {name: flops / fastest([way], config.device) for name, way in ways.items()}


def cost(model, batch: int, context: int) -> tuple[float, float]:
    """(bytes, FLOPs) that a decode step can't do without."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        weights -= embedding.numel()  # of which a step reads one row a token
    cached = 2 * batch * context * config.num_hidden_layers * config.num_key_value_heads * size
    attention = 4 * batch * context * config.num_hidden_layers * config.num_attention_heads * size
    return (weights + cached) * embedding.element_size(), 2.0 * weights * batch + attention


def extending(sampler: Sampler, rollout, count: int, config: Config) -> float:
    """Seconds of sampling `count` more tokens for all rows, which stay as they are."""
    more = [[0]] * len(rollout.lengths)
    return clock(lambda: sampler.extend(rollout, more, max_new_tokens=count), config.device)[0]


def at_batch(model, sampler: Sampler, batch: int, config: Config) -> dict[str, list]:
    """Every round's ceilings and step times at one batch size."""
    rng, vocabulary = random.Random(config.seed), model.config.get_text_config().vocab_size
    before = max(1, config.context - WARM - config.steps // 2 - 2)
    prompts = [draw_ids(rng, before, vocabulary) for _ in range(batch)]  # distinct: none share
    rollout = sampler.generate(prompts, max_new_tokens=1)
    room = WARM + config.steps
    jobs = {
        "bandwidth": lambda: bandwidth(config),
        "arithmetic": lambda: arithmetic(config),
        "few": lambda: extending(sampler, rollout, WARM, config),
        "many": lambda: extending(sampler, rollout, room, config),
        "dynamic": lambda: generate_step(model, "dynamic", batch, config.context, room),
        "static": lambda: generate_step(model, "static", batch, config.context, room),
    }
    for job in ("few", "dynamic", "static"):
        jobs[job]()
    return interleave(jobs, config.repeats)


def summary(model, batch: int, rounds: dict, config: Config) -> dict:
    """ms a step in each round; the floor and the shares of it are of medians."""
    needed, flops = cost(model, batch, config.context)
    reading = 1e3 * needed / median(rounds["bandwidth"])
    counting = 1e3 * flops / median(max(rates.values()) for rates in rounds["arithmetic"])
    pairs = zip(rounds["many"], rounds["few"], strict=True)
    cache = min(("dynamic", "static"), key=lambda kind: median(rounds[kind]))
    steps = {"ours": [1e3 * (many - few) / config.steps for many, few in pairs]}
    steps["generate"] = [1e3 * seconds for seconds in rounds[cache]]
    floor = max(reading, counting)
    shares = {f"{side}_share": round(floor / median(ms), 3) for side, ms in steps.items()}
    return {"batch": batch, "bytes": reading, "flops": counting, "cache": cache} | steps | shares


def show(lines: list[dict], ceilings: dict, config: Config) -> None:
    print(f"{median(ceilings['bandwidth']) / 1e9:.1f} GB/s")
    for way in ceilings["arithmetic"][0]:
        rate = median(rates[way] for rates in ceilings["arithmetic"])
        print(f"{rate / 1e9:.0f} GFLOP/s, {config.dtype}, {way}")
    table = []
    for line in lines:
        row = [line["batch"], f"{line['bytes']:.2f}", f"{line['flops']:.2f}"]
        for side in ("ours", "generate"):
            row += [spread(line[side]), f"{100 * line[f'{side}_share']:.0f} %"]
        table.append((*row, line["cache"]))
    sides = ("ours, ms", "of roofline", "generate, ms", "of roofline", "its cache")
    print_table(("batch", "bytes, ms", "FLOPs, ms", *sides), table)


def main(config: Config) -> None:
    model, tokenizer = load(config.model, config, 2 * config.context + WARM + config.steps)
    sampler = Sampler(model, tokenizer)
    sampler.is_stop[:] = False
    lines, figures, ceilings = [], {}, {"bandwidth": [], "arithmetic": []}
    for batch in map(int, config.batches.split(",")):
        rounds = at_batch(model, sampler, batch, config)
        line = summary(model, batch, rounds, config)
        lines.append(line)
        figures[f"speedup_batch{batch}"] = ratio(line["generate"], line["ours"])
        figures[f"roofline_share_batch{batch}"] = line["ours_share"]
        for name, seen in ceilings.items():
            seen += rounds[name]
    show(lines, ceilings, config)
    finish(config, **figures, lines=lines)


if __name__ == "__main__":
    main(parse_args(Config))
