"""Which learning rates `reproduce.py` tries, and which one each method gets."""

import json
from pathlib import Path

import tables
from plan import GRID, LADDER, LIKE, METHODS, TUNED, TUNING_SEED, Experiment, Run

COMMITTED = Path(__file__).parent.parent.parent / "results" / "reproduce"


def score_of(results: dict, method: str) -> float:
    """What a learning rate is chosen by: Acc@t2 on validation, mean of greedy and T = 1.

    Single-turn RL is judged by Acc@t1, which is what it trains.
    """
    key = "acc_t1" if method == "single-turn RL" else "acc_t2"
    return sum(results["trained"][mode][key] for mode in ("greedy", "sampled")) / 2


def rates_due(scores: dict[float, float]) -> list[float]:
    """What is still to be tried: the grid, then the neighbours of the best."""
    due = [lr for lr in GRID if lr not in scores]
    at = LADDER.index(max(scores, key=scores.get, default=GRID[0]))
    return due or [lr for lr in LADDER[max(at - 1, 0) : at + 2] if lr not in scores]


def tuning_run(method: str, lr: float) -> Run:
    return Run("tiny", method, 250 if method == "RRR" else 320, TUNING_SEED, lr, tuning=True)


def tuning_rows(config, method: str, failed: list[str]) -> dict[float, list]:
    """{rate: row of tuning.csv}, of all that was tried. A run that failed has a score of -inf."""
    old = tables.read_csv(config.results / "tuning.csv") if config.missing else []
    old = tables.of(old, method=method)
    rows = {float(row["lr"]): [*row.values()] for row in old}
    for run in (tuning_run(method, lr) for lr in LADDER):
        path, cells = run.directory(config) / run.done, ["-inf", "", "", "", "", ""]
        if path.exists():
            results = json.loads(path.read_text())
            trained = results["trained"]
            figures = [trained[m][k] for m in ("greedy", "sampled") for k in ("acc_t1", "acc_t2")]
            cells = [f"{score_of(results, method):.5f}", "", *(f"{x:.5f}" for x in figures)]
        if path.exists() or str(run.directory(config)) in failed:
            rows[run.lr] = [method, f"{run.lr:g}", *cells]
    scores = {lr: float(row[2]) for lr, row in rows.items()}
    for lr, row in rows.items():
        row[3] = int(not rates_due(scores) and lr == max(scores, key=scores.get))
    return dict(sorted(rows.items()))


def tuning_runs(config, failed: list[str]) -> list[Run]:
    """Those that are due by what is known."""
    due = []
    for method in TUNED:
        rows = tuning_rows(config, method, failed)
        scores = {lr: float(row[2]) for lr, row in rows.items()}
        due += [tuning_run(method, lr) for lr in rates_due(scores)]
    return due


def tuned_as(method: str) -> str:
    """The method whose learning rate this one takes: its own, or that of the one that it varies."""
    return method if method in TUNED else LIKE.get(method, "SCoRe")


def chosen_rate(method: str, config) -> float | None:
    for path in (config.results, COMMITTED):
        for row in tables.read_csv(path / "tuning.csv"):
            if row["method"] == tuned_as(method) and row["chosen"] == "1":
                return float(row["lr"])
    return None


def learning_rate(method: str, config) -> float:
    """The chosen one; the script's default where none is chosen yet."""
    return chosen_rate(method, config) or (5e-4 if tuned_as(method) == "RRR" else 1.5e-4)


def require_rates(experiments: dict[str, Experiment], config) -> None:
    methods = {tuned_as(m) for e in experiments.values() for m in e.methods if m in METHODS}
    missing = sorted(m for m in methods if chosen_rate(m, config) is None)
    if missing and not config.quick:
        names = ", ".join(missing)
        raise ValueError(f"no learning rate is chosen yet for {names}: --only tune does it")
