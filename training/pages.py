"""The page of an evaluation: its conversations, beside what a reference model thinks of them."""

import json
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from report.page import SHOWN, row_of_talk, write_page
from tasks.env import Env
from tasks.sources import naming
from training.distributed import rank
from training.progress import said_if_slow
from training.run import read_config
from training.scorer import Scorer
from training.setup import load_sampler


def reference_of(config) -> str | None:
    """--reference, else the model that the run began with whose checkpoint --model is."""
    if config.reference:
        return None if config.reference == "none" else config.reference
    return read_config(Path(config.model).parent / "config.json").get("model")


def prepare_reference(config, env: Env) -> Scorer | None:
    """On the CPU, what scores by the model of `reference_of`, if there is one.

    One that nobody has named, and that can't be had, is done without.
    """
    name = reference_of(config)
    if not name:
        return None
    try:
        with naming(f"--reference {name}"), said_if_slow(f"loading {name} ..."):
            return Scorer(load_sampler(name, env, config, device="cpu").model.to("cpu"))
    except ValueError as error:
        if config.reference:
            raise
        if rank() == 0:
            print(f"no log-ratios: {error}")
        return None


def write_talks(config, env, talks: list[dict], reference) -> str:
    """The page of --html; returns why it can't be written, if so."""
    shown = talks[:SHOWN]
    about = f"{config.method}, {config.split}, T = {config.temperature:g}"
    about += f"; the first {SHOWN:,} of {len(talks):,}" if len(talks) > SHOWN else ""
    if reference is not None:
        about += f"; reference: {reference_of(config)}"
        add_reference(reference, [talk["contexts"] for talk in shown], config.temperature)
    rows = [json.dumps(row_of_talk(env.tokenizer, talk)) for talk in shown]
    try:
        write_page(Path(config.html), f"{config.model}, {config.task}", about, rows)
    except OSError as error:
        return f"--html {config.html} can't be written: {error.strerror or error}"
    return ""


@torch.no_grad()
def add_reference(reference, contexts: list[list], temperature: float, piece: int = 16) -> None:
    """Behind each turn's log-probs in conversations' contexts: those of `reference`, a Scorer."""
    flat, device = [context for some in contexts for context in some], reference.model.device
    for start in range(0, len(flat), piece):
        some = flat[start : start + piece]
        rows = [[ids for turn in context for ids in turn[:2]] for context in some]
        ids = [torch.tensor([i for part in row for i in part]) for row in rows]
        said = [
            torch.tensor([n % 2 == 1 for n, part in enumerate(row) for _ in part]) for row in rows
        ]
        ids, said = (pad_sequence(x, batch_first=True).to(device) for x in (ids, said))  # (b, t)
        scores = reference(ids, said, temperature or 1.0).logprobs
        for context, row, mask in zip(some, scores, said, strict=True):
            lengths = [len(turn[1]) for turn in context]
            for turn, logprobs in zip(context, row[mask].split(lengths), strict=True):
                turn.append(logprobs.tolist())
