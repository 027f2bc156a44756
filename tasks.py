"""Tasks: problems, what is said to the model in each turn, and the verifier.

A problem is a dict. Its split is decided by a hash of its content, so train, validation and test never overlap and
never move when problems are added, reordered or generated with another seed. Every choice is made on validation;
test is for final tables.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from verifiers import extract_answer, run_steps, step_result, verify_countdown

SPLITS = ("train", "validation", "test")
OPERATORS = "+-*/"
VERDICT = re.compile("((ok|bad) )?")
HELD_OUT = 1500  # problems of the tiny task in validation and in test, each


@dataclass(frozen=True)
class Task:
    """What an algorithm needs to know of a task. `answer` and `verify` never raise on any response.

    problems: (split, data file or None, seed) -> list of problems
    prompt:   problem -> the first user message
    answer:   (response, problem) -> the answer in it, or None if it is not well-formed
    verify:   (response, problem) -> is the answer right
    correct:  the user message that asks for a second attempt and never reveals a verdict (SCoRe, turn 2)
    reflect:  the user message after a failure that asks what went wrong (RRR)
    retry:    the user message that asks for another attempt after the reflection (RRR)
    generic_reflection: a reflection in the model's name that knows nothing of the problem, for a control
    """

    name: str
    problems: Callable[[str, str | None, int], list[dict]]
    prompt: Callable[[dict], str]
    answer: Callable[[str, dict], str | None]
    verify: Callable[[str, dict], bool]
    correct: str
    reflect: str
    retry: str
    generic_reflection: str


def content_hash(problem: dict) -> int:
    """The same for a problem however its numbers are ordered."""
    text = f"{sorted(problem['nums'])} {problem['target']}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def enumerate_steps(numbers: tuple[int, int, int]) -> list[tuple]:
    """All honest two-step derivations over three numbers, as ((a, op, b, value), (c, op, d, value)) pairs."""

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
    solvable.sort(key=content_hash)
    for problem in solvable:  # in no telling order, but always the same one
        random.Random(content_hash(problem)).shuffle(problem["nums"])
    return {
        "test": solvable[:HELD_OUT],
        "validation": solvable[HELD_OUT : 2 * HELD_OUT],
        "train": solvable[2 * HELD_OUT :],
    }


def tiny_problems(split: str, data: str | None, seed: int) -> list[dict]:
    if data is not None:
        raise ValueError("task 'tiny' makes its own problems: leave --data out, or use --task countdown")
    return tiny_splits()[split]


def tiny_answer(response: str, problem: dict) -> str | None:
    """The derivation after the verdict word, if it is honest; `ok` or `bad` may stand before it."""
    steps = response[len(VERDICT.match(response)[0]) :]
    return None if run_steps(steps, problem["nums"]) is None else steps


def tiny_verify(response: str, problem: dict) -> bool:
    steps = tiny_answer(response, problem)
    return steps is not None and run_steps(steps, problem["nums"]) == problem["target"]


def countdown_problems(split: str, data: str | None, seed: int, count: int = 2000) -> list[dict]:
    """Problems of a JSONL file with `nums` and `target`, or `count` generated ones of three or four numbers."""
    if data is not None:
        problems = read_jsonl(data, {"nums": list, "target": int})
        for number, problem in enumerate(problems, 1):
            if not problem["nums"] or not all(type(n) is int and n > 0 for n in problem["nums"]):
                raise ValueError(f"{data}, problem {number}: field 'nums' must be positive whole numbers")
        chosen = [p for p in problems if split_of(p) == split]
        if not chosen:
            raise ValueError(f"{data}: none of its {len(problems)} problems falls into the {split} split: add more")
        return chosen
    rng, chosen = random.Random(seed if split == "train" else 0), {}  # every run is judged by the same problems
    while len(chosen) < count:
        nums = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        expression = str(nums[0]) + "".join(f" {rng.choice('+-*')} {n}" for n in nums[1:])
        problem = {"nums": sorted(nums), "target": _value(expression)}
        if 0 < problem["target"] < 1000 and split_of(problem) == split:
            chosen[content_hash(problem)] = problem
    return list(chosen.values())


def _value(expression: str) -> int:
    """Of a generated expression without division or parentheses, left to right."""
    words = expression.split()
    value = int(words[0])
    for operator, number in zip(words[1::2], map(int, words[2::2]), strict=True):
        value = value + number if operator == "+" else value - number if operator == "-" else value * number
    return value


def split_of(problem: dict) -> str:
    """By content: 80 % train, 10 % validation, 10 % test."""
    return (["train"] * 8 + ["validation", "test"])[content_hash(problem) % 10]


def read_jsonl(path: str, fields: dict[str, type], skip: int = 0, last: int | None = None) -> list[dict]:
    """Lines skip + 1 to `last` of a JSONL file. One that does not fit is a ValueError naming file, line and field."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such data file")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines[skip:last], skip + 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(f"{path}, line {number}: field '{field}' must be a {kind.__name__}")
        rows.append(row)
    return rows


def countdown_prompt(problem: dict) -> str:
    return (
        f"Using the numbers {', '.join(map(str, problem['nums']))}, write an expression that equals "
        f"{problem['target']}. Use every number exactly once, with + - * / and parentheses only. Think briefly, then "
        "give the expression alone, without an equals sign, between <answer> and </answer>."
    )


TASKS = {
    "tiny": Task(
        name="tiny",
        problems=tiny_problems,
        prompt=lambda problem: f"{' '.join(map(str, problem['nums']))} make {problem['target']}",
        answer=tiny_answer,
        verify=tiny_verify,
        correct="fix",
        reflect="reflect",
        retry="retry",
        generic_reflection="no try retry",
    ),
    "countdown": Task(
        name="countdown",
        problems=countdown_problems,
        prompt=countdown_prompt,
        answer=lambda response, problem: extract_answer(response),
        verify=lambda response, problem: verify_countdown(response, problem["nums"], problem["target"]),
        correct=(
            "The solution above may contain an error. Check it, correct it if needed, and write the whole solution "
            "again. Give the final expression alone between <answer> and </answer>."
        ),
        reflect=(
            "Your answer was wrong. Explain in a few sentences what went wrong and how to do better next time. Do "
            "not solve the problem again yet."
        ),
        retry="Now try again, and give the expression alone between <answer> and </answer>.",
        generic_reflection="I made a mistake. Next time I will check every step before I answer.",
    ),
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]


def first_turn_ids(tokenizer, message: str) -> list[int]:
    """A conversation's first prompt: the user's message, up to where the model's answer begins."""
    if tokenizer.chat_template is None:
        return tokenizer(message + "\n").input_ids
    chat = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def seam_ids(tokenizer, message: str) -> list[int]:
    """What the chat template puts between an answer's text and the next one, with the user's `message` within.

    It begins with the token that ends the model's turn. Nothing that was sampled is decoded or encoded again: only
    this seam is encoded, around a placeholder, so templates that rewrite history (strip thoughts) don't matter.
    """
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an eos token: set one in its config")
        seam = f"{tokenizer.eos_token}\n{message}\n"
    else:
        placeholder = "PLACEHOLDER"
        roles = [("user", "?"), ("assistant", placeholder), ("user", message)]
        chat = [{"role": role, "content": content} for role, content in roles]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        seam = text.partition(placeholder)[2].lstrip(" ")
    return tokenizer(seam, add_special_tokens=False).input_ids


def follow_up_ids(tokenizer, message: str, last_ids: list[int]) -> list[list[int]]:
    """The ids to append to rows that end with `last_ids` (B,), so that the model answers the user's `message`.

    A row that ended its turn has sampled the seam's first token itself. One that was cut off, or stopped at another
    stop token, gets the whole seam.
    """
    seam = seam_ids(tokenizer, message)
    return [seam[1:] if last == seam[0] else seam for last in last_ids]
