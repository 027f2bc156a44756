"""Defaults that fit the model: those of the flags suit the embedded one, any other gets these.

A flag says with `flag(..., other=...)` what they get, and with `flag(..., paper=...)` what --preset
paper makes of it beside that: `papers`, `tasks_own` or `machines`.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tasks import TASKS
from tasks.base import Task
from tasks.own import is_own, limits_of
from training import lora
from training.distributed import exchange
from training.models import ROOT, path_of

CODE = ("mbpp", "mbpp_r", "humaneval")  # tasks for which a paper has other numbers
PAPERS, TASKS_OWN, MACHINES = "the paper's", "the task's", "the machine's"
ADAPTERS = 10  # times the learning rate of whole weights,
FEW_ROWS, FEW_ROWS_LR = 128, 5e-5  # but no more than this in smaller steps: their gradient is noise

TOKENS, LEAST_TOKENS = 2**14, 2**10  # of a micro-batch: as many if they fit, and at least so many
SHARE = 4  # a quarter of the memory, which holds weights, moments and logits too


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
    """An own task's are in its file (`limits_of`), or as of any."""
    return Other(lambda task: getattr(TASKS.get(task, Task), name), TASKS_OWN, TASKS_OWN)


def machines(said: str) -> Other:
    """None until the model is loaded: see `fit_to_machine`."""
    return Other(lambda task: None, said, MACHINES)


def fitted(config_class, asked: dict):
    """The dataclass with what was `asked` for, else of --preset, else what fits, else defaults.

    Its `chosen` says what fits: {name: whose it is}.
    """
    config = config_class(**asked)
    others = {f.name: f.metadata["other"] for f in fields(config) if "other" in f.metadata}
    embedded = not others or speaks_as_embedded(config.model, config.base)
    fits = {} if embedded else {name: other.of(config.task) for name, other in others.items()}
    if is_own(getattr(config, "task", None)):
        in_file = {k: v for k, v in limits_of(config.task).items() if k in others}
        fits |= in_file
    preset = papers_preset(config) if getattr(config, "preset", None) else {}
    config = config_class(**(fits | preset | asked))
    chosen = {name: others[name].whose for name in fits if name not in preset | asked}
    if is_own(getattr(config, "task", None)):
        unset = (k for k, whose in chosen.items() if whose == TASKS_OWN and k not in in_file)
        chosen |= dict.fromkeys(unset, "its file sets none")
    if getattr(config, "lora_rank", None) and "lr" not in asked:
        config.lr = lr_of_adapters(config, embedded)
        chosen["lr"] = "for adapters"
    if chosen:
        config.chosen = chosen
    config.asked = frozenset(asked)
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
def speaks_as_embedded(model: str, base: str | None = None) -> bool:
    """Whether a model's words are those of models/tiny: that one, or what was made as it was.

    Read from tokenizer.json, since transformers takes seconds to import. base: of adapters, which
    have their base model's words.
    """
    ours = vocabulary(ROOT / "models" / "tiny")
    path = path_of(model)
    if lora.is_adapter(path):
        return speaks_as_embedded(base or lora.base_of(path))
    return ours is not None and vocabulary(path) == ours


def vocabulary(path: Path):
    """{word: id}, or None if there is no file that has one."""
    try:
        return json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fit_to_machine(config, model) -> None:
    """Sets --token_budget and --checkpointing where they are None: the same on all ranks."""
    asked = {name: getattr(config, name, 0) for name in ("token_budget", "checkpointing")}
    if None not in asked.values():
        return
    memory = min(exchange(memory_of(model.device)))
    build = model.config.get_text_config()
    size = build.hidden_size, build.num_hidden_layers, model.dtype.itemsize
    config.token_budget, config.checkpointing = fit_update(*size, memory / SHARE, **asked)
    fits = f"fits 1/{SHARE} of {memory / 1e9:.0f} GB"
    config.chosen = config.chosen | {name: fits for name, value in asked.items() if value is None}


def fit_update(
    width: int, layers: int, itemsize: int, memory: float, token_budget=None, checkpointing=None
) -> tuple[int, bool]:
    """(token_budget, checkpointing) of an update whose activations fit into `memory` bytes.

    What is given stays. A block keeps about 34 times its width of a token (by the arithmetic at the
    head of training/models.py 26 for Llama-3, 35 for Qwen2.5), with checkpointing one block does,
    and of the others their inputs stay.
    """
    kept = {True: (34 + layers) * width * itemsize, False: 34 * layers * width * itemsize}
    if checkpointing is None:
        checkpointing = kept[False] * (token_budget or TOKENS) > memory
    fits = int(memory / kept[checkpointing]) // LEAST_TOKENS * LEAST_TOKENS
    return token_budget or min(TOKENS, max(LEAST_TOKENS, fits)), checkpointing


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this rank's part of the machine, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # a container has a limit of its own, or none: "max"
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
