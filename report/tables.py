"""Figures and conversations as text: Markdown tables, transcripts, reflections side by side."""

import json

from report.figures import COLUMNS, REWARDS, reward_of


def format_table(results: dict, columns=COLUMNS) -> str:
    """{name: {greedy, sampled: figures}} as a Markdown table in per cent, ± standard error."""
    found = {name for modes in results.values() for figures in modes.values() for name in figures}
    columns = (*columns, *(name for name in REWARDS if name in found))
    lines = ["| % | | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, modes in results.items():
        for mode, figures in modes.items():
            cells = [_in_percent(figures, c) if c in figures else "" for c in columns]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _in_percent(figures: dict, key: str) -> str:
    return f"{100 * figures[key]:.1f} ± {100 * figures[key + '_se']:.1f}"


def format_votes(figures: dict) -> str:
    """The figures of `votes` as a Markdown table."""
    keys = [key for key in figures if key.startswith("vote_parallel_") and key[-1] != "e"]
    lines = ["| answers | all in parallel | half, each with a correction |", "|---|---|---|"]
    for budget in (key.rpartition("_")[2] for key in keys):
        kinds = (_in_percent(figures, f"vote_{k}_{budget}") for k in ("parallel", "corrected"))
        lines.append(f"| {budget} | " + " | ".join(kinds) + " |")
    return "\n".join(lines)


def format_transcripts(talks: list[dict], count: int = 4) -> str:
    """The first few conversations, a line an attempt, marked right or wrong."""
    lines = []
    for talk in talks[:count]:
        lines.append(json.dumps(talk["problem"]))
        for turn, attempt in enumerate(talk["attempts"]):
            if 0 < turn <= len(talk["said"]):
                lines.append(f"  {talk['said'][turn - 1]}")
            text = attempt["text"].replace("\n", "\n    ")
            lines.append(f"  {verdict(attempt)}: {text}")
    return "\n".join(lines)


def verdict(attempt: dict) -> str:
    """right, wrong, or a part of a reward."""
    reward = reward_of(attempt)
    return f"{reward:.3g}" if 0 < reward < 1 else "right" if attempt["right"] else "wrong"


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
