"""The CSVs of `reproduce.py`, and from them alone its tables and effect sizes, tables.md.

python bench/papers/reproduce.py --render
"""

import csv
from pathlib import Path

import numpy as np

from claims import CLAIMS, RRR_CLAIMS
from plan import TABLE1, TABLE2

IDENTITY = ("base", "method", "steps", "seed", "lr")
KEYS = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "edit_ratio", "well_formed",
        "tokens", "retry_given_failure", "well_formed_retry", "reflection_tokens")  # fmt: skip
FIGURES = tuple(name for key in KEYS for name in (key, key + "_se"))
MEANS = ("reward", "acc_t1", "acc_t2", "kl_t1", "kl_t2", "entropy")  # over BIN steps
LAST = ("eval_acc_t1", "eval_acc_t2", "eval_retry_given_failure", "eval_reflection_tokens",
        "eval_well_formed")  # fmt: skip
CURVES = ("stage", "step", *MEANS, *LAST)
BIN = 10
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
        last = [[row[key] for row in some if key in row][-1:] for key in LAST]
        cells = [f"{np.mean(x):.4g}" if x else "" for x in (*means, *last)]
        rows.append([some[0]["stage"], some[-1]["step"], *cells])
    return rows


def of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def estimate(rows: list[dict], key: str) -> tuple[float, float] | None:
    """(mean, standard error) over seeds and the problems that they share; one run: over problems.

    In per cent, but for COUNTS; None if no row has the figure.
    """
    scale = 1 if key in COUNTS else 100
    values = [scale * float(row[key]) for row in rows if row[key]]
    if not values:
        return None
    errors = [scale * float(row[key + "_se"]) for row in rows if row.get(key + "_se")]
    over_seeds = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    error = (over_seeds**2 + (np.mean(errors) if errors else 0) ** 2) ** 0.5
    return np.mean(values), error


def mean_and_error(rows: list[dict], key: str) -> str:
    if (found := estimate(rows, key)) is None:
        return ""
    return f"{found[0]:.0f}" if key == "seconds" else f"{found[0]:.1f} ± {found[1]:.1f}"


def table(figures: list[dict], methods, columns, **where) -> str:
    """Markdown: a line for each method, number of steps and mode."""
    lines = ["| % | steps | seeds | | " + " | ".join(columns) + " |"]
    lines += ["|---" * (len(columns) + 4) + "|"]
    for method in methods:
        rows = of(figures, method=method, **where)
        for steps in sorted({int(row["steps"]) for row in rows}):
            for mode in ("greedy", "sampled"):
                cells = of(rows, steps=steps, mode=mode)
                text = " | ".join(mean_and_error(cells, key) for key in columns)
                lines.append(f"| {method} | {steps or ''} | {len(cells)} | {mode} | {text} |")
    return "\n".join(lines)


def quantile(df: float) -> float:
    """The 97.5 % point of Student's t.

    Cornish-Fisher; below 3 degrees of freedom that of the whole number below.
    """
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
    mean, by_seed = differences.mean(), differences.mean(axis=1)
    by_problem = differences.mean(axis=0)
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
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    return np.unpackbits(packed, count=int(count)).astype(float)


def outcomes(problems: list[dict], key: str, **where) -> dict[str, np.ndarray]:
    """{seed: value of every problem}; a model that is not trained has no seed: ""."""
    if key in DIFFERENCES:
        first, second = (outcomes(problems, k, **where) for k in DIFFERENCES[key])
        return {seed: second[seed] - first[seed] for seed in first}
    rows = of(problems, key=key, **where)
    return {"" if row["steps"] == "0" else row["seed"]: unpacked(row["bits"]) for row in rows}


def compare(a: dict, b: dict | None, where=None) -> tuple[int, tuple] | None:
    """(seeds, `effect`) of two methods' outcomes, paired by seed.

    One that is not trained is the same for all seeds. b None: nothing. where: which problems;
    default: all. None if there is nothing to compare, or just one seed.
    """
    b = {seed: np.zeros_like(values) for seed, values in a.items()} if b is None else b
    both, either = {*a} & {*b}, {*a} | {*b}
    seeds = sorted(both if "" in both or "" not in either else either - {""})
    if not seeds or len(seeds) == 1 and "" not in seeds:
        return None
    differences = np.array([a.get(seed, a.get("")) - b.get(seed, b.get("")) for seed in seeds])
    return len(seeds), effect(differences if where is None else differences[:, where])


def effects(problems: list[dict]) -> list[tuple]:
    """Of every claim whose runs are there, in points: (base, claim, steps, mode, seeds, difference,
    low, high)."""
    found = []
    for base in dict.fromkeys(row["base"] for row in problems):
        for claim, one, other, key, steps in CLAIMS:
            for mode in ("greedy", "sampled"):
                same = {"base": base, "mode": mode, "row": ""}
                sides = [m and outcomes(problems, key, method=m, steps=steps_of(m, steps), **same)
                         for m in (one, other)]  # fmt: skip
                found.append((base, claim, steps, mode, compare(*sides)))
    for claim, *sides, key in RRR_CLAIMS:
        for mode in ("greedy", "sampled"):
            found.append(("tiny", claim, "", mode, rrr_effect(problems, sides, key, mode)))
    return [(*head, result[0], *(100 * x for x in result[1])) for *head, result in found if result]


def steps_of(method: str, steps: int) -> int:
    return 0 if method in ("base", "Self-Refine") else steps


def rrr_effect(problems: list[dict], sides: list[tuple], key: str, mode: str):
    """`compare` of two (method, row); key "retry": right at the second attempt, over the problems
    that the base gets wrong at the first."""
    same, kind = {"base": "tiny", "mode": mode}, "acc_t2" if key == "retry" else key
    found = [outcomes(problems, kind, method=m, row=row, **same) for m, row in sides]
    first = outcomes(problems, "acc_t1", method="base, RRR", row="", **same)
    return compare(*found, next(iter(first.values())) == 0 if key == "retry" and first else None)


def steps_done(row: dict) -> int:
    """A step's number is that of the steps before it."""
    return int(row["step"]) + 1


def eval_delta(row: dict) -> float | str:
    """Rounded, since a Delta of exactly 5 points is not above 5; "" without an evaluation."""
    if not row["eval_acc_t2"]:
        return ""
    return round(float(row["eval_acc_t2"]) - float(row["eval_acc_t1"]), 4)


def takeoff_table(curves: list[dict], base: str, gain: float = 0.05) -> str:
    """When each seed's Delta on validation is first above `gain`: who escapes the collapse, and how
    soon."""
    lines = [f"| Delta above {100 * gain:g} points first after so many steps | of | each seed |"]
    lines += ["|---|---|---|"]
    for method in (*TABLE2[:5], "Pair-SFT, D+", "STaR, D+"):
        rows = of(curves, base=base, method=method)
        for steps in sorted({int(row["steps"]) for row in rows}):
            seeds = {row["seed"]: "never" for row in of(rows, steps=steps)}
            for row in reversed(of(rows, steps=steps)):
                if eval_delta(row) != "" and eval_delta(row) > gain:
                    seeds[row["seed"]] = steps_done(row)
            lines.append(f"| {method} | {steps} | {', '.join(map(str, seeds.values()))} |")
    return "\n".join(lines)


def plain_table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"] if rows else []
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def effects_table(rows: list[tuple]) -> str:
    header = (
        "base",
        "claim",
        "steps",
        "",
        "seeds",
        "difference, points",
        "95 % interval",
        "stands",
    )
    lines = [f"| {' | '.join(header)} |".replace("|  |", "| |"), "|---" * len(header) + "|"]
    for *cells, mean, low, high in rows:
        stands = "yes" if low > 0 else "no, the opposite does" if high < 0 else "no"
        cells += [f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}", stands]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_tables(results: Path) -> None:
    """tables.md of what the CSVs in `results` have; printed too."""
    figures, curves, problems = (
        read_csv(results / f"{name}.csv") for name in ("figures", "curves", "problems")
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
    for base in dict.fromkeys(row["base"] for row in curves):
        tables[f"take-off ({base})"] = takeoff_table(curves, base)
    tables["effects"] = effects_table(effects(problems))
    tables |= {name: plain_table(read_csv(results / f"{name}.csv")) for name in ("noise", "tuning")}
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in tables.items()) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / "tables.md").write_text(text)
    print(text)
