"""The pictures of `reproduce.py`, from its CSVs alone, one message each.

Those of validation follow the runs: 300 problems at T = 1 every 40 steps, from the base on, which
is step 0. The others are of the test split, 1,500 problems at T = 1.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from plan import TABLE1
from report import style
from tables import estimate, eval_delta, of, read_csv, steps_done

TEST, VALIDATION = "1,500 test problems, T = 1", "300 validation problems, T = 1"
TURNS = {"first": style.FIRST, "second": style.SECOND}


class Line(NamedTuple):
    label: str
    method: str  # whose colour it has
    x: np.ndarray
    values: np.ndarray  # (seeds, points)
    dash: str = style.SECOND


def draw_all(results: Path) -> None:
    """Every picture whose rows the CSVs in `results` have."""
    figures, curves, more = (
        of(read_csv(results / f"{name}.csv"), base="tiny") for name in ("figures", "curves", "more")
    )
    figures = of(figures, mode="sampled", row="")
    draw_hero(results / "hero.png", curves)
    draw_takeoff(results / "takeoff.png", curves)
    draw_methods(results / "methods.png", figures)
    draw_budgets(results / "budgets.png", figures)
    draw_edits(results / "edits.png", more)
    draw_attempts(results / "attempts.png", more)
    draw_votes(results / "votes.png", more)
    draw_beta1(results / "beta1.png", figures, curves)
    draw_rrr(results, curves)


def draw(path: Path, title: str, said: str, x_label: str, lines: list[Line], base: tuple | None,
         ticks=None, unit=" %") -> None:  # fmt: skip
    """Means over seeds with their bands; where no line has a point, there is no picture.

    base: what to compare with, (level, label) or (level, label, its error). ticks: those of the x
    axis, which is logarithmic where each is twice the one before.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return
    seeds = max(len(line.values) for line in lines)
    said += f"; mean and s.e. of {seeds} seeds" if seeds > 1 else "; one seed"
    with style.picture(path, title, said) as axis:
        if base:
            style.level(axis, np.concatenate([line.x for line in lines]), *base)
        for line in lines:
            color = style.COLORS[line.method]
            style.curve(axis, line.x, line.values, color, line.label, line.dash)
        if ticks is not None:
            if ticks[-1] == 2 * ticks[-2]:
                axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlabel(x_label, fontsize=9)
        style.whole_numbers(axis.yaxis, unit)


def by_seed(rows: list[dict], x, y) -> tuple[np.ndarray, np.ndarray]:
    """(x, values (seeds, points)) of the rows that have a figure, as far as all seeds have them.

    x, y: functions of a row; y gives "" where there is no figure.
    """
    seeds = {}
    for row in rows:
        if y(row) != "":
            seeds.setdefault(row["seed"], []).append((float(x(row)), y(row)))
    if not seeds:
        return np.zeros(0), np.zeros((0, 0))
    length = min(map(len, seeds.values()))
    found = np.array([points[:length] for points in seeds.values()])
    return found[0, :, 0], found[:, :, 1]


def course(curves, method: str, steps: int, y) -> tuple[np.ndarray, np.ndarray]:
    """`by_seed` of a method's evaluations, with the base's as step 0 of every seed."""
    x, values = by_seed(of(curves, method=method, steps=steps), steps_done, y)
    start = [y(row) for row in of(curves, method="base")]
    if not start or not len(x):
        return x, values
    return np.array([0, *x]), np.insert(values, 0, start[0], axis=1)


def per_cent(key: str):
    """row -> that figure of it in per cent, "" if there is none."""
    return lambda row: 100 * float(row[key]) if row[key] else ""


def delta(row: dict) -> float | str:
    return 100 * eval_delta(row) if eval_delta(row) != "" else ""


def base_level(rows: list[dict], key: str) -> tuple | None:
    """(the base's figure in per cent, its name), None if it was not measured."""
    found = [per_cent(key)(row) for row in of(rows, method="base")]
    return (found[0], "base") if found else None


def draw_hero(path: Path, curves: list[dict]) -> None:
    """SCoRe and plain multi-turn RL on the shortest budget, both attempts."""
    lines = [
        Line(f"{method}, {turn}", method, *course(curves, method, 160, per_cent(key)), dash)
        for method in ("SCoRe", "multi-turn RL")
        for (turn, dash), key in zip(TURNS.items(), ("eval_acc_t1", "eval_acc_t2"))
    ]
    base = base_level(curves, "eval_acc_t2")
    base = base and (base[0], "base, second")
    title = "First and second attempts over 160 steps of training"
    ticks = range(0, 161, 40)
    draw(path, title, f"% right, {VALIDATION}", "step", lines, base, ticks)


def draw_takeoff(path: Path, curves: list[dict]) -> None:
    """When second attempts become better than first ones: what brings it forward."""
    lines = [
        Line(method, method, *course(curves, method, 320, delta))
        for method in ("SCoRe", "no Stage I", "no bonus", "multi-turn RL")
    ]
    title = "How much better second attempts are than first ones"
    base, ticks = (0, "no better"), range(0, 321, 80)
    draw(path, title, f"Delta in points, {VALIDATION}", "step", lines, base, ticks, unit="")


def draw_budgets(path: Path, figures: list[dict]) -> None:
    """Second attempts after three budgets."""
    lines = []
    for method in ("SCoRe", "multi-turn RL", "single-turn RL", "STaR, D+"):
        rows = sorted(of(figures, method=method), key=lambda row: int(row["steps"]))
        points = by_seed(rows, lambda row: row["steps"], per_cent("acc_t2"))
        lines.append(Line(method, method, *points))
    title = "Second attempts after 160, 320 and 640 steps of training"
    base, ticks = base_level(figures, "acc_t2"), (160, 320, 640)
    draw(path, title, f"% right, {TEST}", "steps of 320 attempts", lines, base, ticks)


def draw_votes(path: Path, more: list[dict]) -> None:
    """Whether half of a budget of answers is better spent on corrections."""
    kinds = {"all first": "vote_parallel", "half corrections": "vote_corrected"}
    lines = [
        Line(f"{method}, {name}", method, *of_kind(more, method, kind), dash)
        for method in ("base", "multi-turn RL", "SCoRe")
        for (name, kind), dash in zip(kinds.items(), TURNS.values())
    ]
    said = "% of majorities right, 500 test problems, T = 1"
    title = "Majority votes: all answers first attempts, or half of them corrections"
    draw(path, title, said, "answers a problem", lines, None, (2, 4, 8, 16, 32))


def draw_attempts(path: Path, more: list[dict], shown: int = 6) -> None:
    """More attempts than were trained; later ones than `shown` only fall, to 0 at the tenth."""
    lines = []
    for method in ("base", "multi-turn RL", "SCoRe", "STaR, D+"):
        x, values = of_kind(more, method, "attempts")
        lines.append(Line(method, method, x[:shown], values[:, :shown]))
    title = "Attempts in a row, of which two were trained"
    draw(path, title, f"% right, {TEST}", "attempt", lines, None, range(1, shown + 1))


def of_kind(more: list[dict], method: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return by_seed(of(more, method=method, kind=kind), lambda row: row["x"], per_cent("value"))


def draw_rrr(results: Path, curves: list[dict]) -> None:
    """Retries and the length of reflections, by what is rewarded."""
    names = {
        "RRR, loose, both rewarded": "both, anchor 0.2",
        "RRR, loose": "reflection, anchor 0.2",
        "RRR": "reflection, anchor 4",
        "RRR, loose, retry rewarded": "retry, anchor 0.2",
    }

    def lines(y) -> list[Line]:
        rows = {method: of(curves, method=method) for method in names}
        return [Line(names[m], m, *by_seed(rows[m], steps_done, y)) for m in names]

    right, tokens = per_cent("eval_retry_given_failure"), "eval_reflection_tokens"
    base = of(curves, method="base, RRR")
    levels = [(right(row), "base", retry_error(row)) for row in base]
    title, said = "Retries after a reflection, by what is rewarded", f"% right, {VALIDATION}"
    ticks = range(40, 241, 40)
    draw(results / "rrr.png", title, said, "step", lines(right), levels and levels[0], ticks)
    levels = [(float(row[tokens]), "base") for row in base]
    title, said = "How long a reflection is, by what is rewarded", f"tokens, {VALIDATION}"
    length = lambda row: float(row[tokens]) if row[tokens] else ""  # noqa: E731
    levels = levels and levels[0]
    draw(results / "rrr_tokens.png", title, said, "step", lines(length), levels, ticks, unit="")


def retry_error(row: dict) -> float:
    """Standard error of the base's retries, which are few and of one evaluation, in per cent."""
    p, failures = float(row["eval_retry_given_failure"]), 300 * (1 - float(row["eval_acc_t1"]))
    return 100 * (p * (1 - p) / failures) ** 0.5


def draw_beta1(path: Path, figures: list[dict], curves: list[dict]) -> None:
    """What a weaker KL buys: both attempts against how far the model went."""
    weights = {"beta1 0.8": 0.8, "beta1 0.2": 0.2, "SCoRe": 0.05, "beta1 0.0125": 0.0125}
    points = {}  # KL: (name, first, second attempts)
    for method in ("base", *weights):
        rows = of(figures, method=method, steps=320 if method in weights else 0)
        kl = distance(of(curves, method=method, steps=320)) if method in weights else 0.0
        if rows and kl is not None:
            name = f"{weights[method]:g}" if method in weights else "base"
            points[kl] = (name, *(estimate(rows, key) for key in ("acc_t1", "acc_t2")))
    if len(points) < 2:
        return
    said = f"% right, {TEST}; numbers: beta1; bars: s.e. of seeds and problems"
    title = "SCoRe, 320 steps: what a weaker hold on the base buys"
    with style.picture(path, title, said) as axis:
        x, color = [*points], style.COLORS["SCoRe"]
        for turn, (name, dash) in enumerate(TURNS.items(), 1):
            mean, error = zip(*(points[kl][turn] for kl in x))
            axis.errorbar(x, mean, error, linestyle="", color=color, alpha=0.45)
            style.dots(axis, x, mean, color, f"{name} attempt", dash)
        for kl, (name, _, (y, error)) in points.items():
            crowded = any(0 < other - kl < 0.15 for other in points)
            place = {"xytext": (0, 13 if crowded else 2), "ha": "center"}
            if name == "base":
                error, place = 0, {"xytext": (8, -4)}
            axis.annotate(name, (kl, y + error), fontsize=9, textcoords="offset points", **place)
        axis.set_xlabel("KL from the base, nats of both attempts (last 10 steps)", fontsize=9)
        style.whole_numbers(axis.yaxis)


def distance(rows: list[dict]) -> float | None:
    """KL of both attempts in the last steps, mean over seeds."""
    last = {row["seed"]: row for row in rows}.values()
    found = [float(row["kl_t1"]) + float(row["kl_t2"]) for row in last if row["kl_t2"]]
    return float(np.mean(found)) if found else None


def at_budget(rows: list[dict]) -> dict[str, list[dict]]:
    """{method: rows} of those of Table 1 that were trained for 320 steps, and of the base."""
    steps = {m: 0 if m == "base" else 320 for m in TABLE1}
    found = {method: of(rows, method=method, steps=n) for method, n in steps.items()}
    return {method: some for method, some in found.items() if some}


def draw_methods(path: Path, figures: list[dict]) -> None:
    """Every method's step from the first to the second attempt, the best ones above."""
    found = {
        method: [estimate(rows, key) for key in ("acc_t2", "acc_t1")]
        for method, rows in at_budget(figures).items()
    }
    if not found:
        return
    said = f"% right, {TEST}; hollow: first, filled: second; bars: s.e. of seeds and problems"
    title = "From the first attempt to the second, after 320 steps"
    with style.picture(path, title, said) as axis:
        names = sorted(found, key=found.get)
        for y, method in enumerate(names):
            (b, b_error), (a, a_error) = found[method]
            color = style.COLORS[method]
            axis.errorbar([a, b], [y, y], xerr=[a_error, b_error], linestyle="", color=color,
                          alpha=0.3, elinewidth=4)  # fmt: skip
            arrow = {"arrowstyle": "-|>", "color": color, "shrinkB": 3}
            axis.annotate("", (b, y), (a, y), arrowprops=arrow)
            axis.plot([a], [y], "o", color=color, markerfacecolor="white")
            axis.plot([b], [y], "o", color=color)
        name_rows(axis, names)


def draw_edits(path: Path, more: list[dict]) -> None:
    """How many second attempts are no copy of the first, and how many are mostly rewritten."""
    found = {}
    for method in at_budget(of(more, kind="edit_ratio")):
        x, values = of_kind(more, method, "edit_ratio")
        found[method] = [values[:, x > least].sum(axis=1).mean() for least in (0.05, 0.25)]
    if not found:
        return
    said = f"% of second attempts, {TEST}; edit distance / both lengths > 5 % (solid: > 25 %)"
    with style.picture(path, "Second attempts that are no copy of the first", said) as axis:
        names = sorted(found, key=found.get)
        for y, method in enumerate(names):
            changed, rewritten = found[method]
            color = style.COLORS[method]
            axis.barh(y, changed, 0.62, color=color, alpha=0.4)
            axis.barh(y, rewritten, 0.62, color=color)
            axis.annotate(f"{changed:.0f} %", (changed, y), xytext=(4, 0), va="center", fontsize=9,
                          textcoords="offset points", color=color)  # fmt: skip
        name_rows(axis, names)


def name_rows(axis, names: list[str]) -> None:
    """The methods as names of the rows, in their colours, on an x axis in per cent."""
    axis.set_yticks(range(len(names)), names)
    for tick in axis.get_yticklabels():
        tick.set_color(style.COLORS[tick.get_text()])
    axis.tick_params(axis="y", length=0, labelsize=9.5)
    axis.grid(axis="y", alpha=0)
    axis.grid(axis="x", alpha=0.25, linewidth=0.7)
    axis.spines["left"].set_visible(False)
    style.whole_numbers(axis.xaxis)
