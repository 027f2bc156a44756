"""Seeds of the default runs, on the test split: `python bench/seeds.py score` (or rrr), about 20 minutes on two cores.

Trains every method and seed at the same budget, two runs at a time with a thread each, and goes on where it was
stopped. Writes results/NAME.csv (test figures of every run), results/NAME_steps.csv (training, a line a step) and
results/NAME.png, and prints the table of means over seeds. `--render` draws from the CSVs alone.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rrr  # noqa: E402
from evaluate import compare_after_failure, evaluate_both, prepare  # noqa: E402
from flags import flag, parse_args  # noqa: E402
from policy import load_model  # noqa: E402
from sampler import Sampler  # noqa: E402

METHODS = {
    "score": {
        "SCoRe": ["score.py"],
        "multi-turn RL": ["score.py", "--stage1_steps", "0", "--stage2_steps", "320", "--alpha", "0"],
    },
    "rrr": {"RRR": ["rrr.py"]},
}
STEP_COLUMNS = ("stage", "step", "reward", "acc_t1", "acc_t2", "kl_t1", "kl_t2", "kl_t3", "entropy", "grad_norm",
                "eval_acc_t1", "eval_acc_t2", "eval_retry_given_failure", "eval_reflection_tokens", "eval_well_formed",
                "seconds_rollout", "seconds_update")  # fmt: skip


@dataclass
class Config:
    seeds: int = flag(3, "seeds 0, 1, ... of each method")
    render: bool = flag(False, "only print the table and draw the picture from the CSVs")


def run_directory(name: str, method: str, seed: int) -> Path:
    return ROOT / "runs" / "seeds" / f"{name}-{method.replace(' ', '_')}-{seed}"


def train(name: str, method: str, seed: int) -> None:
    run = run_directory(name, method, seed)
    if (run / "results.json").exists():
        return
    command = [sys.executable, *METHODS[name][method], "--seed", str(seed), "--output_dir", str(run)]
    command += ["--resume"] if (run / "config.json").exists() else []
    with open(f"{run}.log", "a") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_figures(name: str, directory: str) -> dict:
    """{row: {greedy, sampled}} on the test split, of one model (SCoRe) or against the base with controls (RRR)."""
    config = rrr.Config(model=str(ROOT / "models" / "tiny"))
    task, base, tokenizer, splits = prepare(config, {"test": None})
    shared = (tokenizer, task, *zip(*splits["test"], strict=True), config)
    model = Sampler(load_model(directory)[0], tokenizer)
    if name == "score":
        return {"trained": evaluate_both(model, *shared)}
    own, is_base = evaluate_both(model, *shared, method="reflect_retry"), directory == config.model
    controls = compare_after_failure(base, model, *shared)
    return {"trained": own} | {row: modes for row, modes in controls.items() if row.startswith("base,") == is_base}


def collect(name: str, seeds: int) -> None:
    """All runs' test figures and training steps into two CSVs."""
    figures, steps = [], []
    jobs = [("base", 0, ROOT / "models" / "tiny")]
    jobs += [(m, s, run_directory(name, m, s) / "checkpoint") for m in METHODS[name] for s in range(seeds)]
    for method, seed, directory in jobs:
        for row, modes in test_figures(name, str(directory)).items():
            for mode, values in modes.items():
                figures += [(method, seed, row, mode, key, f"{value:.5f}") for key, value in values.items()]
        metrics = directory.parent / "metrics.jsonl"
        for line in metrics.read_text().splitlines() if method != "base" else []:
            values = json.loads(line)
            steps.append([method, seed, *(f"{values[c]:.4g}" if c in values else "" for c in STEP_COLUMNS)])
    write_csv(ROOT / "results" / f"{name}.csv", ("method", "seed", "row", "mode", "key", "value"), figures)
    write_csv(ROOT / "results" / f"{name}_steps.csv", ("method", "seed", *STEP_COLUMNS), steps)
    if name == "rrr":
        shutil.copy(run_directory(name, "RRR", 0) / "reflections.txt", ROOT / "results" / "rrr_reflections.txt")


def write_csv(path: Path, header, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mean_and_error(cells: list[dict], key: str) -> str:
    """Mean ± standard error over seeds and the problems, which all seeds share; of one run, over problems."""
    scale = 1 if key == "reflection_tokens" else 100
    values = [scale * float(c["value"]) for c in cells if c["key"] == key]
    if not values:
        return ""
    errors = [scale * float(c["value"]) for c in cells if c["key"] == key + "_se"]
    over_seeds = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    error = (over_seeds**2 + np.mean(errors) ** 2) ** 0.5
    return f"{np.mean(values):.1f} ± {error:.1f}"


def table(name: str, columns: tuple[str, ...]) -> str:
    rows = read_csv(ROOT / "results" / f"{name}.csv")
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["row"], row["mode"]), []).append(row)
    lines = ["| % | " + " | ".join(("", *columns)) + " |", "|---" * (len(columns) + 2) + "|"]
    for (method, row, mode), cells in groups.items():
        label = method if row == "trained" else row
        lines.append(f"| {label} | {mode} | " + " | ".join(mean_and_error(cells, key) for key in columns) + " |")
    return "\n".join(lines)


def picture(name: str, curves: dict[str, str], smooth: int = 20) -> None:
    """Mean over seeds of some columns of NAME_steps.csv, a thin line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_csv(ROOT / "results" / f"{name}_steps.csv")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(methods), figsize=(5.2 * len(methods), 3.6), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for (key, label), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=False):
            seeds = {}
            for row in rows:
                if row["method"] == method and row[key]:
                    seeds.setdefault(row["seed"], []).append((int(row["step"]), 100 * float(row[key])))
            smoothed = []
            for points in seeds.values():
                step, value = np.array(points).T
                width = min(smooth, len(value)) if len(value) > smooth else 1
                smoothed.append(np.convolve(value, np.ones(width) / width, "valid"))
                axis.plot(step[width - 1 :], smoothed[-1], color=color, alpha=0.25, linewidth=0.8)
            axis.plot(step[width - 1 :], np.mean(smoothed, axis=0), color=color, label=label)
        boundary = sum(row["stage"] == "1" for row in rows if row["method"] == method and row["seed"] == "0")
        if 0 < boundary < len(step):
            axis.axvline(boundary, color="gray", linestyle=":", linewidth=1)
        axis.set(title=method, xlabel="step", ylabel="right, %" if axis is axes[0][0] else "")
        axis.grid(alpha=0.2)
    axes[0][0].legend(loc="best")
    figure.tight_layout()
    figure.savefig(ROOT / "results" / f"{name}.png", dpi=110)


def main(name: str, config: Config) -> None:
    if not config.render:
        (ROOT / "runs" / "seeds").mkdir(parents=True, exist_ok=True)
        jobs = [(name, method, seed) for seed in range(config.seeds) for method in METHODS[name]]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: train(*job), jobs))
        collect(name, config.seeds)
    if name == "score":
        print(table(name, ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "well_formed")))
        picture(name, {"acc_t1": "first attempt", "acc_t2": "second attempt"})
    else:
        print(table(name, ("acc_t1", "retry_given_failure", "acc_t2", "well_formed_retry", "reflection_tokens")))
        picture(name, {"eval_acc_t1": "first attempt", "eval_retry_given_failure": "retry after a failure"})


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in METHODS:
        sys.exit(f"usage: python bench/seeds.py {'|'.join(METHODS)} [--seeds N] [--render]")
    torch.set_num_threads(2)
    main(sys.argv[1], parse_args(Config, sys.argv[2:]))
