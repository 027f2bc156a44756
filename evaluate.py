"""Two-attempt evaluation: `python evaluate.py --model DIR --task NAME --output FILE.json`.

The model answers, is asked to correct itself without being told whether it was right, and answers again. All figures
are the verifier's verdicts, never a shaped reward. As a library: `evaluate`, `summarize`, `format_table`,
`plot_curves`, which the training scripts share.

    acc_t1, acc_t2   right at the first, the second attempt      i_to_c   wrong, then right, of all problems
    delta            acc_t2 - acc_t1 = i_to_c - c_to_i           c_to_i   right, then wrong, of all problems
    changed          the two answers differ                      edit_ratio   edit distance / (len(y1) + len(y2))
    well_formed      attempts with an answer that can be graded  truncated    attempts cut off by the token limit
    tokens           sampled in both attempts
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from policy import context_length, exit_on_bad_input, flag, load_model, parse_args, row_seeds
from sampler import Sampler
from tasks import SPLITS, Task, first_turn_ids, follow_up_ids, get_task

COLUMNS = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "edit_ratio", "well_formed")


@dataclass
class Config:
    model: str = flag("models/tiny", "model directory or hub name")
    task: str = flag("tiny", "tiny or countdown")
    data: str | None = flag(None, "JSONL file of problems; default: the task's own")
    split: str = flag("validation", "train, validation or test (for final tables only)")
    limit: int | None = flag(None, "only the first so many problems")
    temperature: float = flag(0.0, "0 is greedy")
    samples: int = flag(1, "conversations a problem, at a temperature above 0")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    seed: int = flag(0, "seed of the sampling")
    output: str | None = flag(None, "JSON file for the figures and conversations")


def prepare(config, limits: dict[str, int | None]):
    """(task, model, tokenizer, {split: [(problem, prompt_ids)]}) for a script; any bad input is a ValueError here.

    `limits` names the splits and how many problems of each to take (None: all).
    """
    task = get_task(config.task)
    splits = {name: task.problems(name, config.data, config.seed)[:limit] for name, limit in limits.items()}
    model, tokenizer = load_model(config.model)
    for name, problems in splits.items():
        prompts = encode_prompts(model, tokenizer, task, problems, config.max_new_tokens)
        splits[name] = list(zip(problems, prompts, strict=True))
    return task, model, tokenizer, splits


def encode_prompts(model, tokenizer, task: Task, problems: list[dict], max_new_tokens: int) -> list[list[int]]:
    """First prompts as ids. A conversation of two attempts that can't fit the model's context is a ValueError."""
    seam = len(follow_up_ids(tokenizer, task.correct, [False])[0])
    prompts = [first_turn_ids(tokenizer, task.prompt(problem)) for problem in problems]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + 2 * max_new_tokens + seam > context_length(model):
        raise ValueError(
            f"problem {longest}: a prompt of {len(prompts[longest])} tokens and two attempts of {max_new_tokens} do "
            f"not fit the model's context of {context_length(model)}: lower --max_new_tokens or leave it out"
        )
    return prompts


def grade(tokenizer, task: Task, rollout, turn: int, problems: list[dict]) -> tuple[list[str], torch.Tensor]:
    """The text of every row's answer in `turn` and the verdict on it: (B,) strings, (B,) float32 of 0 and 1."""
    texts = tokenizer.batch_decode(rollout.completion_ids(turn))
    verdicts = [task.verify(text, problem) for text, problem in zip(texts, problems, strict=True)]
    return texts, torch.tensor(verdicts, dtype=torch.float32)


def evaluate(
    sampler, tokenizer, task: Task, problems, prompts, max_new_tokens, temperature, samples=1, seed=0
) -> tuple[dict, list[dict]]:
    """(figures, conversations) of two attempts at every problem; see the module's docstring for the figures."""
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    rows = [problem for problem in problems for _ in range(samples)]
    rollout = sampler.generate(prompts, samples, seeds=row_seeds(seed, 0, len(rows)), **limits)
    rollout = sampler.extend(rollout, follow_up_ids(tokenizer, task.correct, rollout.stopped[:, -1].tolist()), **limits)
    (first, right1), (second, right2) = (grade(tokenizer, task, rollout, turn, rows) for turn in (0, 1))
    answers = [[task.answer(text, p) for text, p in zip(t, rows, strict=True)] for t in (first, second)]
    ids = zip(rollout.completion_ids(0), rollout.completion_ids(1), strict=True)
    values = {
        "acc_t1": right1,
        "acc_t2": right2,
        "delta": right2 - right1,
        "i_to_c": (1 - right1) * right2,
        "c_to_i": right1 * (1 - right2),
        "changed": [a != b for a, b in zip(*answers, strict=True)],
        "edit_ratio": [edit_distance(a, b) / max(1, len(a) + len(b)) for a, b in ids],
        "well_formed": [(a is not None) / 2 + (b is not None) / 2 for a, b in zip(*answers, strict=True)],
        "truncated": 1 - rollout.stopped.float().mean(dim=1).cpu(),
        "tokens": rollout.action_mask.sum(dim=1).float().cpu(),
    }
    talks = zip(rows, first, right1.tolist(), second, right2.tolist(), strict=True)
    keys = ("problem", "first", "first_right", "second", "second_right")
    return summarize(values, samples), [dict(zip(keys, talk, strict=True)) for talk in talks]


def summarize(values: dict, samples: int = 1) -> dict:
    """Mean and standard error (`_se`) of each figure. `samples` rows a problem are averaged first: they are related."""
    figures = {}
    for name, rows in values.items():
        means = np.asarray(rows, dtype=np.float64).reshape(-1, samples).mean(axis=1)
        figures["n"] = len(means)
        figures[name] = float(means.mean())
        figures[name + "_se"] = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return figures


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance of two id sequences, a row of the table at a time."""
    b = np.asarray(b)
    steps = np.arange(len(b) + 1)
    row = steps
    for i, token in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != token))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


def evaluate_both(sampler, tokenizer, task, problems, prompts, max_new_tokens, seed=0) -> dict:
    """Figures under `greedy` and `sampled` (T = 1)."""
    shared = (sampler, tokenizer, task, problems, prompts, max_new_tokens)
    return {
        name: evaluate(*shared, temperature, seed=seed)[0] for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }


def format_table(results: dict) -> str:
    """`results` maps names to `greedy` and `sampled` to figures -> a Markdown table in percent, ± standard error."""
    lines = ["| % | | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, modes in results.items():
        for mode, figures in modes.items():
            cells = [f"{100 * figures[c]:.1f} ± {100 * figures[c + '_se']:.1f}" for c in COLUMNS]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_transcripts(conversations: list[dict], count: int = 4) -> str:
    """The first few conversations, a line an attempt, marked right or wrong."""
    lines = []
    for talk in conversations[:count]:
        lines.append(json.dumps(talk["problem"]))
        lines += [f"  {'right' if talk[k + '_right'] else 'wrong'}: {talk[k]}" for k in ("first", "second")]
    return "\n".join(lines)


def log_transcripts(run: Path, step: int, conversations: list[dict]) -> None:
    with open(run / "transcripts.txt", "a") as file:
        file.write(f"step {step + 1}\n{format_transcripts(conversations)}\n\n")


def report(run: Path, results: dict, count: int) -> None:
    """A run's end: results.json, curves.png, and the table of base and trained model."""
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_curves(run)
    print(f"\n{count} validation problems:\n\n{format_table(results)}\n\nrun: {run}")


def plot_curves(run: Path, smooth: int = 10) -> None:
    """`curves.png` of a run: Acc@t1 and Acc@t2 of its training batches, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 4))
    for key, label in (("acc_t1", "first attempt"), ("acc_t2", "second attempt")):
        values = np.array([row[key] for row in rows if key in row])
        if len(values):
            width = min(smooth, len(values))
            axis.plot(np.convolve(values, np.ones(width) / width, "valid") * 100, label=label)
    boundary = next((i for i, row in enumerate(rows) if row["stage"] == 2), 0)
    if boundary:
        axis.axvline(boundary, color="gray", linestyle=":", label="Stage II begins")
    axis.set(xlabel="step", ylabel=f"right, % of the training batch (mean of {smooth} steps)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=120)
    plt.close(figure)


def main(config: Config) -> None:
    with exit_on_bad_input():
        if config.split not in SPLITS:
            raise ValueError(f"--split {config.split}: choose one of {', '.join(SPLITS)}")
        if config.output and Path(config.output).exists():
            raise ValueError(f"--output {config.output} exists: name another file")
        task, model, tokenizer, splits = prepare(config, {config.split: config.limit})
    figures, conversations = evaluate(
        Sampler(model, tokenizer),
        tokenizer,
        task,
        *zip(*splits[config.split], strict=True),
        config.max_new_tokens,
        config.temperature,
        config.samples,
        config.seed,
    )
    print(format_transcripts(conversations))
    print(format_table({config.model: {"sampled" if config.temperature else "greedy": figures}}))
    if config.output:
        Path(config.output).write_text(json.dumps(figures | {"conversations": conversations}, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args(Config))
