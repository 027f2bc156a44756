"""Countdown in words: an expression over given numbers that equals a target.

row:     {"nums": [3, 7, 8], "target": 59, "solution": "7 * 8 + 3"}, the solution optional
prompt:  Using the numbers 3, 7, 8, write an expression that equals 59. Use every number ...
answer:  7 * 8 is 56, and 3 more are 59. <answer>7 * 8 + 3</answer>
"""

import random
import re

from tasks.base import Task
from tasks.sources import split_of, take
from verifiers import extract_answer, verify_countdown


def parse_countdown(row: dict) -> dict:
    nums, target = take(row, nums=list, target=int)
    if not all(type(n) is int and n > 0 for n in nums):
        raise ValueError("field 'nums' must be positive whole numbers")
    solution = {"solution": take(row, solution=str)[0]} if "solution" in row else {}
    return {"nums": nums, "target": target} | solution


def ask_countdown(question: str) -> dict | None:
    """`8 19 16 make 24`."""
    match = re.fullmatch(r"((?:\d+ )+)make (\d+)", " ".join(question.split()))
    return match and {"nums": [int(n) for n in match[1].split()], "target": int(match[2])}


def countdown_key(problem: dict) -> str:
    """The same for a problem however its numbers are ordered."""
    return f"{sorted(problem['nums'])} {problem['target']}"


def generate_countdown(split: str, seed: int, count: int = 2000) -> list[dict]:
    """`count` problems of three or four numbers.

    Every run is judged by the same ones: `seed` is that of train only.
    """
    rng, chosen = random.Random(seed if split == "train" else 0), {}
    while len(chosen) < count:
        nums = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        value, expression = nums[0], str(nums[0])
        for n in nums[1:]:
            operator = rng.choice("+-*")
            value = value + n if operator == "+" else value - n if operator == "-" else value * n
            expression = f"({expression} {operator} {n})"
        problem = {"nums": sorted(nums), "target": value, "solution": expression[1:-1]}
        if 0 < value < 1000 and split_of(countdown_key(problem)) == split:
            chosen[countdown_key(problem)] = problem
    return list(chosen.values())


TASK = Task(
    name="countdown",
    first=(
        "Using the numbers {numbers}, write an expression that equals {target}. Use every number "
        "exactly once, with + - * / and parentheses only. Think briefly, then give the expression "
        "alone, without an equals sign, between <answer> and </answer>."
    ),
    correct=(
        "The solution above may contain an error. Check it, correct it if needed, and write the "
        "whole solution again. Give the final expression alone between <answer> and </answer>."
    ),
    reflect=(
        "Your answer was wrong. Explain in a few sentences what went wrong and what to do better. "
        "Do not solve the problem again yet."
    ),
    retry="Now try again, and give the expression alone between <answer> and </answer>.",
    critique=(
        "Check the solution above step by step, and say what is right and what is wrong in it."
    ),
    rewrite=(
        "Now write the whole solution again, improved by that. Give the final expression alone "
        "between <answer> and </answer>."
    ),
    view={
        "numbers": lambda p: ", ".join(map(str, p["nums"])),
        "target": lambda p: str(p["target"]),
    },
    answer=lambda response, p: extract_answer(response),
    verify=lambda response, p: verify_countdown(response, p["nums"], p["target"]),
    parse=parse_countdown,
    generate=generate_countdown,
    ask=ask_countdown,
    key=countdown_key,
    solution=lambda p: f"<answer>{p['solution']}</answer>" if "solution" in p else None,
    max_new_tokens=256,
    max_reflection_tokens=128,
)
