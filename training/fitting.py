"""Defaults that fit the model: those of the flags suit the embedded one, any other gets these.

A flag says with `flag(..., other=...)` what they get, and with `flag(..., paper=...)` what --preset
paper makes of it beside that: `papers` or `tasks_own`.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tasks import TASKS
from tasks.base import Task
from training.models import ROOT, path_of

CODE = ("mbpp", "mbpp_r", "humaneval")  # tasks for which a paper has other numbers
PAPERS, TASKS_OWN = "the paper's", "the task's"
ADAPTERS = 10  # times the learning rate of whole weights,
FEW_ROWS, FEW_ROWS_LR = 128, 5e-5  # but no more than this in smaller steps: their gradient is noise


class Other(NamedTuple):
    """Another value of a flag than its default."""

    of: Callable[[str], object]  # the task's name -> the value
    said: str  # of it, in --help
    whose: str  # said of it in a run's first lines


def papers(value, code=None) -> Other:
    """What the paper gives; `code`: with code tasks, where that differs."""
    if code is None:
        return Other(lambda task: value, f"{value}", PAPERS)
    return Other(lambda task: code if task in CODE else value, f"{value}, code {code}", PAPERS)


def tasks_own(name: str) -> Other:
    return Other(lambda task: getattr(TASKS.get(task, Task), name), TASKS_OWN, TASKS_OWN)


def fitted(config_class, asked: dict):
    """The dataclass with what was `asked` for, else of --preset, else what fits, else defaults.

    Its `chosen` says what fits: {name: whose it is}.
    """
    config = config_class(**asked)
    others = {f.name: f.metadata["other"] for f in fields(config) if "other" in f.metadata}
    embedded = not others or speaks_as_embedded(config.model)
    fits = {} if embedded else {name: other.of(config.task) for name, other in others.items()}
    preset = papers_preset(config) if getattr(config, "preset", None) else {}
    config = config_class(**(fits | preset | asked))
    chosen = {name: others[name].whose for name in fits if name not in preset | asked}
    if getattr(config, "lora_rank", None) and "lr" not in asked:
        config.lr = lr_of_adapters(config, embedded)
        chosen["lr"] = "for adapters"
    if chosen:
        config.chosen = chosen
    return config


def papers_preset(config) -> dict:
    """{name: value} of the flags that have one of the paper, be it as `paper` or as `other`."""
    found = {f.name: f.metadata.get("paper", f.metadata.get("other")) for f in fields(config)}
    return {k: v.of(config.task) for k, v in found.items() if v and v.whose == PAPERS}


def lr_of_adapters(config, embedded: bool) -> float:
    """Instead of config.lr, which is one for whole weights."""
    most = FEW_ROWS_LR if config.rows < FEW_ROWS and not embedded else 1.0
    return float(f"{min(ADAPTERS * config.lr, most):.6g}")  # 5e-6, not 4.9999999999999996e-06


@cache
def speaks_as_embedded(model: str) -> bool:
    """Whether a model's words are those of models/tiny: that one, or what was made as it was.

    Read from tokenizer.json, since transformers takes seconds to import.
    """
    ours = vocabulary(ROOT / "models" / "tiny")
    return ours is not None and vocabulary(path_of(model)) == ours


def vocabulary(path: Path):
    """{word: id}, or None if there is no file that has one."""
    try:
        return json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
