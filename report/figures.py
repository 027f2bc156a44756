"""Figures of conversations: what is counted, averaged and voted on. No model here.

A conversation is a dict: the problem, its `attempts` (each a text with the answer in it, right or
wrong), what was `said` between them, and its `values`, of which a figure is the mean.

    acc_t1, acc_t2       right at the first, at the second attempt; acc_t3, ... with more of them
    delta                acc_t2 - acc_t1 = i_to_c - c_to_i
    i_to_c, c_to_i       wrong, then right; right, then wrong: both of all problems
    changed              the two answers differ
    edit_ratio           edit distance / (len(y1) + len(y2)), in tokens
    well_formed          attempts with an answer that can be graded
    truncated            attempts cut off by the token limit
    tokens               sampled for a problem, all told
    retry_given_failure  acc_t2 of those wrong at t1
    well_formed_retry    well_formed, of those retries
    reflection_tokens    of a reflection, without its stop token
    reward_t1, reward_t2 of tasks in a file of one's own: what their verify gives, parts and all
"""

from collections import Counter

import numpy as np

COLUMNS = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "edit_ratio", "well_formed")
REWARDS = ("reward_t1", "reward_t2")
AFTER_FAILURE = ("retry_given_failure", "well_formed_retry", "reflection_tokens")


def values_of(attempts: list[dict], said: list[list[int]], total: int) -> dict:
    """The values of one conversation, of `total` attempts.

    It may end early: the last answer stands for the rest. attempts: dicts with text, answer, right
    (0 or 1), ids, stopped. said: ids of the reflections and critiques.
    """
    stands = attempts + attempts[-1:] * (total - len(attempts))
    a, b = stands[0], stands[min(1, total - 1)]
    values = {f"acc_t{t}": y["right"] for t, y in enumerate(stands, 1)}
    values |= {
        "acc_t2": b["right"],
        "delta": b["right"] - a["right"],
        "i_to_c": (1 - a["right"]) * b["right"],
        "c_to_i": a["right"] * (1 - b["right"]),
        "changed": float(a["answer"] != b["answer"]),
        "edit_ratio": edit_distance(a["ids"], b["ids"]) / max(1, len(a["ids"]) + len(b["ids"])),
        "well_formed": sum(y["answer"] is not None for y in attempts) / len(attempts),
        "truncated": sum(not y["stopped"] for y in attempts) / len(attempts),
        "tokens": sum(len(y["ids"]) + y["stopped"] for y in attempts) + sum(map(len, said)),
        "well_formed_retry": float(b["answer"] is not None),
    }
    if "reward" in a:
        values |= {"reward_t1": a["reward"], "reward_t2": b["reward"]}
    return values | ({"reflection_tokens": len(said[0])} if said else {})


def reward_of(attempt: dict) -> float:
    """Of a conversation's attempt: its verdict, or what an own task's verify gave."""
    return float(attempt.get("reward", attempt["right"]))


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance of two id sequences, a row of the table at a time."""
    b = np.asarray(b)
    steps = np.arange(len(b) + 1)
    row = steps
    for i, token in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != token))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


def summarize(talks: list[dict], samples: int = 1) -> dict:
    """Mean and standard error (`_se`) of each value.

    `samples` conversations a problem are related, and come together. The figures of AFTER_FAILURE
    are over conversations that began with a wrong answer alone.
    """
    rows = [talk["values"] for talk in talks]
    wrong = np.array([1.0 - row["acc_t1"] for row in rows])
    everyone = np.ones_like(wrong)
    figures = {"n": len(rows) // samples}
    for name in (n for n in rows[0] if n not in AFTER_FAILURE):
        figures |= _mean(name, [row[name] for row in rows], everyone, samples)
    figures["failures"] = int(wrong.sum())
    if figures["failures"]:
        right = [row["acc_t2"] for row in rows]
        figures |= _mean("retry_given_failure", right, wrong, samples)
        well_formed = [row["well_formed_retry"] for row in rows]
        figures |= _mean("well_formed_retry", well_formed, wrong, samples)
    said = np.array([float("reflection_tokens" in row) for row in rows])
    if said.any():
        tokens = [row.get("reflection_tokens", 0) for row in rows]
        figures |= _mean("reflection_tokens", tokens, said, samples)
    return figures


def _mean(name: str, values: list[float], weights, samples: int) -> dict:
    """{name, name_se} over rows of weight 1; the error is that of a ratio of sums over problems."""
    mean = float((weights * values).sum() / weights.sum())
    residuals = (weights * (np.array(values, dtype=float) - mean)).reshape(-1, samples).sum(axis=1)
    n = len(residuals)
    error = np.sqrt((residuals**2).sum() * n / max(1, n - 1)) / weights.sum()
    return {name: mean, f"{name}_se": float(error)}


def votes(talks: list[dict], samples: int) -> dict:
    """Majority votes at budgets of B = 2, 4, ... answers a problem, with their errors.

    vote_parallel_B: B first attempts vote. vote_corrected_B: B / 2 second attempts vote, which with
    their first ones cost B answers too (SCoRe's inference-time scaling). No answer, no vote; of
    equals the earliest wins.
    """
    groups = [talks[i : i + samples] for i in range(0, len(talks), samples)]
    figures, budget = {}, 2
    while budget <= samples:
        for kind, turn, voters in (("parallel", 0, budget), ("corrected", 1, budget // 2)):
            asked = [[talk["attempts"][: turn + 1][-1] for talk in g[:voters]] for g in groups]
            right = [_majority(attempts) for attempts in asked]
            figures |= _mean(f"vote_{kind}_{budget}", right, np.ones(len(right)), 1)
        budget *= 2
    return figures


def _majority(attempts: list[dict]) -> float:
    """Whether the most frequent answer is right."""
    count = Counter(y["answer"] for y in attempts if y["answer"] is not None)
    if not count:
        return 0.0
    winner = max(count, key=count.get)  # the first of equals: a Counter keeps the keys' order
    return next(y["right"] for y in attempts if y["answer"] == winner)
