"""A verifier of the user's own, in processes that may hang or end: the file run as a worker too.

A worker imports the user's file and answers a line of JSON at a time. It is none of the caller's
children by fork, which may hold a model and threads; it holds nothing back from the file either:
the user trusts it. It may print: that goes to stderr.
"""

import atexit
import json
import os
import runpy
import select
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress

START = 120.0  # seconds to import the user's file
SHOWN = 300  # characters of a response in an error


class OwnError(Exception):
    """A fault of the user's file: where, what, and with which response."""


def verdict(path: str, response: str, problem: dict, seconds: float) -> float:
    """What the file's verify(response, problem) returns, from 0 to 1; 0 if it takes too long.

    seconds: on the clock. Raises OwnError if verify raises, ends its process or returns something
    else. Any number of threads may call it.
    """
    worker = _take(path)
    reply = _ask(worker, json.dumps([response, problem]), seconds)
    if reply and "value" in reply:
        with _lock:
            _idle.setdefault(path, []).append(worker)
        return reply["value"]
    worker.kill()
    code = worker.wait()
    if reply is None:
        _late(path, seconds)
        return 0.0
    fault = reply.get("fault", f"verify has ended its process (exit code {code})")
    shown = response if len(response) <= SHOWN else response[:SHOWN] + " ..."
    raise OwnError(f"{path}, {fault}, with the response {shown!r} to {json.dumps(problem)}")


def _late(path: str, seconds: float) -> None:
    global _told
    if not _told:  # once is enough
        print(f"{path}: verify took over {seconds:g} seconds: counted as wrong", file=sys.stderr)
    _told = True


def _take(path: str) -> subprocess.Popen:
    """A worker that has nothing to do, or a new one; OwnError if the file can't be imported."""
    with _lock:
        if _idle.get(path):
            return _idle[path].pop()
    command = [sys.executable, "-P", os.path.abspath(__file__), os.path.abspath(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    worker = subprocess.Popen(command, **pipes, start_new_session=True)  # no Ctrl-C
    with _lock:
        _all.append(worker)
    ready = _ask(worker, None, START)
    if not ready or "fault" in ready:
        worker.kill()
        fault = (ready or {}).get("fault", "it can't be imported: its own words are on stderr")
        raise OwnError(f"{path}, {fault}")
    return worker


def _ask(worker, line: str | None, seconds: float) -> dict | None:
    """Its next reply; None if it takes longer, {} if it has ended."""
    ends, reply = time.monotonic() + seconds, b""
    with suppress(BrokenPipeError):
        if line is not None:
            worker.stdin.write(line.encode() + b"\n")
    while not reply.endswith(b"\n"):
        left = max(0.0, ends - time.monotonic())
        if not select.select([worker.stdout], [], [], left)[0]:
            return None
        part = os.read(worker.stdout.fileno(), 2**16)
        if not part:
            return {}
        reply += part
    return json.loads(reply)


def fault_of(error: BaseException, path: str) -> str:
    """`line 12: KeyError: 'x'`, the last line of the file that was reached."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}".rstrip(": ")


def _end_with(caller: int) -> None:
    """A verdict that hangs would outlive it. (PR_SET_PDEATHSIG goes by threads, which end.)"""
    while os.getppid() == caller:
        time.sleep(0.5)
    os._exit(1)


def _serve(path: str) -> None:
    """The worker: ends with the caller."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**what):
        replies.write(json.dumps(what) + "\n")

    try:
        sys.path.insert(0, os.path.dirname(path))
        verify = runpy.run_path(path)["verify"]
    except Exception as error:
        return reply(fault=fault_of(error, path))
    reply(ready=True)
    for line in sys.stdin:
        try:
            value = verify(*json.loads(line))
            if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
                raise ValueError(f"verify returned {value!r}, not True, False or 0.0 to 1.0")
            reply(value=float(value))
        except Exception as error:
            reply(fault=fault_of(error, path))


def _reset() -> None:
    """What a process starts with, a forked child too: it must not talk on its parent's pipes."""
    global _idle, _all, _lock, _told
    _idle, _all, _lock, _told = {}, [], threading.Lock(), False


def _stop() -> None:
    for worker in _all:
        worker.kill()


if __name__ == "__main__":
    _serve(sys.argv[1])
else:
    _reset()
    os.register_at_fork(after_in_child=_reset)
    atexit.register(_stop)
