"""A run's learning curves as a picture, `curves.png`, drawn anew at every saved state."""

import json
import warnings
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
    twentieth of a longer run. Validation: large dots, joined where there is no such line. No rows,
    or no matplotlib: no picture.
    """
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    # a line without its end is being written, or was by a process that was killed
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    if not rows:
        return
    try:
        _draw(run / "curves.png", rows, least)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        said = "matplotlib is not installed: the run goes on without curves.png"
        warnings.warn(said, stacklevel=2)


def _draw(path: Path, rows: list[dict], least: int) -> None:
    from matplotlib.ticker import MaxNLocator

    width = max(least, len(rows) // 20)
    retries = any("eval_retry_given_failure" in row for row in rows)
    retries |= any("reward" in row and not {"acc_t1", "acc_t2"} & {*row} for row in rows)
    said = f"% right: line, training batches (mean of {width} steps); dots, validation"
    with style.picture(path, "What is right while it is trained", said) as axis:
        seen = [
            value
            for name, batch, validation, dash in (RRR_LINES if retries else LINES)
            for value in _draw_line(axis, rows, name, batch, validation, dash, width)
        ]
        _draw_stages(axis, rows)
        axis.set_xlim(0, rows[-1]["step"] + 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step", fontsize=9)
        axis.yaxis.set_major_formatter("{x:.0f} %")
        axis.set_ylim(*_limits(seen))


def _draw_line(axis, rows, name, batch, validation, dash, width) -> list[float]:
    """One curve with its points; returns all values that are to be seen."""
    color = style.COLORS[name]
    x, y = _series(rows, batch)
    dense = len(x) > len(rows) / 2  # imitation has verdicts where a round begins, and no others
    faint = {"alpha": 0.25 if dense else 0.6, "markersize": 4, "clip_on": False}
    axis.plot(x, y, "." if dense else "D", color=color, **faint)
    if dense:
        sums = np.cumsum([0.0, *y])
        first = np.maximum(np.arange(len(y)) + 1 - width, 0)
        mean = (sums[1:] - sums[first]) / (np.arange(len(y)) + 1 - first)
        axis.plot(x, mean, dash, color=color, label=name)
    eval_x, eval_y = _series(rows, validation)
    joined = {} if dense else {"linestyle": dash, "label": name if len(eval_x) else "_"}
    style_of_dots = {"marker": "o", "linestyle": "", "markersize": 5.5} | joined
    axis.plot(eval_x, eval_y, color=color, markeredgecolor="white", clip_on=False, **style_of_dots)
    return [*y, *eval_y]


def _series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps made, per cent) of the rows that have the figure."""
    there = [row for row in rows if key in row]
    return [row["step"] + 1 for row in there], [100 * row[key] for row in there]


def _draw_stages(axis, rows: list[dict]) -> None:
    """A line where a stage, or a round of imitation, begins."""
    imitates = not any("reward" in row for row in rows)
    for before, row in zip(rows, rows[1:]):
        if row["stage"] != before["stage"]:
            name = f"round {row['stage']}" if imitates else "Stage " + "I" * row["stage"]
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
