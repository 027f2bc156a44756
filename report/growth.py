"""How time grows with size: several series in one picture, each relative to its smallest size."""

from pathlib import Path
from statistics import median

import numpy as np

from report import style

COLORS = ("#4338ca", "#0e7490", "#be185d", "#4d7c0f")  # of no method
SAID = "seconds over those of the smallest size; numbers: slope of the three largest; dots: rounds"


def slope(points: dict[int, list[float]]) -> float | None:
    """Of log time against log size, over the three largest sizes; 1 is proportional."""
    if len(points) < 2:
        return None
    sizes = sorted(points)[-3:]
    return float(np.polyfit(np.log(sizes), np.log([median(points[size]) for size in sizes]), 1)[0])


def draw_growth(path: Path, series: dict[str, dict[int, list[float]]]) -> None:
    """A log-log picture of {name: {size: seconds of each round}}; lines go through the medians."""
    with style.picture(path, "How time grows with size", SAID) as axis:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        most = max(max(points) / min(points) for points in series.values())
        axis.plot([1, most], [1, most], ":", color=style.GREY, label="in proportion")
        for color, (name, points) in zip(COLORS, series.items()):
            sizes = np.array(sorted(points))
            first = median(points[sizes[0]])
            for size in sizes:
                x = [size / sizes[0]] * len(points[size])
                axis.plot(x, np.array(points[size]) / first, ".", color=color, alpha=0.4)
            y = [median(points[size]) / first for size in sizes]
            steepness = slope(points)
            label = name if steepness is None else f"{name}: {steepness:.2f}"
            style.dots(axis, sizes / sizes[0], y, color, label)
        axis.xaxis.set_major_formatter("{x:g} x")
        axis.yaxis.set_major_formatter("{x:g} x")
        axis.set_xlabel("size, in smallest sizes", fontsize=9)
