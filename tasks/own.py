"""A task of the user's own: a file with three functions, which imports nothing of ours.

    problems(split) -> list of dicts          split: train, validation, test; or none, with --data
    prompt(problem) -> str, or a list of messages {role, content} that ends with the user's
    verify(response, problem) -> True or False, or a reward from 0.0 to 1.0, which is right at 1.0

And if wanted: correct, reflect, retry, what is said between attempts; max_new_tokens,
max_reflection_tokens; answer(response, problem) -> the text that was judged, or None;
given(problem) -> the first attempt, instead of one of the model's. recipes/my_task.py is one.

verify runs in processes of its own (sandbox/own.py): where it raises, the run ends with the
response that did it; what takes more than --verify_seconds is wrong. All else runs in this one.
"""

import json
import runpy
from functools import cache, partial
from pathlib import Path

from sandbox import own
from tasks.base import Task

EMBEDDED = {"correct": "fix", "reflect": "reflect", "retry": "retry"}  # all words that it knows
WORDS = {
    "correct": "There may be an error in the answer above. Check it, correct it if there is one, "
    "and give the whole answer again.",
    "reflect": "Your answer was wrong. Explain in a few sentences what went wrong and what to do "
    "better. Do not answer again yet.",
    "retry": "Now give the whole answer again, and a better one.",
}
LIMITS = ("max_new_tokens", "max_reflection_tokens")
ROLES = ("system", "user", "assistant")
TRIED = 4  # problems of each split whose verdicts on an empty response are looked at beforehand


def is_own(task: str | None) -> bool:
    return (task or "").endswith(".py")


@cache
def names_of(path: str) -> dict:
    """What a file defines; ValueError if it can't be run or lacks a function."""
    if not Path(path).is_file():
        raise ValueError(f"--task {path}: no such file")
    file = str(Path(path).absolute())
    try:
        names = runpy.run_path(file)
    except Exception as error:
        raise ValueError(f"--task {path}, {own.fault_of(error, file)}") from None
    for name in ("prompt", "verify"):
        if not callable(names.get(name)):
            raise ValueError(f"--task {path}: it has no function {name}; tasks/own.py says which")
    for name in LIMITS:
        if type(names.get(name, 1)) is not int or names.get(name, 1) < 1:
            raise ValueError(f"--task {path}: {name} must be a whole number above 0")
    for name in WORDS:
        if not isinstance(names.get(name, ""), str):
            raise ValueError(f"--task {path}: {name} must be a text")
    return names


def limits_of(path: str) -> dict[str, int]:
    """Those of LIMITS that a file sets."""
    names = names_of(path)
    return {name: names[name] for name in LIMITS if name in names}


def own_task(path: str, embedded: bool, seconds: float) -> Task:
    """The task in a file. Its problems are tried as they are made: see `tried`."""
    names = names_of(path)
    call = partial(called, path)
    words = {k: names.get(k, v) for k, v in (EMBEDDED if embedded else WORDS).items()}
    answer = names.get("answer", lambda response, problem: response.strip() or None)
    return Task(
        name=path,
        first="{prompt}",
        messages=lambda problem: checked(path, call(names["prompt"], problem)),
        **words,
        critique=words["reflect"],
        rewrite=words["correct"],
        view={},
        answer=partial(call, answer),
        verify=partial(verify_by, path, seconds),
        warm_up=lambda: True,  # verdicts wait for processes, so several are asked at once
        parse=lambda row: row,
        generate=partial(problems_of, path, names.get("problems")),
        source="a file",
        key=lambda problem: json.dumps(problem, sort_keys=True),
        given=partial(call, names["given"]) if "given" in names else None,
        solution=lambda problem: None,
        file=Path(path).read_text(),
        **limits_of(path),
    )


def called(path: str, function, *arguments):
    """Whatever it raises is a ValueError that names the line and what it was given."""
    try:
        return function(*arguments)
    except Exception as error:
        fault = own.fault_of(error, str(Path(path).absolute()))
        given = ", ".join(json.dumps(x) for x in arguments)
        raise ValueError(f"--task {path}, {fault}, with {given}") from None


def checked(path: str, prompt) -> str | list[dict]:
    """A prompt that is one; else a ValueError."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    fine = isinstance(prompt, list) and prompt and all(is_message(m) for m in prompt)
    if not fine or prompt[-1]["role"] != "user":
        form = "a text, or a list of {role, content} that ends with the user's"
        raise ValueError(f"--task {path}: prompt returned {prompt!r}, not {form}")
    return prompt


def is_message(message) -> bool:
    texts = isinstance(message, dict) and isinstance(message.get("content"), str)
    return texts and message.get("role") in ROLES


def verify_by(path: str, seconds: float, response: str, problem: dict) -> float:
    return own.verdict(path, response, problem, seconds)


def problems_of(path: str, problems, split: str, seed: int) -> list[dict]:
    """Of a split, all of which have a prompt."""
    if problems is None:
        raise ValueError(f"--task {path}: it has no function problems: give --data, or add it")
    found = called(path, problems, split)
    if not isinstance(found, list) or not found:
        raise ValueError(f"--task {path}: problems({split!r}) returned no list of problems")
    for number, problem in enumerate(found, 1):
        try:
            same = isinstance(problem, dict) and json.loads(json.dumps(problem)) == problem
        except (TypeError, ValueError):
            same = False
        if not same:
            fault = f"problem {number} of {split} is no dict that can be written as JSON"
            raise ValueError(f"--task {path}: {fault}: {problem!r}")
    return found


def tried(task: Task, splits: dict[str, list[dict]]) -> None:
    """Every problem's prompt, and some verdicts, before any long work; a fault is a ValueError."""
    for problems in splits.values():
        for problem in problems:
            task.prompt(problem)
        for problem in problems[:TRIED]:
            try:
                task.verify("", problem)
            except own.OwnError as error:
                raise ValueError(f"--task {error}") from None
