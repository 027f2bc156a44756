"""How every picture looks, so that a colour and a dash mean the same in all of them.

A colour is a method; first attempts are dashed and hollow, second ones solid; dotted and grey is
the base; a band is one standard error over seeds to each side. Where all lines are of one model,
the attempts have colours of their own. Lines are named at their ends; what is counted, and on which
data, stands above the axes. matplotlib is imported where something is drawn, and not before.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np

SIZE, DPI = (7.0, 4.0), 110  # inches: 10 points are 14 pixels where the picture is 700 wide
GREY = "#6b7280"
COLORS = {
    "base": GREY,
    "Self-Refine": "#a16207",
    "SCoRe": "#d55e00",
    "no Stage I": "#e0a100",
    "no bonus": "#8c564b",
    "multi-turn RL": "#0072b2",
    "single-turn RL": "#56b4e9",
    "STaR": "#4fae84",
    "STaR, D+": "#00805c",
    "Pair-SFT": "#d277a8",
    "Pair-SFT, D+": "#b83280",
    "RRR": "#312e81",
    "RRR, loose": "#0d9488",
    "RRR, loose, retry rewarded": "#9f1239",
    "RRR, loose, both rewarded": "#65a30d",
    "first attempt": "#64748b",
    "second attempt": "#6d28d9",
    "retry after a failure": "#6d28d9",
}
FIRST, SECOND = "--", "-"


@contextmanager
def picture(path: Path, title: str, subtitle: str, size=SIZE):
    """An axis to draw on, which becomes the file `path` at the end of the block.

    The file is written under another name and then renamed: whoever looks sees the old picture or
    the new one, and a block that fails leaves the old one. Lines that have a label are named at
    their ends; what is on the y axis stands in the subtitle, where it can be read without turning
    the head.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state, nothing to close

    figure = Figure(size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.52 / size[1]))  # inches for the two lines
    figure.text(0.012, 1 - 0.1 / size[1], title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 1 - 0.33 / size[1], subtitle, va="top", fontsize=9, color=GREY)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)
    axis.margins(x=0.01)
    yield axis
    _name_lines(figure, axis)
    fresh = path.with_name(path.name + ".new")
    figure.savefig(fresh, format="png", metadata={"Software": None})
    fresh.replace(path)


def curve(axis, x, values, color: str, label: str, dash: str = SECOND) -> None:
    """The mean of `values` (seeds, points) over `x`, with a band of one standard error."""
    values = np.asarray(values, dtype=float)
    mean = values.mean(axis=0)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / len(values) ** 0.5
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
    dots(axis, x, mean, color, label, dash)


def dots(axis, x, y, color: str, label: str = "_", dash: str = SECOND) -> None:
    """A line through points; they are hollow where it is dashed."""
    filled = {"markerfacecolor": "white" if dash == FIRST else color}
    axis.plot(x, y, dash, color=color, label=label, marker="o", markersize=4, **filled)


def level(axis, x, y: float, label: str, error: float = 0.0) -> None:
    """A dotted line over all of `x` to compare with, in a band of `error` to each side."""
    ends = [min(x), max(x)]
    axis.plot(ends, [y, y], ":", color=GREY, label=label, linewidth=1.5, zorder=1)
    if error:
        axis.fill_between(ends, y - error, y + error, color=GREY, alpha=0.12, linewidth=0)


def whole_numbers(axis, unit: str = " %") -> None:
    """Ticks of an `axis.xaxis` or `axis.yaxis` where its numbers need no rounding."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(f"{{x:.0f}}{unit}")


def _name_lines(figure, axis) -> None:
    """Each line's label beside its end, in its colour; neighbours are moved apart."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return
    figure.draw_without_rendering()  # now the limits of the axes are known
    size = 9.5  # points
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    heights = axis.transData.transform(ends)[:, 1] * 72 / figure.dpi
    order = np.argsort(heights)
    for number, height in zip(order, spread(heights[order], 1.3 * size), strict=True):
        line, moved = lines[number], height - heights[number]
        leader = {"arrowstyle": "-", "color": line.get_color(), "lw": 0.7}
        leader |= {"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        axis.annotate(
            line.get_label(),
            ends[number],
            xytext=(18, moved),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=line.get_color(),
            annotation_clip=False,
            arrowprops=leader,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )


def spread(at, gap: float) -> np.ndarray:
    """The ascending `at`, moved by the least squares that set neighbours `gap` apart."""
    blocks = []  # (mean, size) of what has to move as one: isotonic regression of at - gap * rank
    for rank, y in enumerate(at):
        mean, size = y - gap * rank, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        blocks.append((mean, size))
    means = np.concatenate([[mean] * size for mean, size in blocks]) if blocks else np.zeros(0)
    return means + gap * np.arange(len(means))
