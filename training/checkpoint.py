"""Saved states and exported models: complete or not at all, and checked before use.

Any number of processes can read what another number has written. A state is a directory
run/states/step_000020 with

    tensors/         what is trained and the optimiser's moments, float32, in the format of
                     torch.distributed.checkpoint; the reference only where it is not --model
    memory.json      all else: the step, the best window so far, the algorithm's own memory
    best/            the best model so far, as run/checkpoint is, a copy of it: in Hugging Face
                     format, or PEFT's
    manifest.json    size and SHA-256 of every file, written last

It is written under another name, synced, and renamed, so a state with its name is whole unless the
disk has lost some of it, which the manifest shows. There is no random state in it and no place in
the data: every sample's seed and every step's problems are functions of the run's seed and the step
(batches.row_seeds, batches.pick_things).
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from training import distributed

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no mistake, if alone

STATE = re.compile(r"step_\d+")


def save_model(model, tokenizer, path: Path, weights: dict | None = None) -> None:
    """In Hugging Face format, complete or not at all; `weights` in place of the model's own.

    They are written in the dtype that the model was published in (models.ready).
    """
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    dtype = getattr(model, "saved_dtype", model.dtype)
    weights = dict(model.named_parameters()) if weights is None else weights
    model.save_pretrained(fresh, state_dict={k: w.detach().to(dtype) for k, w in weights.items()})
    tokenizer.save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")  # not what it was trained in
    write_text(fresh / "config.json", json.dumps(config, indent=2) + "\n")
    for file in fresh.glob("*.safetensors"):  # which nobody else may read, if left as they are
        shutil.copymode(fresh / "config.json", file)
    publish(fresh, path)


def publish(fresh: Path, path: Path) -> None:
    """Puts `fresh` where `path` is: at any moment the old or the new one is there, and whole."""
    for file in [*fresh.rglob("*"), fresh]:
        sync(file)
    if path.exists():
        swap(fresh, path)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        fresh.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap(a: Path, b: Path) -> None:
    """Two directories change names at once; where none can (it takes Linux), b is gone a moment."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        failed = ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange)
    except AttributeError:  # not this C library
        failed = True
    if failed:
        shutil.rmtree(b)
        a.rename(b)


def write_text(path: Path, text: str) -> None:
    """A file, complete or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)


def states(run: Path) -> list[Path]:
    """All that are there, the newest first."""
    found = [path for path in (run / "states").glob("step_*") if STATE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def tensors_of(scorer, optimizer, with_reference: bool) -> dict:
    """Of a state, by name; the optimiser's moments are made if it has none yet.

    The reference is read again from --model, unless an algorithm has changed it.
    """
    tensors = {}
    kind = "model" if scorer.adapters is None else "adapters"
    for name, parameter in scorer.trained.named_parameters():
        moments = optimizer.state[parameter]
        if not moments:
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=zeros["exp_avg"].device)
            moments.update(step=step, **zeros)
        tensors[f"scorer.{kind}.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    for name, parameter in scorer.frozen.named_parameters() if with_reference else ():
        tensors[f"scorer.reference.{name}"] = parameter
    return tensors


def save_state(run: Path, scorer, optimizer, memory: dict, save_best, keep: int) -> None:
    """Adds a state, and drops all but the `keep` newest.

    `save_best(path)` writes the model if it is the best by now; None: the best one is that of the
    state before.
    """
    step, here = memory["step"], run / "states"
    fresh, path = here / f"new_{step:06d}", here / f"step_{step:06d}"

    def begin():
        clean(run)
        fresh.mkdir(parents=True)
        write_text(fresh / "memory.json", json.dumps(memory))
        before = [state / "best" for state in states(run) if (state / "best").is_dir()]
        if save_best is None and before:
            link(before[0], fresh / "best")

    def end():
        write_text(fresh / "manifest.json", json.dumps(digests(fresh), indent=1))
        publish(fresh, path)
        if save_best is not None:
            publish_best(run, path)
        for old in states(run)[keep:]:
            old.rename(here / f"old_{old.name}")
        clean(run)

    import torch.distributed.checkpoint as dcp  # takes a second

    distributed.on_first(begin)
    if save_best is not None:
        save_best(fresh / "best")
    alone = not distributed.together()
    tensors = tensors_of(scorer, optimizer, memory["state"].get("own_reference", False))
    dcp.save(tensors, checkpoint_id=fresh / "tensors", no_dist=alone)
    distributed.on_first(end)


def load_state(path: Path, scorer, optimizer) -> dict:
    """All tensors into their places, over whatever ranks they are spread; returns the memory."""
    import torch.distributed.checkpoint as dcp  # takes a second

    memory = distributed.on_first(lambda: json.loads((path / "memory.json").read_text()))
    tensors = tensors_of(scorer, optimizer, memory["state"].get("own_reference", False))
    dcp.load(tensors, checkpoint_id=path / "tensors", no_dist=not distributed.together())
    return memory


def clean(run: Path) -> None:
    """Deletes what a save that was cut off has left behind."""
    for path in (run / "states").glob("*"):
        if path.name.startswith(("new_", "old_")):
            shutil.rmtree(path)


def link(source: Path, target: Path) -> None:
    """A copy of an exported model, whose weights take no second place on the disk, if it can."""

    def copy(file: str, place: str) -> None:
        if file.endswith(".safetensors"):
            with suppress(OSError):
                return os.link(file, place)
        shutil.copy2(file, place)

    shutil.copytree(source, target, copy_function=copy)


def publish_best(run: Path, state: Path | None) -> None:
    """run/checkpoint becomes the best model as of this state, if it has one."""
    fresh = run / "checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    if state is not None and (state / "best").is_dir():
        link(state / "best", fresh)
        publish(fresh, run / "checkpoint")


def digests(state: Path) -> dict:
    """{file: [size, SHA-256]} of all but the manifest."""

    def digest(path: Path) -> list:
        with open(path, "rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    files = sorted(p for p in state.rglob("*") if p.is_file() and p.name != "manifest.json")
    names = [str(path.relative_to(state)) for path in files]
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(digest, files), strict=True))


def damage(state: Path) -> str | None:
    """What is wrong with a state, if anything is."""
    try:
        expected = json.loads((state / "manifest.json").read_text())
    except FileNotFoundError:
        return "manifest.json is missing"
    except ValueError:
        return "manifest.json is no JSON"
    found = digests(state)
    for name, (size, digest) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes in place of {size}"
        if found[name][1] != digest:
            return f"{name} has changed"
    return None


def newest_state(run: Path, skip_damaged: bool) -> Path | None:
    """The newest state, or None if there never was one.

    A damaged one is a ValueError, or set aside if so asked; ValueError too if none is left then.
    """
    found = states(run)
    for state in found:
        fault = damage(state)
        if fault is None:
            return state
        if not skip_damaged:
            way_out = "take the one before it with --skip_damaged"
            raise ValueError(f"--resume: {state} is damaged ({fault}): {way_out}")
        print(f"{state} is damaged ({fault}) and set aside", file=sys.stderr)
        aside = state.with_name(f"damaged_{state.name}")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
    if found:
        none_left = "has no saved state that is whole: start a new run elsewhere"
        raise ValueError(f"--resume: {run} {none_left}")
    return None
