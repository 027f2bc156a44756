"""Tables, pictures and effect sizes of `reproduce.py`, from its CSVs alone: `python
bench/reproduce.py --render`."""

import csv
from pathlib import Path

import numpy as np

from plan import CLAIMS, RRR_CLAIMS, TABLE1, TABLE2

IDENTITY = ("base", "method", "steps", "seed", "lr")
KEYS = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "edit_ratio", "well_formed", "tokens",
        "retry_given_failure", "well_formed_retry", "reflection_tokens")  # fmt: skip
FIGURES = tuple(name for key in KEYS for name in (key, key + "_se"))
MEANS = ("reward", "acc_t1", "acc_t2", "kl_t1", "kl_t2", "entropy")  # over BIN steps
LAST = (
    "eval_acc_t1",
    "eval_acc_t2",
    "eval_retry_given_failure",
    "eval_reflection_tokens",
    "eval_well_formed",
)
CURVES = ("stage", "step", *MEANS, *LAST)
BIN, ROWS = 10, 256
COUNTS = ("tokens", "reflection_tokens", "seconds")  # not shares

DIFFERENCES = {
    "delta": ("acc_t1", "acc_t2"),
    "vote_gain": ("vote_parallel_32", "vote_corrected_32"),
}


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, header, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def thinned(steps: list[dict]) -> list[list]:
    """A run's metrics, a row for every BIN steps: means, and the last evaluation in them."""
    rows = []
    for start in range(0, len(steps), BIN):
        some = steps[start : start + BIN]
        means = [[row[key] for row in some if key in row] for key in MEANS]
        last = [next((row[key] for row in reversed(some) if key in row), "") for key in LAST]
        cells = [f"{np.mean(x):.4g}" if x else "" for x in means] + [
            f"{x:.4g}" if x != "" else "" for x in last
        ]
        rows.append([some[0]["stage"], some[-1]["step"], *cells])
    return rows


def of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def mean_and_error(rows: list[dict], key: str) -> str:
    """Mean ± standard error over seeds and the problems, which all seeds share; of one run, over
    problems."""
    scale = 1 if key in COUNTS else 100
    values = [scale * float(row[key]) for row in rows if row[key]]
    if not values:
        return ""
    errors = [scale * float(row[key + "_se"]) for row in rows if row.get(key + "_se")]
    over_seeds = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    error = (over_seeds**2 + (np.mean(errors) if errors else 0) ** 2) ** 0.5
    return f"{np.mean(values):.1f} ± {error:.1f}" if key != "seconds" else f"{np.mean(values):.0f}"


def table(figures: list[dict], methods, columns, **where) -> str:
    """Markdown: a line for each method, number of steps and mode."""
    lines = [
        "| % | steps | seeds | | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for method in methods:
        rows = of(figures, method=method, **where)
        for steps in sorted({int(row["steps"]) for row in rows}):
            for mode in ("greedy", "sampled"):
                cells = of(rows, steps=steps, mode=mode)
                text = " | ".join(mean_and_error(cells, key) for key in columns)
                lines.append(f"| {method} | {steps or ''} | {len(cells)} | {mode} | {text} |")
    return "\n".join(lines)


def quantile(df: float) -> float:
    """The 97.5 % point of Student's t (Cornish-Fisher; below 3 degrees of freedom that of the whole
    number below)."""
    if df < 3:
        return 4.303 if df >= 2 else 12.706
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)  # fmt: skip
    return sum(term / df**i for i, term in enumerate(terms))


def effect(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, lower, upper end of its 95 % interval) of paired differences (seeds, problems).

    Both seeds and problems are samples: the variance of the mean is that of two crossed factors,
    (MS_seeds + MS_problems - MS_rest) / n, and never less than either alone; degrees of freedom by
    Satterthwaite.
    """
    S, P = differences.shape
    mean, by_seed, by_problem = (
        differences.mean(),
        differences.mean(axis=1),
        differences.mean(axis=0),
    )
    problems = S * by_problem.var(ddof=1) / (S * P)  # each a variance of the mean
    if S == 1:
        return mean, mean - 1.96 * problems**0.5, mean + 1.96 * problems**0.5
    seeds = P * by_seed.var(ddof=1) / (S * P)
    rest = differences - by_seed[:, None] - by_problem + mean
    rest = (rest**2).sum() / ((S - 1) * (P - 1)) / (S * P)
    variance = max(seeds + problems - rest, seeds, problems)
    if variance == 0:
        return mean, mean, mean
    parts = ((seeds, S - 1), (problems, P - 1), (rest, (S - 1) * (P - 1)))
    df = variance**2 / sum(part**2 / n for part, n in parts)
    half = quantile(df) * variance**0.5
    return mean, mean - half, mean + half


def unpacked(text: str) -> np.ndarray:
    count, _, digits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count)).astype(
        float
    )


def outcomes(problems: list[dict], key: str, **where) -> dict[str, np.ndarray]:
    """{seed: value of every problem}; a model that is not trained has no seed: ""."""
    if key in DIFFERENCES:
        first, second = (outcomes(problems, k, **where) for k in DIFFERENCES[key])
        return {seed: second[seed] - first[seed] for seed in first}
    rows = of(problems, key=key, **where)
    return {"" if row["steps"] == "0" else row["seed"]: unpacked(row["bits"]) for row in rows}


def compare(a: dict, b: dict | None, where=None) -> tuple[int, tuple] | None:
    """(seeds, `effect`) of two methods' outcomes, paired by seed; one that is not trained is the
    same for all seeds.

    b None: nothing. where: which problems; default: all. None if there is nothing to compare, or
        just one seed.
    """
    b = {seed: np.zeros_like(values) for seed, values in a.items()} if b is None else b
    both, either = {*a} & {*b}, {*a} | {*b}
    seeds = sorted(both if "" in both or "" not in either else either - {""})
    if not seeds or len(seeds) == 1 and "" not in seeds:
        return None
    differences = np.array([a.get(seed, a.get("")) - b.get(seed, b.get("")) for seed in seeds])
    return len(seeds), effect(differences if where is None else differences[:, where])


def effects(problems: list[dict]) -> list[tuple]:
    """(base, claim, steps, mode, seeds, difference, low, high) in points, of every claim whose runs
    are there."""
    found = []
    for base in dict.fromkeys(row["base"] for row in problems):
        for claim, one, other, key, steps in CLAIMS:
            for mode in ("greedy", "sampled"):
                sides = [m and outcomes(problems, key, base=base, method=m, mode=mode, row="", steps=n)
                         for m in (one, other) for n in [0 if m in ("base", "Self-Refine") else steps]]  # fmt: skip
                found.append((base, claim, steps, mode, compare(*sides)))
    for claim, (one, row_one), (other, row_other), key in RRR_CLAIMS:
        for mode in ("greedy", "sampled"):
            kind = "acc_t2" if key == "retry" else key
            sides = [outcomes(problems, kind, base="tiny", method=m, mode=mode, row=row)
                     for m, row in ((one, row_one), (other, row_other))]  # fmt: skip
            first = outcomes(problems, "acc_t1", method="base, RRR", mode=mode, row="")
            wrong = next(iter(first.values())) == 0 if key == "retry" and first else None
            found.append(("tiny", claim, "", mode, compare(*sides, wrong)))
    return [(*head, result[0], *(100 * x for x in result[1])) for *head, result in found if result]


def takeoff_table(curves: list[dict], base: str, gain: float = 0.05) -> str:
    """When each seed's Delta on validation is first above `gain`: who escapes the collapse, and how
    soon."""
    lines = [
        f"| Delta above {100 * gain:g} points first after so many steps | of | each seed |",
        "|---|---|---|",
    ]
    for method in (*TABLE2[:5], "Pair-SFT, D+", "STaR, D+"):
        rows = of(curves, base=base, method=method)
        for steps in sorted({int(row["steps"]) for row in rows}):
            seeds = {}
            for row in of(rows, steps=steps):
                seeds.setdefault(row["seed"], []).append((steps_done(row), eval_delta(row)))
            first = [
                next((n for n, delta in seen if delta != "" and delta > gain), "never")
                for seen in seeds.values()
            ]
            lines.append(f"| {method} | {steps} | {', '.join(map(str, first))} |")
    return "\n".join(lines)


def plain_table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"] if rows else []
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def effects_table(rows: list[tuple]) -> str:
    lines = [
        "| base | claim | steps | | seeds | difference, points | 95 % interval | stands |",
        "|---" * 8 + "|",
    ]
    for base, claim, steps, mode, seeds, mean, low, high in rows:
        stands = "yes" if low > 0 else "no, the opposite does" if high < 0 else "no"
        interval = f"{low:+.1f} to {high:+.1f}"
        lines.append(
            f"| {base} | {claim} | {steps} | {mode} | {seeds} | {mean:+.1f} | {interval} | {stands} |"
        )
    return "\n".join(lines)


def plot(path: Path, panels: list[tuple], columns: int = 0) -> None:
    """panels: (title, x label, y label, {label: [lines of (x, y)]}, boundary); a thick line is the
    mean of several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if any(panel[3].values())]
    if not panels:
        return
    columns = min(columns or len(panels), len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.8 * columns, 3.6 * height), squeeze=False, sharey="row"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, x_label, y_label, curves, boundary) in zip(axes.flat, panels):
        for number, (label, lines) in enumerate(curves.items()):
            color, style = f"C{number % 10}", "-" if number < 10 else "--"
            for x, y in lines if len(lines) > 1 else []:
                axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            if lines:
                length = min(len(y) for _, y in lines)
                mean = np.mean([y[:length] for _, y in lines], axis=0)
                x = np.mean([x[:length] for x, _ in lines], axis=0)
                axis.plot(
                    x,
                    mean,
                    style,
                    color=color,
                    label=label,
                    marker="o" if length < 12 else None,
                    markersize=3,
                )
        if boundary:
            axis.axvline(boundary, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.2)
        beside = {"bbox_to_anchor": (1, 1), "loc": "upper left"} if len(curves) > 5 else {}
        axis.legend(fontsize=7, **beside)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lines_of(rows: list[dict], x, y, scale=1.0) -> list[tuple]:
    """A line (x, y) for each seed; x: a function of the row; y: that, or a column."""
    value = (lambda row: row[y] and float(row[y])) if isinstance(y, str) else y
    seeds = {}
    for row in rows:
        if value(row) != "":
            seeds.setdefault(row["seed"], []).append((scale * float(x(row)), 100 * value(row)))
    return [tuple(np.array(points).T) for points in seeds.values()]


def steps_done(row: dict) -> int:
    """A step's number is that of the steps before it."""
    return int(row["step"]) + 1


def eval_delta(row: dict):
    """Rounded, since a Delta of exactly 5 points is not above 5."""
    return (
        round(float(row["eval_acc_t2"]) - float(row["eval_acc_t1"]), 4)
        if row["eval_acc_t2"]
        else ""
    )


def draw_training(results: Path, curves: list[dict]) -> None:
    panels = []
    for steps in (160, 320, 640):
        for method in ("SCoRe", "no Stage I", "no bonus", "multi-turn RL"):
            rows = of(curves, base="tiny", method=method, steps=steps)
            boundary = max((steps_done(row) for row in rows if row["stage"] == "1"), default=0)
            attempts = {"first attempt": "acc_t1", "second attempt": "acc_t2"}
            lines = {label: lines_of(rows, steps_done, key) for label, key in attempts.items()}
            panels.append(
                (
                    f"{method}, {steps} steps",
                    "step",
                    "right in the training batch, %",
                    lines,
                    boundary,
                )
            )
    plot(results / "training.png", panels, 4)


def draw_rollouts(results: Path, curves: list[dict]) -> None:
    panels = []
    longest = {
        m: max(int(r["steps"]) for r in curves if r["method"] == m)
        for m in {r["method"] for r in curves}
    }
    for label, y in (("Acc@t2", "eval_acc_t2"), ("Delta", eval_delta)):
        lines = {m: lines_of(of(curves, base="tiny", method=m, steps=longest[m]), steps_done, y, ROWS)
                 for m in (*TABLE1[2:], "no Stage I", "no bonus") if m in longest}  # fmt: skip
        panels.append((label, "rows trained on", "validation, T = 1, %", lines, 0))
    plot(results / "rollouts.png", panels, 1)


def draw_more(results: Path, more: list[dict], curves: list[dict]) -> None:
    def of_kind(kind, methods=TABLE1):
        return {
            m: lines_of(of(more, base="tiny", method=m, kind=kind), lambda row: row["x"], "value")
            for m in methods
        }

    edits = [(m, "edit distance / both lengths", "attempts, %", {m: lines}, 0)
             for m, lines in of_kind("edit_ratio").items() if lines]  # fmt: skip
    plot(results / "edits.png", edits, 3)
    plot(
        results / "attempts.png",
        [("T = 1", "attempts in a row", "right, %", of_kind("attempts"), 0)],
    )
    votes = [(m, "answers a problem", "majority right, %",
              {kind: of_kind(f"vote_{kind}", [m])[m] for kind in ("parallel", "corrected")}, 0)
             for m in ("base", "multi-turn RL", "SCoRe")]  # fmt: skip
    plot(results / "votes.png", votes)
    betas = {"beta1 0.0125": 0.0125, "SCoRe": 0.05, "beta1 0.2": 0.2, "beta1 0.8": 0.8}
    frontier = {}
    for method, beta in betas.items():
        last = {
            row["seed"]: row for row in of(curves, base="tiny", method=method, steps=320)
        }.values()
        points = [
            (float(r["kl_t1"]) + float(r["kl_t2"]), 100 * float(r["reward"]))
            for r in last
            if r["kl_t2"]
        ]
        frontier[f"beta1 = {beta}"] = [(np.array([x]), np.array([y])) for x, y in points]
    shown = (
        "SCoRe, 320 steps",
        "KL of both attempts, nats",
        "their reward, last 10 steps, %",
        frontier,
        0,
    )
    plot(results / "frontier.png", [shown])


def draw_rrr(results: Path, curves: list[dict]) -> None:
    panels = []
    for method in ("RRR", "RRR, loose", "RRR, loose, retry rewarded", "RRR, loose, both rewarded"):
        keys = {"first attempt": "eval_acc_t1", "retry after a failure": "eval_retry_given_failure"}
        lines = {
            label: lines_of(of(curves, method=method), steps_done, key)
            for label, key in keys.items()
        }
        length = lambda row: (
            row["eval_reflection_tokens"] and float(row["eval_reflection_tokens"]) / 100
        )  # noqa: E731
        lines["tokens of a reflection"] = lines_of(of(curves, method=method), steps_done, length)
        panels.append((method, "step", "validation, T = 1, %", lines, 0))
    plot(results / "rrr.png", panels, 2)


def render(results: Path) -> None:
    """All there is to see, of what the CSVs have; the tables are printed too."""
    figures, curves, more, problems = (
        read_csv(results / f"{name}.csv") for name in ("figures", "curves", "more", "problems")
    )
    short = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "well_formed")
    tables = {}
    for base in dict.fromkeys(row["base"] for row in figures):
        where = {"base": base, "row": ""}
        tables[f"methods ({base})"] = table(figures, TABLE1, (*KEYS[:9], "seconds"), **where)
        tables[f"ablations ({base})"] = table(figures, TABLE2, short, **where)
    retries = ("acc_t1", "retry_given_failure", "acc_t2", "well_formed_retry", "reflection_tokens")
    names = dict.fromkeys(row["method"] for row in figures if "RRR" in row["method"])
    tables["RRR, own failures"] = table(figures, names, retries, row="")
    for row in dict.fromkeys(row["row"] for row in figures if row["row"]):
        tables[f"after the base's failures: {row}"] = table(figures, names, retries[1:4:2], row=row)
    tables |= {
        f"take-off ({base})": takeoff_table(curves, base)
        for base in dict.fromkeys(r["base"] for r in curves)
    }
    tables["effects"] = effects_table(effects(problems))
    tables |= {name: plain_table(read_csv(results / f"{name}.csv")) for name in ("noise", "tuning")}
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in tables.items()) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / "tables.md").write_text(text)
    print(text)
    draw_training(results, curves)
    draw_rollouts(results, curves)
    draw_more(results, more, curves)
    draw_rrr(results, curves)
