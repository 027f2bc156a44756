"""A task and its problems, ready for a run, from the flags --task, --data, --prompts, --shots..."""

import math
from dataclasses import replace

from answers.programs import PACKAGES
from sandbox import run as sandbox
from tasks import TASKS, own
from tasks.base import PLACEHOLDER, PROMPTS, Task
from tasks.files import parse_json, read_rows, read_text
from tasks.sources import content_hash, load_splits, naming, parse_row


def load_task(config, wanted) -> tuple[Task, dict[str, list[dict]]]:
    """(task, {split: problems}), at least the splits `wanted`. Any bad input is a ValueError.

    config: has task, data, prompts, shots, shots_file, seed, unsafe and code_* (training/flags.py)
    """
    task = task_of(config)
    set_up_sandbox(config)
    splits = load_splits(task, config.data, config.seed, wanted)
    try:
        task.warm_up and task.warm_up()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--task {task.name}: {error}") from None
    if own.is_own(task.name):
        own.tried(task, {split: splits[split] for split in wanted}, config.data is None)
    examples = few_shot_examples(task, splits, config)
    keys = {task.key(problem) for problem, _ in examples}
    for split, problems in splits.items():
        others = [problem for problem in problems if task.key(problem) not in keys]
        if split in ("validation", "test") and len(others) < len(problems):
            raise ValueError(
                f"--shots_file {config.shots_file}: "
                f"one of its examples is a problem of the {split} split"
            )
        splits[split] = others
    shots = tuple((task.prompt(problem), answer) for problem, answer in examples)
    return replace(task, shots=shots), splits


def task_of(config) -> Task:
    """By --task and --prompts alone."""
    if own.is_own(config.task):
        task = own.own_task(config.task, config.embedded, config.verify_seconds)
    elif config.task in TASKS:
        task = TASKS[config.task]
    else:
        known = ", ".join(TASKS)
        raise ValueError(f"unknown task '{config.task}': choose one of {known}, or give a FILE.py")
    told = read_prompts(config.prompts, task.view) if config.prompts else {}
    if task.file and "first" in told:
        raise ValueError(
            f"--prompts {config.prompts}: 'first' is what {task.name}'s prompt returns"
        )
    return replace(task, **told)


def set_up_sandbox(config) -> None:
    """For all programs of this process, before any data: its tests may need what a flag allows."""
    if not 0 < config.code_timeout < math.inf:
        raise ValueError(f"--code_timeout {config.code_timeout:g}: must be seconds above 0")
    sandbox.timeout, sandbox.unsafe = config.code_timeout, config.unsafe
    sandbox.numpy = config.code_numpy
    (PACKAGES.add if config.code_numpy else PACKAGES.discard)("numpy")


def few_shot_examples(task: Task, splits: dict[str, list[dict]], config) -> list[tuple[dict, str]]:
    """(problem, good answer) of --shots examples; they do not depend on the run's seed.

    A file's (shown with its `response`, if a row has one); else of those that a publisher keeps
    for it; else of train, where they are the shortest of fifty, since they stand before every
    prompt.
    """
    path, count = config.shots_file, config.shots
    if path and task.parse is None:
        raise ValueError(f"--shots_file {path}: task '{task.name}' reads no rows")
    if path:
        rows = []
        for where, row in read_rows(path):
            with naming(where):
                rows.append((parse_row(task, row), row.get("response")))
        count = len(rows) if count is None else count
    else:
        count = task.default_shots if count is None else count
        if not count:
            return []
        train = splits.get("train", []) if config.data else task.generate("train", 0)
        some = sorted(train, key=lambda problem: content_hash(task.key(problem)))[:50]
        some.sort(key=lambda p: len(task.prompt(p) + (task.solution(p) or "")))
        rows = [(problem, None) for problem in splits.get("examples") or some]
    examples = [(problem, response or task.solution(problem)) for problem, response in rows]
    examples = [(problem, response) for problem, response in examples if response][:count]
    if not all(isinstance(task.prompt(problem), str) for problem, _ in examples):
        raise ValueError("--shots: prompts of this task are messages: put examples into them")
    if len(examples) < count:
        where = path or f"the train split of task '{task.name}'"
        raise ValueError(
            f"--shots {count}: {where} has {len(examples)} problems with a solution; "
            "name another --shots_file, or less"
        )
    return examples


def read_prompts(path: str, view: dict) -> dict[str, str]:
    """The prompts in a JSON file, {name of a prompt: text}; ValueError if one makes no sense.

    view: the task's, which has the placeholders that `first` may use
    """
    prompts = parse_json(read_text(path), path)
    if not isinstance(prompts, dict):
        raise ValueError(f"--prompts {path}: it must hold one JSON object")
    for name, text in prompts.items():
        if name not in PROMPTS:
            raise ValueError(
                f"--prompts {path}: unknown key '{name}': choose from {', '.join(PROMPTS)}"
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"--prompts {path}: '{name}' must be a text")
        check_placeholders(path, name, text, list(view) if name == "first" else [])
    return prompts


def check_placeholders(path: str, name: str, text: str, known: list[str]) -> None:
    used = PLACEHOLDER.findall(text)
    for placeholder in used:
        if placeholder not in known:
            allowed = ", ".join(f"{{{n}}}" for n in known) or "none"
            raise ValueError(
                f"--prompts {path}: unknown placeholder {{{placeholder}}} in '{name}': "
                f"it may have {allowed}"
            )
    if known and not used:
        raise ValueError(
            f"--prompts {path}: 'first' has none of {', '.join(known)}: "
            "the model would see no problem"
        )
