"""Our sampler against `model.generate` on RL's work: groups of first attempts, then second ones.

    python bench/bench_sampler.py --model DIR

Both sample the same number of tokens in every row: lengths are drawn from one seed, and stop tokens
are off. Generate runs at the best setting that a short measurement finds: kind of cache, compiled
or not, rows a call. It gets its rows sorted by length, padded on the left, and in the second turn
the whole conversation, since it keeps no cache of rows that ended at different places. Prompts are
random ids: neither side's time depends on them.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from transformers import StoppingCriteria

from common import (
    BenchConfig,
    clock,
    draw_ids,
    draw_lengths,
    finish,
    flag,
    generate_options,
    generate_step,
    interleave,
    left_padded,
    load,
    parse_args,
    print_table,
    ratio,
    spread,
)
from sampler import Sampler

MODES = {"greedy": 0.0, "sampled": 1.0}
TURNS = ("turn 1", "turn 2", "whole")


@dataclass
class Config(BenchConfig):
    model: str = flag("models/tiny", "model directory")
    prompts: int = flag(16, "prompts of --shortest_prompt to --longest_prompt tokens")
    group_size: int = flag(8, "first attempts of each prompt")
    shortest_prompt: int = flag(64, "tokens")
    longest_prompt: int = flag(256, "tokens")
    median_tokens: float = flag(64.0, "median response length, log-normal with sigma 0.8")
    max_new_tokens: int = flag(256, "longest response")
    instruction: int = flag(12, "tokens of the second turn's prompt")
    mode: str = flag("both", "greedy, sampled or both", choices=("both", *MODES))
    cache: str | None = flag(
        None, "generate's: dynamic, static or compiled (static); default: the fastest"
    )
    rows: int | None = flag(None, "rows a call of generate; default: the fastest of 32, 64, 128")
    try_compiled: bool = flag(
        True, "measure the compiled static cache too; compiling takes minutes, and a C++ compiler"
    )


class Setting(NamedTuple):
    cache: str  # dynamic, static or compiled
    rows: int  # a call


class Workload(NamedTuple):
    prompts: list[list[int]]
    instructions: list[list[int]]  # of each row
    lengths: tuple[list[int], list[int]]  # of each turn's response, of each row

    def shortened(self, longest: int):
        lengths = ([min(n, longest) for n in turn] for turn in self.lengths)
        return self._replace(lengths=tuple(lengths))


class RowLengths(StoppingCriteria):
    """Row i is done with lengths[i] new tokens."""

    def __init__(self, start: int, lengths: list[int], device: str):
        self.ends = start + torch.tensor(lengths, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def draw(config: Config, vocabulary: int) -> Workload:
    rng, rows = random.Random(config.seed), config.prompts * config.group_size
    bounds = (config.shortest_prompt, config.longest_prompt)
    sizes = [rng.randint(*bounds) for _ in range(config.prompts)]
    prompts = [draw_ids(rng, size, vocabulary) for size in sizes]
    instructions = [draw_ids(rng, config.instruction, vocabulary)] * rows
    turns = [draw_lengths(rng, rows, config.median_tokens, config.max_new_tokens) for _ in range(2)]
    return Workload(prompts, instructions, tuple(turns))


def ours(sampler: Sampler, work: Workload, temperature: float, config: Config) -> dict:
    """Seconds of each turn, and what each row sampled in each turn."""

    def first():
        limits = {"max_new_tokens": work.lengths[0], "temperature": temperature}
        return sampler.generate(work.prompts, config.group_size, **limits)

    def second():
        limits = {"max_new_tokens": work.lengths[1], "temperature": temperature}
        return sampler.extend(one, work.instructions, **limits)

    first_seconds, one = clock(first, config.device)
    second_seconds, two = clock(second, config.device)
    ids = [two.completion_ids(turn) for turn in (0, 1)]
    return seconds(first_seconds, second_seconds) | {"ids": ids}


def theirs(model, work: Workload, temperature: float, config: Config, setting: Setting) -> dict:
    rows = [prompt for prompt in work.prompts for _ in range(config.group_size)]
    result, ids = [], []
    # static caches get one shape for all calls of a turn, so that one graph serves all
    widest = config.longest_prompt
    for lengths in work.lengths:
        turn = partial(generate, model, rows, lengths, temperature, config, setting, widest)
        took, sampled = clock(turn, config.device)
        result.append(took)
        ids.append(sampled)
        rows = [a + b + c for a, b, c in zip(rows, sampled, work.instructions, strict=True)]
        widest += config.max_new_tokens + config.instruction
    return seconds(*result) | {"ids": ids}


def seconds(first: float, second: float) -> dict:
    return dict(zip(TURNS, (first, second, first + second), strict=True))


def generate(
    model, rows, lengths, temperature: float, config: Config, setting: Setting, widest: int
) -> list:
    """The ids that `model.generate` samples after each row, lengths[i] of them."""
    sampled = [None] * len(rows)
    for chosen in calls(rows, setting.rows):
        width = max(len(rows[i]) for i in chosen) if setting.cache == "dynamic" else widest
        ids, mask = left_padded([rows[i] for i in chosen], width, config.device)
        criteria = RowLengths(width, [lengths[i] for i in chosen], config.device)
        options = generate_options(setting.cache, temperature, config.max_new_tokens)
        out = model.generate(ids, attention_mask=mask, stopping_criteria=[criteria], **options)
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            sampled[i] = row[: lengths[i]]
    return sampled


def calls(rows: list, size: int) -> list[list[int]]:
    """Row indices of each call, neighbours in length together: that leaves the least padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def best_setting(model, work: Workload, config: Config) -> Setting:
    """The one with the shortest predicted time of turn 1: seconds a step x steps of each call."""
    rows = [prompt for prompt in work.prompts for _ in range(config.group_size)]
    sizes, caches = {min(size, len(rows)) for size in (32, 64, 128)}, ["dynamic", "static"]
    sizes = [config.rows] if config.rows else sorted(sizes)
    caches = [config.cache] if config.cache else caches + ["compiled"] * config.try_compiled
    candidates = [Setting(cache, size) for cache in caches for size in sizes]
    if len(candidates) == 1:
        return candidates[0]
    predicted, table = {}, []
    for setting in candidates:
        groups = calls(rows, setting.rows)
        steps = sum(max(work.lengths[0][i] for i in group) for group in groups)
        middle = len(rows[groups[len(groups) // 2][0]])
        width = middle if setting.cache == "dynamic" else config.longest_prompt
        # a dynamic cache gets slower as it grows: look at it half-way
        half = config.max_new_tokens // 2
        step = generate_step(model, *setting, width + half, config.max_new_tokens - half)
        predicted[setting] = step * steps
        table.append((*setting, f"{step * 1e3:.1f}", steps, f"{step * steps:.1f}"))
    header = ("generate's cache", "rows a call", "ms a step", "steps of turn 1", "predicted s")
    print_table(header, table)
    return min(predicted, key=predicted.get)


def agreement(one: list, two: list) -> float:
    """Share of rows with the same ids in all turns."""
    same = [a == b for a, b in zip(zip(*one, strict=True), zip(*two, strict=True), strict=True)]
    return sum(same) / len(same)


def main(config: Config) -> None:
    positions = config.longest_prompt + 2 * config.max_new_tokens + config.instruction
    model, tokenizer = load(config.model, config, positions)
    sampler = Sampler(model, tokenizer)
    sampler.is_stop[:] = False
    work = draw(config, model.config.get_text_config().vocab_size)
    tokens = dict(zip(TURNS, seconds(*map(sum, work.lengths)).values(), strict=True))
    setting = best_setting(model, work, config)
    name = f"generate, {setting.cache} cache, {setting.rows} rows a call"
    sampled = f"{tokens['turn 1']} + {tokens['turn 2']} sampled tokens"
    print(f"\n{len(work.lengths[0])} rows, {sampled}\n")
    table, figures = [], {"setting": setting._asdict()}
    for mode in [config.mode] if config.mode != "both" else MODES:
        heat = MODES[mode]
        jobs = {"ours": lambda w=work, t=heat: ours(sampler, w, t, config)}
        jobs[name] = lambda w=work, t=heat: theirs(model, w, t, config, setting)
        for job in jobs.values():
            job(work.shortened(3))
        runs = interleave(jobs, config.repeats)
        speeds = {side: speeds_of(runs[side], tokens) for side in jobs}
        for side, speed in speeds.items():
            table.append((mode, side, *(spread(speed[turn], 1) for turn in TURNS)))
        for turn in TURNS:
            speedup = ratio(speeds["ours"][turn], speeds[name][turn])
            figures[f"speedup_{mode}_{turn.replace(' ', '')}"] = speedup
        figures[f"seconds_{mode}"] = {side: [run["whole"] for run in runs[side]] for side in jobs}
        if mode == "greedy":
            figures["greedy_agreement"] = agreement(runs["ours"][0]["ids"], runs[name][0]["ids"])
    print_table(("", "", *(f"tokens/s, {turn}" for turn in TURNS)), table)
    finish(config, **figures)


def speeds_of(runs: list[dict], tokens: dict[str, int]) -> dict[str, list[float]]:
    """Tokens a second of each turn, one value a run."""
    return {turn: [tokens[turn] / run[turn] for run in runs] for turn in TURNS}


if __name__ == "__main__":
    main(parse_args(Config))
