"""The page of rollouts: what was said, how it was judged, and what every token got for it.

`page.html` with its script, its style and its data in it: one file, without a server or a network.
A training run keeps some rollouts of its first step, of every step that is evaluated and of its
last in rollouts.jsonl, and has them in rollouts.html; `evaluate.py --html FILE` has its
conversations.

A row is {step, turns}, a turn {told, said, reward, cut, measures}: told is text, said the pieces of
text that the sampled tokens are, and each measure a number a piece (`MEASURES`).
"""

import json
import math
import re
from pathlib import Path

from report.figures import reward_of

KEPT = 64  # rollouts of a step: those of the first problems, of the first rank
SHOWN = 2000  # rollouts on a page; of more, as many of each step
ROOM = 100_000_000  # characters on a page, which browsers still open within seconds
MEASURES = ("advantage", "log_ratio", "kl", "logprob")  # the page's names for them stand in it


def keep(run: Path, about: str, tokenizer, step: int, batch, scores) -> None:
    """Adds a step's rollouts to the run's rollouts.jsonl, and writes its page anew.

    about: the run, a few words for the page's head.
    """
    rows = rows_of(tokenizer, step, batch, scores)
    with open(run / "rollouts.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    write_run_page(run, about)


def rows_of(tokenizer, step: int, batch, scores) -> list[dict]:
    """Of a `training.policy.Batch` and its `loss.Scores`, tensors of (B, T)."""
    ratio = scores.logprobs - scores.ref_logprobs
    measured = zip(MEASURES, (batch.advantages, ratio, scores.kl, scores.logprobs), strict=True)
    measured = {name: values[:KEPT].tolist() for name, values in measured}
    per_row = (batch.rollout.ids, batch.rollout.turn, batch.scored)
    rewards, stopped = batch.rewards, batch.rollout.stopped[:KEPT].cpu()
    rewards = stopped * math.nan if rewards is None else rewards[:KEPT].cpu()
    rows = []
    for row, (ids, turn, said) in enumerate(zip(*(x[:KEPT].tolist() for x in per_row))):
        turns = []
        for number in range(stopped.shape[1]):
            mine = [t for t in range(len(ids)) if turn[t] == number]
            spoken = [t for t in mine if said[t]]
            told = [ids[t] for t in mine if not said[t]]
            values = {name: [x[row][t] for t in spoken] for name, x in measured.items()}
            judged = float(rewards[row, number]), bool(stopped[row, number])
            turns.append(turn_of(tokenizer, told, [ids[t] for t in spoken], *judged, values))
        rows.append({"step": step, "turns": turns})
    return rows


def turn_of(tokenizer, told, said, reward: float | None, stopped: bool, values: dict) -> dict:
    """told, said: ids. reward: None or NaN where nobody judges; values: {measure: one a token}."""
    reward = None if reward is None or math.isnan(reward) else reward  # not rounded: 1 is right
    turn = {"told": tokenizer.decode(told, clean_up_tokenization_spaces=False)}
    turn |= {"said": pieces_of(tokenizer, said), "reward": reward, "cut": not stopped}
    return turn | {name: [rounded(x) for x in numbers] for name, numbers in values.items()}


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds; "" for one that ends within a letter, which the next one has.

    A token's text depends on the one before it (a space between words), not on earlier ones.
    """

    def text(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    pieces, first, done, before = [], 0, 0, ""
    for end in range(1, len(ids) + 1):
        now = text(first, end)
        if now.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        first, done = done, end
        before = text(first, done)
    return pieces


def rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def row_of_talk(tokenizer, talk: dict) -> dict:
    """Of a conversation whose ids were kept (training/methods.py)."""
    spoken = [turn for context in talk["contexts"] for turn in context]
    attempts, turns = talk["attempts"], []
    each = 1 if len(spoken) == len(attempts) else 2  # a reflection between two attempts
    for number, (told, said, stopped, *logprobs) in enumerate(spoken):
        reward = None if number % each else reward_of(attempts[number // each])
        values = {"logprob": logprobs[0]}
        if len(logprobs) == 2:  # the reference's too
            values["log_ratio"] = [a - b for a, b in zip(*logprobs, strict=True)]
        if not any(logprobs[0]):  # given by the data, and not sampled
            values = {}
        turns.append(turn_of(tokenizer, told, said, reward, stopped, values))
    return {"turns": turns}


def pairs_of(earlier: list[dict], later: list[dict]) -> list[dict]:
    """Two models' reflections on the same failures, from conversations in the same order."""

    def half(talk: dict) -> dict:
        retry = talk["attempts"][1]
        return {"said": talk["said"][0], "retry": retry["text"], "right": bool(retry["right"])}

    return [
        {
            "asked": json.dumps(before["problem"], ensure_ascii=False),
            "failed": before["attempts"][0]["text"],
            "before": half(before),
            "after": half(after),
        }
        for before, after in zip(earlier, later, strict=True)
        if before["said"]
    ]


def write_run_page(run: Path, about: str, pairs: list[dict] = ()) -> None:
    """rollouts.html of what is in rollouts.jsonl, if anything is."""
    path = run / "rollouts.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = thinned(text.split("\n")[:-1])
    write_page(run / "rollouts.html", f"{run.name}: rollouts", about, lines, pairs)


def thinned(lines: list[str]) -> list[str]:
    """The first rows of each step, as JSON, so that they have room on a page."""
    by_step = {}
    for line in lines:
        by_step.setdefault(re.match(r'{"step": (\d+)', line)[1], []).append(line)
    length = sum(len(line) for line in lines) / max(1, len(lines))
    each = max(1, int(min(SHOWN, ROOM / max(1, length)) / max(1, len(by_step))))
    return [line for some in by_step.values() for line in some[:each]]


def write_page(path: Path, title: str, about: str, rows: list[str], pairs: list[dict] = ()) -> None:
    """rows: each as JSON."""
    head = json.dumps({"title": title, "about": about, "pairs": [*pairs][:SHOWN]})
    data = f'{head[:-1]}, "rows": [{",".join(rows)}]}}'.replace("<", "\\u003c")  # ends no script
    page = re.split("STYLE|DATA|SCRIPT", part(".html"))
    text = "".join((page[0], part(".css"), page[1], data, page[2], part(".js"), page[3]))
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def part(suffix: str) -> str:
    return Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")
