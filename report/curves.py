"""A run's learning curves as a picture, `curves.png`."""

import json
from pathlib import Path

import numpy as np


def plot_curves(run: Path, smooth: int = 10) -> None:
    """`curves.png` of a run, from metrics.jsonl: what it got right, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 4))
    curves = {"acc_t1": "first attempt", "acc_t2": "second attempt"}
    if not any("reward" in row for row in rows):  # imitation: no batch is an attempt of now
        curves = {f"eval_{key}": label for key, label in curves.items()}
    elif "acc_t1" not in rows[0]:
        curves = {"reward": "retry after a failure"}
    for key, label in curves.items():
        steps, values = (
            [i for i, row in enumerate(rows) if key in row],
            [row[key] for row in rows if key in row],
        )
        if values:
            width = 1 if key.startswith("eval") else min(smooth, len(values))
            mean = np.convolve(values, np.ones(width) / width, "valid") * 100
            axis.plot(steps[width - 1 :], mean, label=label)
    boundary = next((i for i, row in enumerate(rows) if row["stage"] == 2), 0)
    if boundary and "eval_acc_t1" not in curves:
        axis.axvline(boundary, color="gray", linestyle=":", label="Stage II begins")
    batch = (
        "validation"
        if "eval_acc_t1" in curves
        else f"the training batch (mean of the last {smooth})"
    )
    axis.set(xlabel="step", ylabel=f"right, % of {batch}")
    if axis.get_lines():
        axis.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=120)
    plt.close(figure)
