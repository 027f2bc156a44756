"""--log: every line of metrics is handed on to TensorBoard, Weights & Biases or Trackio.

metrics.jsonl stays the truth: a logger that fails on the way is a warning, and the run goes on. A
resumed run goes on in the same chart.
"""

import hashlib
import importlib.util
import warnings
from dataclasses import asdict
from pathlib import Path

from training.run import read_config

LOGGERS = ("tensorboard", "wandb", "trackio")
PROJECT = "self-correction"


def names_of(config) -> list[str]:
    """ValueError for a logger that nobody knows, or that is not installed."""
    said = getattr(config, "log", None)  # evaluate.py has none
    names = [*dict.fromkeys(name.strip() for name in said.split(","))] if said else []
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--log {name}: choose from {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log {name}: it is not installed: pip install {name}")
    return names


def open_loggers(config, run: Path, first: int) -> list:
    """(name, a function of a step and its numbers) of each; ValueError for one that can't be had.

    first: the step that comes next, of a resumed run above 0.
    """
    found = []
    for name in names_of(config):
        try:
            found.append((name, OPEN[name](config, run, first)))
        except Exception as error:
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"--log {name}: {fault}") from None
    return found


def tell(loggers: list, row: dict) -> None:
    """Hands a line of metrics on. Who fails is warned of and left out from then on."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    for name, log in [*loggers]:
        try:
            log(row["step"], numbers)
        except Exception as error:  # a network's, a service's
            loggers.remove((name, log))
            fault = f"{type(error).__name__}: {error}"
            warnings.warn(f"--log {name} ends: {fault}; metrics.jsonl has all", stacklevel=2)


def _tensorboard(config, run: Path, first: int):
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

    # purge_step: what was written after the saved state is hidden, and written again
    writer = SummaryWriter(run / "tensorboard", purge_step=first)

    def log(step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _chart(config, run: Path) -> dict:
    """Its name says when and where the run began: the same when it goes on, and no other's."""
    began = f"{run.resolve()} {read_config(run / 'config.json').get('day')}"
    tag = hashlib.blake2b(began.encode(), digest_size=4).hexdigest()
    return {"project": PROJECT, "name": f"{run.name}-{tag}", "config": asdict(config)}


def _wandb(config, run: Path, first: int):
    import wandb

    about = _chart(config, run)
    chart = wandb.init(**about, id=about["name"], resume="allow", dir=str(run))
    return lambda step, numbers: chart.log(numbers, step=step)


def _trackio(config, run: Path, first: int):
    import trackio

    chart = trackio.init(**_chart(config, run), resume="allow")
    return lambda step, numbers: chart.log(numbers, step=step)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
