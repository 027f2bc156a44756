"""A task of the user's own: a file with three functions, which imports nothing of ours.

    problems(split) -> list of dicts, the same whenever it is called, none in two splits
                       split: train, validation or test; no such function where --data has rows
    prompt(problem) -> str, or a list of messages {role, content} that ends with the user's; no
                       such function where rows ask by themselves, in `prompt` (a text or
                       messages), `messages` or `conversations`: all up to the user's last message
    verify(response, problem) -> True or False, or a reward from 0.0 to 1.0, which is right at 1.0

And if wanted: correct, reflect, retry, what is said between attempts; max_new_tokens,
max_reflection_tokens; answer(response, problem) -> the text that was judged, or None;
given(problem) -> the first attempt, instead of one of the model's. recipes/my_task.py is one.

verify runs in processes of its own, as many as there are cores, which share nothing
(sandbox/own.py): where it raises, the run ends with the response that did it; what takes more than
--verify_seconds is wrong. All else runs in this one. The file is read once: what is changed in it
during a run counts in the next one.
"""

import json
from functools import cache, partial
from pathlib import Path

from sandbox import own
from sandbox.own import OwnError
from tasks.base import Task
from tasks.chats import prompt_in

EMBEDDED = {"correct": "fix", "reflect": "reflect", "retry": "retry"}  # all words that it knows
WORDS = {
    "correct": "There may be an error in the answer above. Check it, correct it if there is one, "
    "and give the whole answer again.",
    "reflect": "Your answer was wrong. Explain in a few sentences what went wrong and what to do "
    "better. Do not answer again yet.",
    "retry": "Now give the whole answer again, and a better one.",
}
CRITIQUE = "Look at the answer above, and say what is right in it, and what not."
LIMITS = ("max_new_tokens", "max_reflection_tokens")
ROLES = ("system", "user", "assistant")
SPLITS = ("train", "validation", "test")
TRIED = 4  # problems of each split whose verdicts on an empty response are looked at beforehand


def is_own(task: str | None) -> bool:
    return (task or "").endswith(".py")


@cache
def read(path: str) -> tuple[str, dict]:
    """(a file's text, what it defines); ValueError if it can't be run or lacks a function."""
    try:
        text, file = Path(path).read_text(), str(Path(path).absolute())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--task {path} can't be read: {error}") from None
    try:
        names = {"prompt": prompt_in} | own.run_file(file, text)
    except SystemExit:
        rule = "put that under if __name__ == '__main__':"
        raise ValueError(f"--task {path} ends the process that imports it: {rule}") from None
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
    return text, names


def limits_of(path: str) -> dict[str, int]:
    """Those of LIMITS that a file sets."""
    _, names = read(path)
    return {name: names[name] for name in LIMITS if name in names}


def own_task(path: str, embedded: bool, seconds: float) -> Task:
    """The task in a file, of which `tried` tries what it can. embedded: who is to be spoken to."""
    (text, names), call = read(path), partial(called, path)
    words = {k: names.get(k, v) for k, v in (EMBEDDED if embedded else WORDS).items()}
    prompt = partial(prompt_of, path, names["prompt"])
    return Task(
        name=path,
        first="{prompt}",
        messages=prompt,
        **words,
        critique=EMBEDDED["reflect"] if embedded else CRITIQUE,
        rewrite=words["correct"],
        view={},
        answer=partial(answer_of, path, names.get("answer")),
        verify=lambda response, problem: own.verdict(path, text, response, problem, seconds),
        warm_up=lambda: True,  # verdicts wait for processes, so several are asked at once
        parse=plain,
        ask=problem_in,
        generate=partial(problems_of, path, names.get("problems")),
        source="a file",
        key=lambda problem: json.dumps(prompt(problem)),
        given=partial(call, names["given"]) if "given" in names else None,
        solution=lambda problem: None,
        file=text,
        **limits_of(path),
    )


def called(path: str, function, *arguments):
    """Whatever it raises is an OwnError that names the line and what it was given."""
    try:
        return function(*arguments)
    except Exception as error:
        fault = own.fault_of(error, str(Path(path).absolute()))
        given = ", ".join(own.shortened(json.dumps(x)) for x in arguments)
        raise OwnError(f"{path}, {fault}, with {given}") from None


def prompt_of(path: str, function, problem: dict) -> str | list[dict]:
    """A prompt that is one."""
    prompt = called(path, function, problem)
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    fine = isinstance(prompt, list) and prompt and all(is_message(m) for m in prompt)
    roles = [message["role"] for message in prompt] if fine else []
    if not roles or roles[-1] != "user" or "system" in roles[1:]:
        form = "a text, or a list of {role, content}, the system's first, the user's last"
        given = own.shortened(json.dumps(problem))
        whose = "prompt returned"
        if function is prompt_in:
            remedy = "add one, or give each row a `prompt` or `messages`"
            whose = f"it has no function prompt: {remedy}; this one's is"
        raise OwnError(f"{path}: {whose} {prompt!r}, not {form}, with {given}")
    return prompt


def is_message(message) -> bool:
    texts = isinstance(message, dict) and isinstance(message.get("content"), str)
    return texts and message.get("role") in ROLES


def answer_of(path: str, function, response: str, problem: dict) -> str | None:
    """By default all that was said."""
    if function is None:
        return response.strip() or None
    answer = called(path, function, response, problem)
    if not isinstance(answer, str | None):
        given = own.shortened(repr(response))
        raise OwnError(f"{path}: answer returned {answer!r}, not a text or None, with {given}")
    return answer


def plain(problem) -> dict:
    """As it comes back from a JSON file: tuples are lists there."""
    try:
        found = json.loads(json.dumps(problem))
    except (TypeError, ValueError) as error:
        raise ValueError(f"it can't be written as JSON ({error}): {problem!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is no dict: {problem!r}")
    return found


def problem_in(question: str) -> dict | None:
    """A person's question may be a problem, as JSON."""
    try:
        return plain(json.loads(question)) if question.lstrip().startswith("{") else None
    except ValueError:
        return None


def problems_of(path: str, function, split: str, seed: int) -> list[dict]:
    if function is None:
        raise ValueError(f"--task {path}: it has no function problems: give --data, or add it")
    found, problems = called(path, function, split), []
    if not isinstance(found, list) or not found:
        raise ValueError(f"--task {path}: problems({split!r}) returned no list of problems")
    for number, problem in enumerate(found, 1):
        try:
            problems.append(plain(problem))
        except ValueError as error:
            raise ValueError(f"--task {path}: problem {number} of {split}: {error}") from None
    return problems


def tried(task: Task, splits: dict[str, list[dict]], made_here: bool) -> None:
    """Before any long work: every prompt, some verdicts, that no problem is in two splits.

    made_here: by the file's `problems`; those of --data were compared as they were placed.
    """
    seen = {}
    for split in SPLITS if made_here else splits:
        problems = splits[split] if split in splits else task.generate(split, 0)
        for number, problem in enumerate(problems, 1):
            here = f"problem {number} of {split}"
            other, where = seen.setdefault(task.key(problem), (split, here))
            if other != split:
                what = f"{own.shortened(json.dumps(problem))}: let it be in one split"
                raise ValueError(f"--task {task.name}: {here} asks what {where} does, {what}")
        for problem in problems[:TRIED]:
            task.answer("", problem)
            task.given and task.given(problem)
            before, _ = own.late(), task.verify("", problem)
            if own.late() > before:
                remedy = "mend it, or raise --verify_seconds"
                rest = f"{remedy}, with {own.shortened(json.dumps(problem))}"
                raise OwnError(f"{task.name}: verify('', problem) takes too long: {rest}")
