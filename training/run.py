"""A run's directory: opened or resumed, locked, written to, and what is said when it can't be."""

import fcntl
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from sampling.turns import today
from tasks.base import FOLLOW_UPS
from training import checkpoint
from training.command import BEGAN, OF_THIS_CALL
from training.distributed import exchange, on_first, rank
from training.models import fingerprint

LOGS = ("metrics.jsonl", "transcripts.txt", "rollouts.jsonl")
OURS = {*LOGS, "config.json", "states", "checkpoint", "results.json", "failures.jsonl"}
EMPTY = {".lock", "config.json.new"}  # what a run that was killed as it began may have left
_locks = {}  # of this process, held until it ends


def check_run(config) -> str:
    """The day of the run's prompts (sampling/turns.py): on which it is, or was, started.

    Refuses a directory that can't be written or that holds something, unless --resume goes on with
    it (training/command.py has compared the flags). One that is complete ends here, with exit code
    0: a job that is started again until it succeeds has an end. Writes nothing.
    """
    day, complete = on_first(_check_run, config)
    if complete:
        stop(complete, code=0)
    return day


def _check_run(config) -> tuple[str, str]:
    """(the day, what is said of a run that is complete)"""
    run = Path(config.output_dir)
    require_writable(run, "--output_dir")
    there = {path.name for path in run.iterdir()} - EMPTY if run.is_dir() else set()
    # the log of the very command that is to start it, say; but no folders, as among sources
    only_files = not any((run / name).is_dir() for name in there)
    if not there or config.resume and only_files and not there & OURS:
        return today(), ""
    file = run / "config.json"
    before = read_config(file)
    if not config.resume or "contents" not in before:
        raise ValueError(f"--output_dir {run} {what_holds(run, there, config, before)}")
    lock(run)  # a job that was started twice should not load a model to learn it
    complete = "results.json" in there and not has_grown(config, before)
    said = f"{run} is complete, its figures are in results.json; {longer(config, before)}"
    return before.get("day") or today(), said if complete else ""


def read_config(file: Path) -> dict:
    """A run's config.json; {} if it is none."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def what_holds(run: Path, there: set[str], config, before: dict) -> str:
    """Why no run can begin in this directory, and what else can be done."""
    others = (Path(f"{run.absolute() if run.name == '' else run}_{n}") for n in itertools.count(2))
    free = next(path for path in others if not path.exists())
    said = f"name another ({free} is free)"
    if "contents" not in before:
        return f"is in use, and holds no run that could go on: {said}"
    if "results.json" in there:
        return f"holds a finished run: {said}; {longer(config, before)}"
    return f"holds a run that has not ended: go on with it (--resume), or {said}"


def longer(config, before: dict) -> str:
    """How a run is made longer."""
    more = [f"--{name} above {before[name]}" for name in growing(config) if before.get(name)]
    return f"to make it longer: --resume {more[0]}" if more else "a longer one is a new run"


def growing(config) -> list[str]:
    """The flags by which a run can be made longer."""
    return [f.name for f in fields(config) if f.metadata.get("grows")]


def has_grown(config, before: dict) -> bool:
    return any(getattr(config, name) > before.get(name, 0) for name in growing(config))


def require_writable(path: Path, name: str) -> None:
    """ValueError unless files can be made in this directory, which is made for a moment."""
    missing = []
    try:
        missing += [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        str(path).encode()  # in UTF-8, as those who write models want it
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, UnicodeEncodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} {ascii(str(path))[1:-1]} can't be written: {why}") from None
    finally:
        with suppress(OSError):  # another process is there already
            for folder in missing:
                folder.rmdir()


def has_state(config) -> bool:
    """Whether a saved state is there, from which the run goes on; else it starts."""
    return bool(on_first(checkpoint.states, Path(config.output_dir)))


def open_run(config, contents: dict[str, str], day: str) -> Path:
    """The run's directory, made if need be, with its config.json, and locked.

    contents: of `contents_of`; those that the run was started with, else a ValueError. day: of its
    prompts.
    """
    run = Path(config.output_dir)
    with saving(run):
        on_first(_open_run, config, contents, day)
    if not all(exchange((run / "config.json").exists())):
        raise ValueError(
            f"--output_dir {run}: not all ranks see it; it must be on a file system that they share"
        )
    return run


def _open_run(config, contents: dict[str, str], day: str) -> None:
    _check_run(config)  # what was free may have been taken
    run = Path(config.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    flags = {k: v for k, v in asdict(config).items() if k not in OF_THIS_CALL}
    file = run / "config.json"
    if file.exists():
        before = json.loads(file.read_text())
        known = before.get("contents", {})
        changed = [name for name in contents if contents[name] != known.get(name, contents[name])]
        if changed:
            raise ValueError(
                f"--resume: {run} was started with another content of: {', '.join(changed)}"
            )
        state = checkpoint.newest_state(run, config.skip_damaged)
        results, model = run / "results.json", run / "checkpoint"
        if state is None and (results.exists() or model.exists()):
            raise ValueError(f"--resume: {run} has no saved state left to go on from")
        if results.exists():  # of a shorter run, which this one has outgrown
            results.rename(run / f"results_{state.name}.json")
    text = json.dumps(flags | {"contents": contents, "day": day}, indent=2)
    checkpoint.write_text(file, text + "\n")


def time_is_up(config) -> bool:
    """Whether --max_minutes are over; the same on all ranks."""
    if config.max_minutes is None:
        return False
    return on_first(lambda: time.monotonic() - BEGAN > 60 * config.max_minutes)


def lock(run: Path) -> None:
    """For this process alone, until it ends in whatever way."""
    if run.resolve() in _locks:
        return
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--output_dir {run} is in use by another process, which is still running"
        ) from None
    except OSError as error:
        raise ValueError(f"--output_dir {run} can't be locked: {error.strerror}") from None
    _locks[run.resolve()] = file


def contents_of(env, model, splits: dict[str, list], failures: list | None = None) -> dict:
    """{what: its hash}, of all that a run depends on besides its flags."""

    def digest(x) -> str:
        text = json.dumps(x, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    tokenizer = env.tokenizer
    words = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words += [backend.to_str()] if backend is not None else []
    data = {
        name: [*zip(problems, env.prompts(problems), strict=True)]
        for name, problems in splits.items()
    }
    data |= {} if failures is None else {"failures": failures}
    data["what is said between turns"] = [env.seam(name) for name in FOLLOW_UPS]
    data |= {"the task's file": env.task.file} if env.task.file else {}
    named = {name: digest(x) for name, x in data.items()}
    return {"the model's weights": fingerprint(model), "the tokenizer": digest(words)} | named


@contextmanager
def saving(run: Path):
    """Around what writes to the run's directory: a failure is one line that says what is safe."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException  # takes a second

    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        stop(f"{run} can't be written ({causes[0]}): {newest(run)}")


def stop(message: str, code: int = 1):
    """Ends the run, on every rank; the first one says why."""
    if rank() == 0:
        # beside the progress bar
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def newest(run: Path) -> str:
    names = (path.name for path in checkpoint.states(run))
    return f"the newest saved state is {next(names, 'none')}"


def log(run: Path, row: dict, text: str) -> None:
    """A line of metrics, and the transcripts of an evaluation if there was one."""
    for name, more in zip(LOGS[:2], (json.dumps(row) + "\n", text), strict=True):
        if more:
            with open(run / name, "a") as file:
                file.write(more)


def log_sizes(run: Path) -> dict:
    """How long the logs are, which are synced.

    What is written later is written again by a run resumed from here.
    """
    there = [run / name for name in LOGS if (run / name).exists()]
    for path in there:
        checkpoint.sync(path)
    return {path.name: path.stat().st_size for path in there}


def cut_logs(run: Path, sizes: dict) -> None:
    for path in (run / name for name in LOGS):
        size = path.stat().st_size if path.exists() else 0
        if size < sizes.get(path.name, 0):
            raise ValueError(f"--resume: {path} has lost lines: {size} bytes of {sizes[path.name]}")
        if size:
            os.truncate(path, sizes.get(path.name, 0))
