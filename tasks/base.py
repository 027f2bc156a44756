"""Tasks: problems, what is said to the model in each turn (prompts.py), and the verifier.

A problem is a dict that can be written as JSON. Train, validation and test never overlap and never
move when problems are added, reordered or generated with another seed (data.py). Every choice is
made on validation; test is for final tables.
"""

import ast
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from sandbox import run as sandbox
from tasks import prompts, schemas
from tasks.sources import content_hash, load_splits, naming, read_rows, split_of
from verifiers import (
    extract_answer,
    extract_calls,
    extract_code,
    extract_math,
    run_steps,
    step_result,
    verify_code,
    verify_countdown,
    verify_function_call,
    verify_math,
)

OPERATORS = "+-*/"
VERDICT = re.compile("((ok|bad) )?")
HELD_OUT = 1500  # problems of the tiny task in validation and in test, each


@dataclass(frozen=True)
class Task:
    """What an algorithm needs to know of a task. `answer` and `verify` never raise on any response.

    first, correct, ...: the prompts, see prompts.py; `prompt(problem)` is the first user message
    view:      the placeholders of `first`: {name: problem -> text}
    key:       problem -> the text that tells it from others; its hash decides the split
    answer:    (response, problem) -> the answer in it, or None if it is not well-formed
    verify:    (response, problem) -> is the answer right
    solution:  problem -> a good response, or None if the data has none; for few-shot examples
    parse:     row of data -> problem, or a ValueError that names the field; None: the task takes no
               data
    generate:  (split, seed) -> problems; None: there are none without data, `source` says where to
               get some
    published: problem -> its split, where the publisher has fixed one
    warm_up:   a verdict whose processes are started, or fail, before a run; None: verdicts need
               none
    given:     problem -> a first attempt that the data gives, in place of one that the model makes
    shots:     (user's message, good answer) of few-shot examples before the first prompt; by
               default the first `default_shots` there are
    """

    name: str
    first: str
    correct: str
    reflect: str
    retry: str
    critique: str
    rewrite: str
    generic_reflection: str
    view: dict[str, Callable[[dict], str]]
    key: Callable[[dict], str]
    answer: Callable[[str, dict], str | None]
    verify: Callable[[str, dict], bool]
    solution: Callable[[dict], str | None]
    parse: Callable[[dict], dict] | None = None
    generate: Callable[[str, int], list[dict]] | None = None
    source: str = ""
    published: Callable[[dict], str] | None = None
    warm_up: Callable[[], bool] | None = None
    given: Callable[[dict], str] | None = None
    default_shots: int = 0
    shots: tuple[tuple[str, str], ...] = ()

    def prompt(self, problem: dict) -> str:
        return prompts.fill(self.first, problem, self.view)


def load_task(config, wanted) -> tuple[Task, dict[str, list[dict]]]:
    """(task, {split: problems}), at least the splits `wanted`, by the flags --task, --data,
    --prompts and --shots...

    Any bad input is a ValueError.
    """
    if config.task not in TASKS:
        raise ValueError(f"unknown task '{config.task}': choose one of {', '.join(TASKS)}")
    task = TASKS[config.task]
    if config.prompts:
        task = replace(task, **prompts.read_prompts(config.prompts, task.view))
    splits = load_splits(task, config.data, config.seed, wanted)
    sandbox.unsafe = config.unsafe
    try:
        task.warm_up and task.warm_up()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--task {task.name}: {error}") from None
    examples = few_shot_examples(task, splits, config)
    keys = {task.key(problem) for problem, _ in examples}
    for split, problems in splits.items():
        others = [problem for problem in problems if task.key(problem) not in keys]
        if split in ("validation", "test") and len(others) < len(problems):
            raise ValueError(
                f"--shots_file {config.shots_file}: one of its examples is a problem of the {split} split"
            )
        splits[split] = others
    return replace(
        task, shots=tuple((task.prompt(problem), answer) for problem, answer in examples)
    ), splits


def few_shot_examples(task: Task, splits: dict[str, list[dict]], config) -> list[tuple[dict, str]]:
    """(problem, good answer) of --shots examples: a file's, else of those a publisher keeps for it,
    else of train.

    They do not depend on the run's seed. Of train, they are the shortest of fifty, since they stand
    before every prompt. An example of a file is shown with its `response`, if it has one.
    """
    path, count = config.shots_file, config.shots
    if path:
        rows = []
        for where, row in read_rows(path):
            with naming(where):
                rows.append((task.parse(row), row.get("response")))
        count = len(rows) if count is None else count
    else:
        count = task.default_shots if count is None else count
        train = splits.get("train", []) if config.data or not count else task.generate("train", 0)
        some = sorted(train, key=lambda problem: content_hash(task.key(problem)))[:50]
        kept = splits.get("examples") or sorted(
            some, key=lambda p: len(task.prompt(p) + (task.solution(p) or ""))
        )
        rows = [(problem, None) for problem in kept]
    examples = [(problem, response or task.solution(problem)) for problem, response in rows]
    examples = [(problem, response) for problem, response in examples if response][:count]
    if len(examples) < count:
        where = path or f"the train split of task '{task.name}'"
        raise ValueError(
            f"--shots {count}: {where} has {len(examples)} problems with a solution; name another --shots_file, or less"
        )
    return examples


def enumerate_steps(numbers: tuple[int, int, int]) -> list[tuple]:
    """All honest two-step derivations over three numbers, as ((a, op, b, value), (c, op, d, value))
    pairs."""

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


def tiny_answer(response: str, problem: dict) -> str | None:
    """The derivation after the verdict word, if it is honest; `ok` or `bad` may stand before it."""
    steps = response[len(VERDICT.match(response)[0]) :]
    return None if run_steps(steps, problem["nums"]) is None else steps


def tiny_verify(response: str, problem: dict) -> bool:
    steps = tiny_answer(response, problem)
    return steps is not None and run_steps(steps, problem["nums"]) == problem["target"]


def countdown_key(problem: dict) -> str:
    """The same for a problem however its numbers are ordered."""
    return f"{sorted(problem['nums'])} {problem['target']}"


def generate_countdown(split: str, seed: int, count: int = 2000) -> list[dict]:
    """`count` problems of three or four numbers. Every run is judged by the same ones: `seed` is
    that of train only."""
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


def fenced(program: str) -> str:
    return f"```python\n{program.strip()}\n```"


def verify_program(
    response: str, tests: str | list[str], entry_point: str | None = None, before: str = ""
) -> bool:
    """Whether the response's program passes; `before` is put in front of it."""
    return verify_code(before + extract_code(response), tests, entry_point)


def helpers(prompt: str, entry_point: str) -> str:
    """A prompt's imports and functions but the one asked for. Tests that use them take these, not
    the program's own."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        return ""
    tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(tree) + "\n"


def verify_humaneval(response: str, problem: dict) -> bool:
    """The function's head comes with imports and helpers, which the response need not repeat."""
    prompt, name = problem["prompt"], problem["entry_point"]
    return verify_program(response, helpers(prompt, name) + problem["test"], name, prompt + "\n")


def calls_text(response: str) -> str | None:
    return None if extract_calls(response) is None else response.rpartition("</think>")[2].strip()


MATH = dict(
    **prompts.MATH,
    view={"problem": lambda p: p["problem"]},
    key=lambda p: p["problem"],
    answer=lambda response, p: extract_math(response),
    verify=lambda response, p: verify_math(response, p["answer"]),
    solution=lambda p: p["solution"],
    warm_up=lambda: verify_math("\\boxed{1}", "1"),
)
MBPP = dict(
    **prompts.CODE,
    view={"text": lambda p: p["text"], "tests": lambda p: "\n".join(p["tests"])},
    key=lambda p: "\n".join([p["text"], *p["tests"]]),
    answer=lambda response, p: extract_code(response) or None,
    verify=lambda response, p: verify_program(response, p["tests"]),
    solution=lambda p: fenced(p["code"]),
    published=schemas.mbpp_split,
    warm_up=lambda: verify_code("", ""),
)
ALL = (
    Task(
        name="tiny",
        **prompts.TINY,
        view={
            "numbers": lambda p: " ".join(map(str, p["nums"])),
            "target": lambda p: str(p["target"]),
        },
        key=countdown_key,
        answer=tiny_answer,
        verify=tiny_verify,
        solution=lambda p: None,
        generate=lambda split, seed: tiny_splits()[split],
    ),
    Task(
        name="countdown",
        **prompts.COUNTDOWN,
        view={
            "numbers": lambda p: ", ".join(map(str, p["nums"])),
            "target": lambda p: str(p["target"]),
        },
        key=countdown_key,
        answer=lambda response, p: extract_answer(response),
        verify=lambda response, p: verify_countdown(response, p["nums"], p["target"]),
        solution=lambda p: f"<answer>{p['solution']}</answer>" if "solution" in p else None,
        parse=schemas.parse_countdown,
        generate=generate_countdown,
    ),
    Task(
        name="math",
        **MATH,
        parse=schemas.parse_math,
        source="files of MATH's train and MATH-500's test split",
    ),
    Task(
        name="gsm8k",
        **MATH,
        parse=schemas.parse_gsm8k,
        source="hub:openai/gsm8k:main, or its files",
    ),
    Task(
        name="mbpp",
        **MBPP,
        parse=schemas.parse_mbpp,
        source="hub:google-research-datasets/mbpp:full, or its mbpp.jsonl",
        default_shots=3,
    ),
    Task(
        name="mbpp_r",
        **MBPP,
        parse=schemas.parse_mbpp_r,
        source="rows of MBPP, each with a wrong program in the field 'first_attempt'",
        given=lambda p: fenced(p["first_attempt"]),
    ),
    Task(
        name="humaneval",
        **prompts.HUMANEVAL,
        view={"program": lambda p: p["prompt"]},
        key=lambda p: p["prompt"],
        answer=lambda response, p: extract_code(response) or None,
        verify=verify_humaneval,
        solution=lambda p: fenced(p["prompt"] + p["canonical_solution"]),
        warm_up=lambda: verify_code("", ""),
        parse=schemas.parse_humaneval,
        source="hub:openai/openai_humaneval, or its file (test=FILE for all 164 problems)",
    ),
    Task(
        name="function_call",
        **prompts.FUNCTION_CALL,
        view={
            "query": lambda p: p["query"],
            "tools": lambda p: "\n".join(json.dumps(tool) for tool in p["tools"]),
        },
        key=lambda p: json.dumps([p["query"], p["tools"]]),
        answer=lambda response, p: calls_text(response),
        verify=lambda response, p: verify_function_call(response, p["calls"]),
        solution=lambda p: json.dumps(schemas.example_calls(p["calls"])),
        parse=schemas.parse_function_call,
        source="hub:Salesforce/xlam-function-calling-60k, or files of the Berkeley Function Calling Leaderboard",
    ),
)
TASKS = {task.name: task for task in ALL}
