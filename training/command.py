"""A script's flags are the fields of one dataclass: read, checked, taken from a run that goes on.

Bad input is one line, exit code 2, before any long work.
"""

import argparse
import difflib
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import get_args

from sandbox.own import OwnError
from tasks.own import is_own
from training.distributed import HEARD, Stopped
from training.fitting import fitted

BEGAN = time.monotonic()  # of this process, for --max_minutes
DATA, ALGORITHM, RUN, MACHINE = "model and data", "algorithm", "run", "machine"
GROUPS = (DATA, ALGORITHM, RUN, MACHINE)  # of --help, in this order
LARGEST = {int: 2**31 - 1, float: math.inf}  # unless a flag says otherwise
OF_THIS_CALL = ("resume", "output_dir", "skip_damaged", "max_minutes")  # never taken from a run


def flag(default, text: str, group: str = ALGORITHM, **more):
    """A dataclass field that is a command-line flag with a help line.

    more: `choices`; the range of a number, `least`, `above` or `most` (by default whole numbers
    are at least 1, or 0 if that is the default, and others at least 0); `other`, what other models
    than the embedded one get, and `paper`, what --preset paper sets (training/fitting.py); how it
    may differ when a run goes on: `free`, in any way, or `grows`; `positional`: given without its
    name.
    """
    return field(default=default, metadata={"help": text, "group": group, **more})


def first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def exit_on_bad_input():
    """Around a script's preparations: a ValueError is the user's to mend: one line, exit code 2."""
    try:
        yield
    except ValueError as error:
        _exit(2, f"error: {error}")


def _exit(code: int, message: str):
    if first_of_node():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def run_script(main, config_class) -> None:
    """`main` with the flags of the command line; SIGTERM or Ctrl-C is one line, 143 or 130.

    While a run trains, or something is evaluated, they do more: `distributed.listening`,
    `partial.interrupted`.
    """
    for number in HEARD:  # even where a shell has told a job in its background to ignore Ctrl-C
        signal.signal(number, _stop)
    try:
        main(parse_args(config_class))
    except Stopped as stopped:
        _exit(stopped.code, f"{stopped}: what was saved is as it was")
    except OwnError as error:  # on whichever rank it is
        said = f"--task {error}: mend the file, and start a new run"
        print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
        raise SystemExit(1) from None


def _stop(number, _):
    raise Stopped(number)


def parse_args(config_class, args: list[str] | None = None):
    """The dataclass, filled from the command line; what makes no sense is one line, exit code 2.

    What fits the model (training/fitting.py) takes the place of defaults, --preset that of both,
    neither ever that of a flag that was given. With --resume, what is not given is as the run in
    --output_dir has it.
    """
    with exit_on_bad_input():
        given = _given(config_class, sys.argv[1:] if args is None else args)
        of_run = flags_of_run(config_class, given) if given.get("resume") else {}
        config = fitted(config_class, of_run | given)
        check_numbers(config)
    return config


def _given(config_class, args: list[str]) -> dict:
    """{name: value} of the flags on the command line; ValueError for what is no flag."""

    def fail(message: str):
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]",
        description=getattr(sys.modules.get(config_class.__module__), "__doc__", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = fail
    known = {f.name: f for f in fields(config_class)}
    for title in dict.fromkeys([*GROUPS, *(f.metadata["group"] for f in known.values())]):
        own = getattr(config_class, "own_flags", title)
        group = parser.add_argument_group(own if title == ALGORITHM else title)
        for f in known.values():
            if f.metadata["group"] == title:
                _add(group, f)
    given, unknown = parser.parse_known_args([_underscored(arg) for arg in args])
    if unknown:
        flags = [name for name, f in known.items() if not f.metadata.get("positional")]
        fail(_unknown(unknown[0], flags))
    there = {name: value for name, value in vars(given).items() if value != []}
    return {k: " ".join(v) if isinstance(v, list) else v for k, v in there.items()}


def _add(group, f) -> None:
    values = [] if f.default is None else [f"default: {f.default}"]
    for name, whose in (("other", "another model"), ("paper", "--preset paper")):
        values += [f"{whose}: {f.metadata[name].said}"] if name in f.metadata else []
    text = f.metadata["help"] + (f" ({'; '.join(values)})" if values else "")
    text = text.replace("%", "%%")
    if f.metadata.get("positional"):
        group.add_argument(f.name, nargs="*", help=text)
        return
    if type_of(f) is not bool:
        choices = f.metadata.get("choices")
        group.add_argument(f"--{f.name}", type=type_of(f), choices=choices, help=text)
        return
    switch = {"type": _truth, "nargs": "?", "const": True, "metavar": "True|False"}
    group.add_argument(f"--{f.name}", help=text, **switch)
    off = {"dest": f.name, "action": "store_false", "default": argparse.SUPPRESS}
    group.add_argument(f"--no_{f.name}", help=argparse.SUPPRESS, **off)


def type_of(f) -> type:
    """Of a flag's value where it has one: int of `int | None`."""
    return next((kind for kind in get_args(f.type) if kind is not type(None)), f.type)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _underscored(arg: str) -> str:
    """--max-new-tokens, as some write it, is --max_new_tokens."""
    name, equals, value = arg.partition("=")
    is_flag = name.startswith("--") and " " not in name
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_flag else arg


def _unknown(arg: str, known) -> str:
    name = arg.partition("=")[0].removeprefix("--")
    close = [other for other in known if other.startswith(name)]
    close += difflib.get_close_matches(name, known, n=1)
    close = close if arg.startswith("-") else []
    said = f"unknown flag {arg}" if arg.startswith("-") else f"{arg!r} belongs to no flag"
    return f"{said}: did you mean --{close[0]}?" if close else f"{said}: see --help"


def check_numbers(config) -> None:
    """ValueError for a number that is not finite or not within its flag's range (`flag`)."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type_of(f)
        if value is None or kind not in (int, float):
            continue
        above, most = f.metadata.get("above"), f.metadata.get("most", LARGEST[kind])
        least = f.metadata.get("least", 1 if kind is int and f.default != 0 else 0)
        must = f"above {above:g}" if above is not None else f"at least {least:g}"
        must += f" and at most {most:,}" if most < LARGEST[kind] or value > most else ""
        inside = value > above if above is not None else value >= least
        if not (abs(value) < math.inf and inside and value <= most):  # nan is not below it either
            must = must if abs(value) < math.inf else "a finite number"
            shown = f"{value:g}" if kind is float else value
            raise ValueError(f"--{f.name} {shown}: must be {must}")


def flags_of_run(config_class, given: dict) -> dict:
    """{name: value} that the run in --output_dir goes on with; {} if no run is there yet.

    ValueError if a flag that was given is another than the run's, and it matters: see `flag`.
    """
    known = {f.name: f for f in fields(config_class)}
    run = Path(given.get("output_dir", known["output_dir"].default))
    file = run / "config.json"
    try:
        saved = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"--output_dir {run} can't be read: {error.strerror}") from None
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or "contents" not in saved:
        raise ValueError(f"--resume: {file} is not of a run, or damaged: name another --output_dir")
    before = {name: saved.get(name, f.default) for name, f in known.items()}
    changed = [name for name in given if name in before and not _may_be(known[name], before, given)]
    if changed:
        was = ", ".join(f"--{name} was {before[name]}, is {given[name]}" for name in changed)
        raise ValueError(
            f"--resume: {run} was started with other flags: {was}: leave them out, or start anew "
            "in another --output_dir"
        )
    return {name: value for name, value in before.items() if name not in OF_THIS_CALL}


def _may_be(f, before: dict, given: dict) -> bool:
    old, new = before[f.name], given[f.name]
    grown = f.metadata.get("grows") and new >= old > 0  # 0 leaves a whole stage out
    # of a task in a file its content is compared, wherever it is
    moved = f.name == "task" and is_own(old) and is_own(new)
    return new == old or grown or moved or f.metadata.get("free") or f.name in OF_THIS_CALL
