"""Countdown for the embedded model: three numbers from 1 to 20, every step written out.

row:     none are read, all are made here: {"nums": [8, 19, 16], "target": 24}
prompt:  8 19 16 make 24
answer:  19 - 16 = 3 ; 8 * 3 = 24
"""

import itertools
import random
import re
from functools import cache

from tasks.base import Task
from tasks.countdown import ask_countdown, countdown_key
from tasks.sources import content_hash

OPERATORS = "+-*/"
STEP_LIMIT = 99  # the largest value that has a token of its own in the tiny vocabulary
HELD_OUT = 1500  # problems in validation and in test, each
VERDICT = re.compile("((ok|bad) )?")


def run_steps(steps: str, numbers: list[int]) -> int | None:
    """The value that an honest derivation reaches, or None if it is not one.

    `16 / 8 = 2 ; 19 + 2 = 21`: every step combines two values still unused, states their exact
    result, an integer from 0 to 99, and puts it back; one value is left at the end.
    """
    unused = [str(n) for n in numbers]
    value = None
    for step in steps.split(" ; "):
        words = step.split(" ")
        if len(words) != 5 or words[3] != "=":
            return None
        for word in (words[0], words[2]):
            if word not in unused:
                return None
            unused.remove(word)
        value = step_result(int(words[0]), words[1], int(words[2]))
        if value is None or str(value) != words[4]:
            return None
        unused.append(words[4])
    return value if len(unused) == 1 else None


def step_result(left: int, operator: str, right: int) -> int | None:
    """`left operator right` if it is an integer from 0 to 99, else None."""
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    elif operator == "/" and right != 0 and left % right == 0:
        result = left // right
    else:
        return None
    return result if 0 <= result <= STEP_LIMIT else None


def tiny_answer(response: str, problem: dict) -> str | None:
    """The derivation after the verdict word, if it is honest; `ok` or `bad` may stand before it."""
    steps = response[len(VERDICT.match(response)[0]) :]
    return None if run_steps(steps, problem["nums"]) is None else steps


def tiny_verify(response: str, problem: dict) -> bool:
    steps = tiny_answer(response, problem)
    return steps is not None and run_steps(steps, problem["nums"]) == problem["target"]


def enumerate_steps(numbers: tuple[int, int, int]) -> list[tuple]:
    """All honest derivations, as ((a, op, b, value), (c, op, d, value)) of their two steps."""

    def combine(x: int, y: int) -> list[tuple]:
        tries = [(x, op, y) for op in OPERATORS] + [(y, op, x) for op in "-/" if x != y]
        return [(*t, value) for t in tries if (value := step_result(*t)) is not None]

    found = []
    for i in range(3):
        (a, b), c = numbers[:i] + numbers[i + 1 :], numbers[i]
        found += [(first, second) for first in combine(a, b) for second in combine(first[3], c)]
    return found


@cache
def tiny_splits() -> dict[str, list[dict]]:
    """The solvable problems with three numbers from 1 to 20 and a target from 1 to 99, by split."""
    solvable = []
    for numbers in itertools.combinations_with_replacement(range(1, 21), 3):
        values = {second[3] for _, second in enumerate_steps(numbers)} - {0}
        solvable += [{"nums": list(numbers), "target": value} for value in sorted(values)]
    solvable.sort(key=lambda problem: content_hash(countdown_key(problem)))
    for problem in solvable:  # in no telling order, but always the same one
        random.Random(content_hash(countdown_key(problem))).shuffle(problem["nums"])
    return {
        "test": solvable[:HELD_OUT],
        "validation": solvable[HELD_OUT : 2 * HELD_OUT],
        "train": solvable[2 * HELD_OUT :],
    }


TASK = Task(
    name="tiny",
    # single words, since the embedded model has a token for each and knows no others
    first="{numbers} make {target}",
    correct="fix",
    reflect="reflect",
    retry="retry",
    critique="reflect",
    rewrite="fix",
    generic_reflection="no try retry",
    view={
        "numbers": lambda p: " ".join(map(str, p["nums"])),
        "target": lambda p: str(p["target"]),
    },
    answer=tiny_answer,
    verify=tiny_verify,
    ask=ask_countdown,
    generate=lambda split, seed: tiny_splits()[split],
    key=countdown_key,
    solution=lambda p: None,
    max_new_tokens=16,
    max_reflection_tokens=72,
)
