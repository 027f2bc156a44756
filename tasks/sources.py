"""Problems from files and hub datasets: reading, checking, and splits that never overlap.

What --data takes, SOURCE being a file (files.py says which) or hub:NAME[:CONFIG] (needs
`datasets`):

    SOURCE                     a file is split by a hash of each problem's content, 80 % train, 10 %
                               validation, 10 % test; a hub dataset of several splits keeps them
    train=SOURCE,test=SOURCE   one source for each split, `validation=` too. Evaluation alone needs
                               just `test=`. Without `validation=`, a tenth of train, by the hash,
                               is set aside for it

MBPP's published split by `task_id` goes before either. A split so depends on a problem's content
alone, not on its place in the file. One problem in two splits is an error.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import contextmanager

from tasks.files import DATA_FILE, read_rows, without_nulls

SPLITS = ("train", "validation", "test")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def content_hash(key: str) -> int:
    """64 bits that are the same on every machine and in every run."""
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_of(key: str) -> str:
    """By content: 80 % train, 10 % validation, 10 % test."""
    return (["train"] * 8 + ["validation", "test"])[content_hash(key) % 10]


def load_splits(task, data: str | None, seed: int, wanted: Iterable[str]) -> dict[str, list[dict]]:
    """{split: problems}, at least those `wanted`.

    "examples" has what a publisher keeps for few-shot prompts. Any bad input is a ValueError that
    names file, line and field.
    """
    if data is None:
        if task.generate is None:
            raise ValueError(
                f"task '{task.name}' has no problems of its own: "
                f"give --data, for example {task.source}"
            )
        return {split: task.generate(split, seed) for split in wanted}
    if task.parse is None:
        raise ValueError(
            f"task '{task.name}' makes its own problems: leave --data out, or use --task countdown"
        )
    with suggesting(task):
        rows = read_sources(data)
    splits = place(task, rows)
    for split in wanted:
        if not splits[split]:
            raise ValueError(
                f"--data {data}: none of its {len(rows)} problems is in the {split} split: "
                f"add more, or name a file for it ({split}=FILE)"
            )
    return splits


def place(task, rows: list[tuple[str | None, str, dict]]) -> dict[str, list[dict]]:
    """Rows of (the split they were given for, where they stand, row) -> {split: problems}."""
    given_splits = {given for given, _, _ in rows}
    splits = {name: [] for name in (*SPLITS, "examples")}
    seen = {}  # {hash of a problem: (its split, where it stands)}
    for given, where, row in rows:
        with naming(where):
            problem = parse_row(task, row)
            key = task.key(problem)  # of an own task made of its prompt, which may have a fault
        split = given or split_of(key)
        if given == "train" and "validation" not in given_splits and split_of(key) == "validation":
            split = "validation"
        if task.published:
            split = task.published(problem)
        if split not in splits:
            raise ValueError(
                f"{where}: no such split; name the ones to use, train=SOURCE,test=SOURCE"
            )
        other, elsewhere = seen.setdefault(content_hash(key), (split, where))
        if other != split:
            raise ValueError(
                f"{where} ({split}) is the problem of {elsewhere} ({other}): remove one of them"
            )
        splits[split].append(problem)
    return splits


def parse_row(task, row: dict) -> dict:
    """The problem in a row of data; ValueError if the task can't use it."""
    row = {field: value for field, value in row.items() if value is not None}
    return task.parse(row)


@contextmanager
def naming(where: str):
    """Puts the place in front of a ValueError about what stands there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def take(row: dict, **kinds: type) -> list:
    """The values of a row's fields.

    One that is missing, of another kind or an empty text or list is a ValueError. A list, object or
    whole number may be written as a text, as all values of a CSV file are.
    """
    names = {str: "text", list: "list", dict: "object", int: "whole number"}
    values = [typed(row.get(field), kind) for field, kind in kinds.items()]
    for (field, kind), value in zip(kinds.items(), values, strict=True):
        # isinstance would take true for a whole number
        if type(value) is not kind or value == [] or kind is str and not value.strip():
            fault = "missing" if value is None else f"empty or no {names[kind]}"
            wanted = ", ".join(kinds)
            raise ValueError(f"field '{field}' is {fault}: wanted {wanted}; {found_in(row)}")
    return values


def typed(value, kind: type):
    """A text that says a list, object or whole number as that; all else as it is.

    JSON, or Python's own writing, which pandas puts into a CSV. What it does not write just so is
    left: to Python two texts without a comma between them are one.
    """
    if not isinstance(value, str) or kind is str:
        return value
    if kind is int:
        return int(value) if re.fullmatch("-?[0-9]{1,18}", value) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        said = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return said if repr(said) == value else value


def found_in(row: dict) -> str:
    fields = [str(field) for field, value in row.items() if value is not None]
    more = f" and {len(fields) - 12} more" if len(fields) > 12 else ""
    return f"this row has {', '.join(fields[:12]) or 'none'}{more}"


def read_sources(data: str) -> list[tuple[str | None, str, dict]]:
    """(split or None, where, row) of all that --data names."""
    found, named = [], set()
    if not re.match(rf"({'|'.join(SPLITS)})=", data):
        for split, rows in read_source(data).items():
            found += [(split, where, row) for where, row in rows]
        return found
    for part in data.split(","):
        split, _, source = part.partition("=")
        if split not in SPLITS or split in named or not source:
            raise ValueError(
                f"--data {data}: '{part}' is not SPLIT=SOURCE, "
                f"with each of {', '.join(SPLITS)} at most once"
            )
        named.add(split)
        parts = read_source(source)
        if split not in parts and len(parts) > 1:
            raise ValueError(f"{source} has the splits {', '.join(parts)}, and no {split}")
        rows = parts[split] if split in parts else next(iter(parts.values()))
        found += [(split, where, row) for where, row in rows]
    return found


def read_source(source: str) -> dict[str | None, list[tuple[str, dict]]]:
    """{split: [(where, row)]} of a hub dataset of several splits; else all under None."""
    if source in ("", "hub:"):
        raise ValueError(f"--data '{source}': name a file, or a dataset as hub:NAME")
    if not source.startswith("hub:"):
        return {None: read_rows(source)}
    _, name, *config = source.split(":", 2)
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: pip install datasets") from None
    try:
        parts = load_dataset(name, *config)
    except Exception as error:  # no network, no such name, no right to it: its own words say which
        reason = " ".join(str(error).split())
        known = re.search(r"\['([^']+)'", reason) if "onfig" in reason else None
        remedy = f"; name one, as in hub:{name}:{known[1]}" if known else ""
        raise ValueError(f"{source} can't be loaded: {reason[:300]}{remedy}") from None
    found = {}
    for split, part in parts.items():
        rows = enumerate((without_nulls(dict(row)) for row in part), 1)
        found[split] = [(f"{source}, {split} row {number}", row) for number, row in rows]
    return found if len(found) > 1 else {None: next(iter(found.values()))}


@contextmanager
def suggesting(task):
    """Adds to 'no such file' the hub dataset that was meant, if the name looks like one."""
    try:
        yield
    except ValueError as error:
        name, missing, _ = str(error).partition(": no such file")
        if not missing or not HUB_NAME.fullmatch(name) or DATA_FILE.search(name):
            raise
        own = re.search(rf"hub:{re.escape(name)}(:\w+)?(?![\w.-])", task.source)
        meant = own[0] if own else f"hub:{name}"
        raise ValueError(f"{error}; if a dataset of the hub is meant: {meant}") from None
