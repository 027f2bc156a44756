"""Figures and conversations as text: Markdown tables, transcripts, reflections side by side."""

import json

from report.figures import COLUMNS


def format_table(results: dict, columns=COLUMNS) -> str:
    """`results` maps names to `greedy` and `sampled` to figures -> a Markdown table in percent, ±
    standard error."""
    lines = ["| % | | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, modes in results.items():
        for mode, figures in modes.items():
            cells = [
                f"{100 * figures[c]:.1f} ± {100 * figures[c + '_se']:.1f}" if c in figures else ""
                for c in columns
            ]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_votes(figures: dict) -> str:
    """The figures of `votes` as a Markdown table."""
    budgets = [
        int(key.rpartition("_")[2])
        for key in figures
        if key.startswith("vote_parallel_") and key[-1] != "e"
    ]
    lines = ["| answers | all in parallel | half, each with a correction |", "|---|---|---|"]
    for budget in budgets:
        cells = [
            (figures[f"vote_{k}_{budget}"], figures[f"vote_{k}_{budget}_se"])
            for k in ("parallel", "corrected")
        ]
        lines.append(
            f"| {budget} | " + " | ".join(f"{100 * v:.1f} ± {100 * e:.1f}" for v, e in cells) + " |"
        )
    return "\n".join(lines)


def format_transcripts(talks: list[dict], count: int = 4) -> str:
    """The first few conversations, a line an attempt, marked right or wrong."""
    lines = []
    for talk in talks[:count]:
        lines.append(json.dumps(talk["problem"]))
        for turn, attempt in enumerate(talk["attempts"]):
            if 0 < turn <= len(talk["said"]):
                lines.append(f"  {talk['said'][turn - 1]}")
            lines.append(f"  {'right' if attempt['right'] else 'wrong'}: {attempt['text']}")
    return "\n".join(lines)


def format_reflections(earlier: list[dict], later: list[dict], count: int = 20) -> str:
    """Two models' reflections on the same few failures, and the retries after them, as text."""
    lines = []
    for before, after in zip(earlier, later, strict=True):
        if before["said"] and len(lines) < 6 * count:
            lines += [json.dumps(before["problem"]), f"  wrong: {before['attempts'][0]['text']}"]
            for name, talk in (("before", before), ("after", after)):
                retry = talk["attempts"][1]
                lines += [
                    f"  {name}: {talk['said'][0]}",
                    f"    {'right' if retry['right'] else 'wrong'}: {retry['text']}",
                ]
    return "\n".join(lines) + "\n"
