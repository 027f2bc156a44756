"""The file that keeps what is done of an evaluation, so that after its end it is not done again.

Lines of JSON: a header, which says what the others belong to, then what is done. The process may
have been killed, or the disk full, at any moment: what is whole of it counts.
"""

import json
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from tasks.files import parse_json
from training import checkpoint
from training.distributed import Stopped
from training.models import fingerprint
from training.run import contents_of, stop


def path_of(output: str) -> Path:
    return Path(f"{output}.partial")


def left_over(path: Path) -> list[dict]:
    """What an earlier process left, as far as it is whole; nothing if there is no file."""
    rows = []
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    with suppress(ValueError, TypeError):
        for line in lines[:-1]:
            rows.append(dict(parse_json(line, str(path))))
    return rows


def begin(path: Path, header: dict, rows: list[dict]) -> None:
    """The file, made ready for more: what was there is there until it has its place."""
    checkpoint.write_text(path, json_lines([header, *rows]))


def add(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.write(json_lines(rows))


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table_of(run: Path) -> Path:
    return run / "results.partial.jsonl"


def open_table(run: Path) -> list[dict]:
    """What is there of a run's final table, whose file is made ready for more.

    Only of the very model in run/checkpoint: a run that went on for more steps has another.
    """
    owner = {"checkpoint": checkpoint.digests(run / "checkpoint")}
    before, *rows = left_over(table_of(run)) or [None]
    rows = rows if before == owner else []
    begin(table_of(run), owner, rows)
    return rows


@contextmanager
def interrupted(path: Path | None, way_on: str):
    """Around an evaluation that is kept in `path`: a signal is one line that says how to go on."""
    try:
        yield
    except Stopped as stopped:
        kept = "nothing was done yet" if path else "nothing is kept without --output"
        if path and path.exists():
            kept = f"what is done is in {path}: {way_on}"
        stop(f"{stopped}: {kept}", stopped.code)


def check_new(flag: str, name: str, suffix: str = "") -> None:
    """ValueError if a file can't be written as new: said before an evaluation's hours, not after.

    suffix: of what is written beside it on the way.
    """
    path = Path(name + suffix)
    try:
        if Path(name).exists():
            raise ValueError(f"{flag} {name}: it exists; name a new file")
        there = path.exists()
        open(path, "a").close()  # nothing else tells: root may write where its disk is read-only
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {name} can't be written: {error.strerror}") from None


def check_page(config) -> None:
    """The same of --html; an evaluation that is gone on with may have written it already."""
    header = (left_over(path_of(config.output)) or [{}])[0] if config.output else {}
    if header.get("html") != config.html:
        check_new("--html", config.html)


@contextmanager
def keeping(output: str):
    """Around what writes an evaluation's files: a failure is one line that says what is kept."""
    try:
        yield
    except OSError as error:
        path, why = path_of(output), error.strerror or error
        kept = f"{len(left_over(path)[1:]):,} conversations are kept in {path}"
        stop(
            f"--output {output} can't be written ({why}): {kept}, the same call goes on from there"
        )


def finish_output(output: str, contents: dict) -> None:
    checkpoint.write_text(Path(output), json.dumps(contents, indent=1) + "\n")
    path_of(output).unlink()


def open_output(config, cast, env, problems, left: list[dict]) -> list[dict]:
    """The conversations among what is `left` beside --output, whose file is made ready for more.

    One that was left by other flags or with other contents (training/run.py) is a ValueError.
    """
    path, header = path_of(config.output), asdict(config)
    for name in ("cache_tokens", "reference"):  # who ran out of memory may go on with less
        del header[name]
    header |= contents_of(env, cast[0].model, {config.split: problems})
    header["the reflector's weights"] = fingerprint(cast[1].model)
    before, *rows = left or [header]
    changed = [key.removeprefix("the ") for key in header if before.get(key) != header[key]]
    if rows and changed:  # of a header alone nothing is lost
        raise ValueError(
            f"{path} was left by an evaluation with another {', '.join(changed)}: "
            "delete or finish it"
        )
    done = rows[: len(rows) - len(rows) % config.samples]
    begin(path, header | {"day": env.day}, done)
    return done
