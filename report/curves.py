"""A run's learning curves as a picture, `curves.png`, drawn anew at every saved state."""

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np

from report import style

# a name, its figure of the training batch, that of validation, and how it is drawn
LINES = (
    ("first attempt", "acc_t1", "eval_acc_t1", style.FIRST),
    ("second attempt", "acc_t2", "eval_acc_t2", style.SECOND),
)
# RRR trains after failures: its reward is the share of retries that are right
RRR_LINES = (
    ("first attempt", "acc_t1", "eval_acc_t1", style.FIRST),
    ("retry after a failure", "reward", "eval_retry_given_failure", style.SECOND),
)


def plot_curves(run: Path, least: int = 10) -> None:
    """`curves.png` of a run, from its metrics.jsonl: what it got right, step by step.

    Training batches: faint points, and a line of their trailing mean over `least` steps, or a
    twentieth of a longer run. Validation: dots. Imitation, which has verdicts on training problems
    only where a round begins: diamonds, and the dots of validation joined. No rows: no picture.
    Whatever goes wrong with a picture is a warning, once: no run ends for it.
    """
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    # a line without its end is being written, or was by a process that was killed
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    if not rows:
        return
    try:
        _draw(run / "curves.png", rows, least)
    except Exception as error:
        missing = str(getattr(error, "name", "")).startswith("matplotlib")
        fault = f"{type(error).__name__}: {error}"
        _warn_once("matplotlib is not installed" if missing else fault)


@cache  # others reset what the filters of warnings have seen
def _warn_once(fault: str) -> None:
    warnings.warn(f"the run goes on without curves.png: {fault}", stacklevel=4)


def _draw(path: Path, rows: list[dict], least: int) -> None:
    width = max(least, len(rows) // 20)
    retries = any("eval_retry_given_failure" in row for row in rows)
    retries |= any("reward" in row and not {"acc_t1", "acc_t2"} & {*row} for row in rows)
    said = f"% right: line, training batches (mean of the last {width} steps); dots, validation"
    if imitates(rows):
        said = "% right: dots, validation; diamonds, training problems as a round begins"
    with style.picture(path, "Right answers while training", said) as axis:
        seen = []
        for name, batch, validation, dash in RRR_LINES if retries else LINES:
            seen += _draw_batches(axis, rows, name, batch, dash, width)
            seen += _draw_validation(axis, rows, name, batch, validation, dash)
        _draw_stages(axis, rows)
        axis.set_xlim(0, rows[-1]["step"] + 1)
        style.whole_numbers(axis.xaxis, "")
        style.whole_numbers(axis.yaxis)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(*_limits(seen))


def imitates(rows: list[dict]) -> bool:
    return not any("reward" in row for row in rows)


def _draw_batches(axis, rows, name, key, dash, width) -> list[float]:
    """The figure of training batches, raw and smoothed; returns the raw values."""
    color = style.COLORS[name]
    x, y = _series(rows, key)
    if not x:  # a line without points would still take room
        return []
    # so that a short run can be seen, and a long one's points don't hide its lines
    alpha = float(np.clip(80 / len(rows), 0.06, 0.45))
    faint = {"alpha": alpha, "markersize": 7 if len(rows) < 20 else 4, "markeredgewidth": 0}
    if imitates(rows):
        label = "_" if any(f"eval_{key}" in row for row in rows) else name
        axis.plot(x, y, "D", color=color, alpha=0.6, markersize=5, clip_on=False, label=label)
        return y
    axis.plot(x, y, ".", color=color, clip_on=False, **faint)
    sums = np.cumsum([0.0, *y])
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - width, 0)
    axis.plot(x, (sums[last] - sums[first]) / (last - first), dash, color=color, label=name)
    return y


def _draw_validation(axis, rows, name, batch, key, dash) -> list[float]:
    """Dots, which are joined and named where no line of training batches is."""
    x, y = _series(rows, key)
    if not x:
        return []
    size = 6.5 if len(x) < 20 else 4
    dots = {"marker": "o", "linestyle": "", "markersize": size, "clip_on": False}
    if imitates(rows) or not any(batch in row for row in rows):
        dots |= {"linestyle": dash, "label": name}
    axis.plot(x, y, color=style.COLORS[name], markeredgecolor="white", **dots)
    return y


def _series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps made, per cent) of the rows that have the figure."""
    there = [row for row in rows if key in row]
    return [row["step"] + 1 for row in there], [100 * row[key] for row in there]


def _draw_stages(axis, rows: list[dict]) -> None:
    """A line where a stage, or a round of imitation, begins."""
    for before, row in zip(rows, rows[1:]):
        if row["stage"] != before["stage"]:
            name = f"round {row['stage']}" if imitates(rows) else "Stage " + "I" * row["stage"]
            axis.axvline(row["step"], color=style.GREY, linestyle=":", linewidth=1)
            place = {"xycoords": axis.get_xaxis_transform(), "xytext": (4, -2)}
            place |= {"textcoords": "offset points", "va": "top"}
            axis.annotate(name, (row["step"], 1), color=style.GREY, fontsize=9, **place)


def _limits(values: list[float]) -> tuple[float, float]:
    """Whole tens around all values, at least 20 apart, from 0 to 100."""
    if not values:
        return 0, 100
    low, high = 10 * np.floor(min(values) / 10), 10 * np.ceil(max(values) / 10)
    low = min(low, max(0, high - 20))
    return low, max(high, low + 20)
