"""The page of rollouts: what was said, how it was judged, and what every token got for it.

`page.html` with its data in it: one file, without a server or a network. A training run keeps some
rollouts of its first step, of every step that is evaluated and of its last in rollouts.jsonl, and
has them in rollouts.html; `evaluate.py --html FILE` has its conversations.

A row is {step, turns}, a turn {told, said, reward, measures}: told is text, said the pieces of text
that the sampled tokens are, and each measure a number a piece (`MEASURES`).
"""

import json
import math
from pathlib import Path

KEPT = 64  # rollouts of a step: those of the first problems, of the first rank
SHOWN = 2000  # rollouts on a page; of more, as many of each step
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
    rows, turns = [], batch.rollout.stopped.shape[1]
    rewards = [[math.nan] * turns] * KEPT if batch.rewards is None else batch.rewards.tolist()
    for row, (ids, turn, said) in enumerate(zip(*(x[:KEPT].tolist() for x in per_row))):
        found = []
        for number, reward in enumerate(rewards[row]):
            places = [
                [t for t in range(len(ids)) if turn[t] == number and said[t] == s] for s in (0, 1)
            ]
            told, spoken = ([ids[t] for t in some] for some in places)
            values = {name: [x[row][t] for t in places[1]] for name, x in measured.items()}
            found.append(turn_of(tokenizer, told, spoken, reward, values))
        rows.append({"step": step, "turns": found})
    return rows


def turn_of(
    tokenizer, told: list[int], said: list[int], reward: float | None, values: dict
) -> dict:
    """reward: None or NaN where nobody judges; values: {measure: a number a token}."""
    turn = {"told": tokenizer.decode(told, clean_up_tokenization_spaces=False)}
    turn |= {"said": pieces_of(tokenizer, said), "reward": rounded(reward)}
    return turn | {name: [rounded(x) for x in numbers] for name, numbers in values.items()}


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds; "" for one that ends within a letter, which the next one has.

    A token's text depends on the one before it (a space between words), not on earlier ones.
    """
    pieces, first, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = (
            tokenizer.decode(ids[first:stop], clean_up_tokenization_spaces=False)
            for stop in (done, end)
        )
        if now.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        first, done = done, end
    return pieces


def rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


def row_of_talk(tokenizer, talk: dict) -> dict:
    """Of a conversation whose ids were kept (training/methods.py)."""
    spoken = [turn for context in talk["contexts"] for turn in context]
    attempts, turns = talk["attempts"], []
    each = 1 if len(spoken) == len(attempts) else 2  # a reflection between two attempts
    for number, (told, said, *logprobs) in enumerate(spoken):
        reward = None if number % each else float(attempts[number // each]["right"])
        values = {"logprob": logprobs[0]}
        if len(logprobs) == 2:  # the reference's too
            values["log_ratio"] = [a - b for a, b in zip(*logprobs, strict=True)]
        turns.append(turn_of(tokenizer, told, said, reward, values))
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
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    write_page(run / "rollouts.html", f"{run.name}: rollouts", about, thinned(rows), pairs)


def thinned(rows: list[dict]) -> list[dict]:
    """The first rows of each step, so that there are no more than SHOWN."""
    by_step = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    each = max(1, SHOWN // max(1, len(by_step)))
    return [row for some in by_step.values() for row in some[:each]]


def write_page(
    path: Path, title: str, about: str, rows: list[dict], pairs: list[dict] = ()
) -> None:
    data = {"title": title, "about": about, "rows": rows, "pairs": [*pairs][:SHOWN]}
    text = json.dumps(data).replace("<", "\\u003c")  # no text can end the script that holds it
    template = Path(__file__).with_suffix(".html").read_text()
    before, after = template.split("DATA")
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(before + text + after, encoding="utf-8")
    fresh.replace(path)
