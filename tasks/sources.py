"""Problems from files and hub datasets: reading, checking, and splits that never overlap.

What --data takes, SOURCE being a JSONL file, a JSON file with one list, or hub:NAME[:CONFIG] (needs
`datasets`):

    SOURCE                     a file is split by a hash of each problem's content, 80 % train, 10 %
                               validation, 10 % test; a hub dataset of several splits keeps them
    train=SOURCE,test=SOURCE   one source for each split, `validation=` too. Evaluation alone needs
                               just `test=`. Without `validation=`, a tenth of train, by the hash,
                               is set aside for it

MBPP's published split by `task_id` goes before either. A split so depends on a problem's content
alone, not on its place in the file. One problem in two splits is an error.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

SPLITS = ("train", "validation", "test")


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
            problem = task.parse(row)
        key = task.key(problem)
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


@contextmanager
def naming(where: str):
    """Puts the place in front of a ValueError about what stands there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def take(row: dict, **kinds: type) -> list:
    """The values of a row's fields.

    One that is missing, of another kind or an empty text or list is a ValueError.
    """
    names = {str: "text", list: "list", dict: "object", int: "whole number"}
    for field, kind in kinds.items():
        # isinstance would take true for a whole number
        if type(row.get(field)) is not kind or row[field] in ("", []):
            raise ValueError(f"field '{field}' is missing, empty or no {names[kind]}")
    return [row[field] for field in kinds]


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
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} can't be loaded: {reason}") from None
    found = {}
    for split, part in parts.items():
        rows = enumerate(part, 1)
        found[split] = [(f"{source}, {split} row {number}", dict(row)) for number, row in rows]
    return found if len(found) > 1 else {None: next(iter(found.values()))}


def read_rows(path: str) -> list[tuple[str, dict]]:
    """(where, row) of every object in a JSONL file, or in a JSON file with one list."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        items = enumerate(parse_json(text, path), 1)
        rows = [(f"{path}, item {number}", row) for number, row in items]
    else:
        lines = enumerate(text.split("\n"), 1)  # splitlines() would break at U+2028 in a text
        lines = [(f"{path}, line {number}", line) for number, line in lines]
        rows = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
    return rows


def read_text(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
