"""A run's directory: opened or resumed, locked, written to, and what is said when it can't be."""

import fcntl
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from sampling.turns import today
from training import checkpoint
from training.distributed import exchange, on_first, rank
from training.models import fingerprint

# flags that change no result, and may differ when a run is resumed
FREE = ("resume", "output_dir", "skip_damaged", "keep", "hsdp", "cpu_offload", "checkpointing")
LOGS = ("metrics.jsonl", "transcripts.txt")
_locks = {}  # of this process, held until it ends


def check_run(config) -> str:
    """The day of the run's prompts (sampling/turns.py): on which it is, or was, started.

    Refuses a directory that is in use, or to resume what is not there. Writes nothing.
    """
    return on_first(_check_run, config)


def _check_run(config) -> str:
    run = Path(config.output_dir)
    if not config.resume:
        if run.is_file() or run.is_dir() and any(run.iterdir()):
            raise ValueError(
                f"--output_dir {run} is in use: name another, or go on with it with --resume"
            )
        return today()
    if not (run / "config.json").is_file():
        raise ValueError(
            f"--resume: {run} has no config.json to go on from; start a new run elsewhere"
        )
    flags, before = asdict(config), json.loads((run / "config.json").read_text())
    # a flag that a run does not know had its default's effect
    changed = [k for k in flags if k not in FREE and k in before and flags[k] != before[k]]
    if changed:
        was = ", ".join(f"--{k} was {before.get(k)}, is {flags[k]}" for k in changed)
        raise ValueError(f"--resume: {run} was started with other flags: {was}")
    if (run / "results.json").exists():
        raise ValueError(
            f"--resume: {run} is complete, its results are in results.json: nothing is left to do"
        )
    return before.get("day") or today()


def open_run(config, contents: dict[str, str], day: str) -> Path:
    """The run's directory, made with its config.json unless it is resumed, and locked.

    contents: of `contents_of`; those that the run was started with, else a ValueError. day: of its
    prompts.
    """
    on_first(_open_run, config, contents, day)
    run = Path(config.output_dir)
    if not all(exchange((run / "config.json").exists())):
        raise ValueError(
            f"--output_dir {run}: not all ranks see it; it must be on a file system that they share"
        )
    return run


def _open_run(config, contents: dict[str, str], day: str) -> None:
    _check_run(config)
    run = Path(config.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    if not config.resume:
        text = json.dumps(asdict(config) | {"contents": contents, "day": day}, indent=2)
        return checkpoint.write_text(run / "config.json", text + "\n")
    before = json.loads((run / "config.json").read_text()).get("contents", {})
    changed = [name for name in contents if contents[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"--resume: {run} was started with another content of: {', '.join(changed)}"
        )
    checkpoint.newest_state(run, config.skip_damaged)


def lock(run: Path) -> None:
    """For this process alone, until it ends in whatever way."""
    if run.resolve() in _locks:
        return
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"--output_dir {run} is in use by another process, which is still running"
        ) from None
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
    named = {name: digest(x) for name, x in data.items()}
    return {"the model's weights": fingerprint(model), "the tokenizer": digest(words)} | named


@contextmanager
def saving(run: Path):
    """Around what writes to the run's directory: a failure is one line that says what is safe."""
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
    for name, more in zip(LOGS, (json.dumps(row) + "\n", text), strict=True):
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
