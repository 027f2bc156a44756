"""Where a part's results go: one measurement, one line of JSON, written at once."""

import gc
import json
import math
import mmap
import time
import traceback
from statistics import median

import torch

from sampling import attention

DONE = "done"  # what a part that came to its end was doing last


class Part:
    """What a part knows of its run, and how it says what it finds.

    small: a rehearsal with small sizes; left(): seconds until its time is up. `doing` is shared
    with the process that watches over this one: what is measured now.
    """

    def __init__(self, name: str, out: str, seconds: float, small: bool = False):
        self.name, self.out, self.small = name, out, small
        self.ends = time.monotonic() + seconds
        self.shared = mmap.mmap(-1, 512)

    @property
    def doing(self) -> str:
        return self.shared[:].rstrip(b"\0").decode(errors="ignore")

    @doing.setter
    def doing(self, text: str) -> None:
        self.shared[:] = text.encode()[:512].ljust(512, b"\0")

    def left(self) -> float:
        return self.ends - time.monotonic()

    def write(self, **row) -> None:
        """A line; it has the key `error` if it is one of a measurement that failed."""
        line = json.dumps({"part": self.name, **tidy(row)}, default=str)
        print(line, flush=True)
        with open(self.out, "a") as file:
            file.write(line + "\n")

    def skip(self, name: str, why: str) -> None:
        self.write(name=name, skipped=why)

    def measure(self, name: str, function, *arguments, needs: float = 1.0):
        """Writes what function(*arguments) returns, a dict, or what it raises, and returns it.

        needs: seconds, without which it is not even begun. An `error` of None counts as none.
        """
        if self.left() < needs:
            return self.skip(name, f"{self.left():.0f} s left, it may take {needs:.0f}")
        started = time.monotonic()
        row = self.guarded(name, function, *arguments) or {}
        row = {key: value for key, value in row.items() if key != "error" or value}
        self.write(name=name, s=time.monotonic() - started, **row)
        return row

    def section(self, name: str, function, *arguments) -> None:
        """Several measurements: nothing is written for itself, but if it raises; all goes on.

        What it made is gone afterwards: sharded models hold themselves, in circles.
        """
        row = self.guarded(name, function, *arguments)
        if row:
            self.write(name=name, **row)
        gc.collect()
        if gpu():
            torch.cuda.empty_cache()

    def guarded(self, name: str, function, *arguments):
        """What it returns, or a description of what it raises."""
        self.doing = name
        try:
            row = function(*arguments)
        except Exception as error:
            row = described(error)
        self.doing = ""
        if row and "error" in row and gpu():  # or the next one would lack what this one held
            gc.collect()
            torch.cuda.empty_cache()
        return row


def described(error: BaseException) -> dict:
    """What an exception says, where it comes from, and the end of its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    trace = "".join(traceback.format_exception(error))[-2500:]
    return {"error": f"{type(error).__name__}: {error}"[:600], "at": at, "trace": trace}


def wrong(**checks: bool) -> dict:
    """An error that names the checks which came out False; {} if none did."""
    failed = [name.replace("_", " ") for name, fine in checks.items() if not fine]
    return {"error": f"wrong: {', '.join(failed)}"} if failed else {}


def tidy(value):
    """Floats with four digits, and as text where JSON has no number for them."""
    if isinstance(value, dict):
        return {key: tidy(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if gpu() else "cpu"


def sync() -> None:
    if gpu():
        torch.cuda.synchronize()


def once(function) -> float:
    """Seconds of one call."""
    sync()
    started = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - started


def timed(function, repeats: int = 5, warm: int = 2) -> float:
    """Seconds of a call, the median of some, after `warm` that do not count."""
    for _ in range(warm):
        function()
    return median(once(function) for _ in range(repeats))


def allow_cudnn(wanted: bool) -> None:
    """cuDNN's attention, which plans anew for each shape; on a CPU this does nothing."""
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    attention.CUDNN = wanted  # in ours, too


def cudnn_allowed() -> bool:
    return attention.CUDNN and torch.backends.cuda.cudnn_sdp_enabled()


def peak_gib() -> float | None:
    """Of the GPU's memory since the last call; None on a CPU."""
    if not gpu():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak
