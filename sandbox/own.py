"""A verifier of the user's own, in processes that may hang or end: this file, run as a script.

A worker is sent the text of the user's file, runs it, and then answers a line of JSON at a time. It
is no fork of the caller's, which may hold a model and threads. The user trusts the file: nothing is
held back from it. What it prints goes to stderr, and there is nothing for it to read.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress

START = 120.0  # seconds to run the user's file
SLEEP = 10.0  # seconds on the clock beside those of processor time: for a verdict that waits
LATE = (-signal.SIGPROF, -signal.SIGALRM)  # how the kernel ends what takes too long
SHOWN = 300  # characters of a response, and of a problem, in an error


class OwnError(ValueError):
    """A fault of the user's file: where, what, and with what it was called."""


def verdict(path: str, text: str, response: str, problem: dict, seconds: float) -> float:
    """What the file's verify(response, problem) returns, from 0 to 1; 0 if it takes too long.

    text: the file's. seconds: of processor time; what sleeps has SLEEP more. Raises OwnError if
    verify raises, ends its process or returns something else. Any number of threads may call it.
    """
    worker = _take(path, text)
    request = json.dumps([response, problem, seconds, seconds + SLEEP])
    reply = _ask(worker, request, seconds + SLEEP + START)  # the worker ends itself before
    if "value" in reply:
        with _lock:
            _idle.setdefault((path, text), []).append(worker)
        return reply["value"]
    code = _bury(worker)
    if "fault" not in reply and code in LATE:
        _tell(
            f"{path}: verify took over {seconds:g} seconds, here and maybe again: such answers "
            "count as wrong (--verify_seconds)"
        )
        return 0.0
    fault = reply.get("fault", f"verify has ended its process (exit code {code})")
    given = f"with the response {shortened(repr(response))} to {shortened(json.dumps(problem))}"
    raise OwnError(f"{path}, {fault}, {given}")


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


def late() -> int:
    """How many verdicts have taken too long so far."""
    return _late


def _tell(text: str) -> None:
    global _late
    if not _late:  # once is enough
        print(text, file=sys.stderr)
    _late += 1


def _take(path: str, text: str) -> subprocess.Popen:
    """A worker that has nothing to do, or a new one; OwnError if the file can't be run."""
    with _lock:
        idle = _idle.get((path, text), [])
        while idle:
            worker = idle.pop()
            if worker.poll() is None:
                return worker
    command = [sys.executable, "-P", os.path.abspath(__file__)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    worker = subprocess.Popen(command, **pipes, start_new_session=True)  # no Ctrl-C
    with _lock:
        _all.add(worker)
    ready = _ask(worker, json.dumps([os.path.abspath(path), text]), START)
    if "ready" not in ready:
        code = _bury(worker)
        ended = f"it has ended (exit code {code}), or takes over {START:g} seconds to be run"
        raise OwnError(f"{path}, {ready.get('fault', ended)}")
    return worker


def _bury(worker: subprocess.Popen) -> int:
    """Ends a worker and what it has started; its exit code."""
    worker.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(0.2)  # it may be about to end by itself
    with suppress(OSError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.stdout.close()
    with _lock:
        _all.discard(worker)
    return worker.wait()


def _ask(worker: subprocess.Popen, line: str, seconds: float) -> dict:
    """Its reply; {} if it has ended, or takes longer."""
    reply, ready = b"", select.poll()
    ready.register(worker.stdout, select.POLLIN)
    with suppress(BrokenPipeError):
        worker.stdin.write(line.encode() + b"\n")
    while not reply.endswith(b"\n"):
        part = os.read(worker.stdout.fileno(), 2**16) if ready.poll(1000 * seconds) else b""
        if not part:
            return {}
        reply += part
    return json.loads(reply)


def run_file(path: str, text: str) -> dict:
    """What a file defines; whatever it raises is raised. It sees no flags, and its neighbours."""
    names, argv = {"__name__": "own_task", "__file__": path}, sys.argv
    sys.argv, folder = [path], os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(text, path, "exec"), names)
    finally:
        sys.argv = argv
    return names


def fault_of(error: BaseException, path: str) -> str:
    """`line 12: KeyError: 'x'`, the last line of the file that was reached."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}".rstrip(": ")


def _serve() -> None:
    """The worker: until the caller is gone."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor for the programs that it starts
    os.dup2(2, 1)

    def reply(**what):
        replies.write(json.dumps(what) + "\n")

    path, text = json.loads(requests.readline())
    signal.setitimer(signal.ITIMER_REAL, START)  # the caller may be gone before it ends by itself
    try:
        verify = run_file(path, text)["verify"]
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, SystemExit) as error:
        return reply(fault=fault_of(error, path))
    reply(ready=True)
    for line in requests:
        response, problem, *limits = json.loads(line)
        try:
            reply(value=_value(verify, response, problem, *limits))
        except (Exception, SystemExit) as error:
            reply(fault=fault_of(error, path))


def _value(verify, response: str, problem: dict, processor: float, clock: float) -> float:
    """The kernel ends this process if it takes longer, whatever holds it, caller or no caller."""
    timers = {signal.ITIMER_PROF: processor, signal.ITIMER_REAL: clock}
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    try:
        value = verify(response, problem)
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
    value = value.item() if hasattr(value, "item") else value  # numpy's, torch's
    if not isinstance(value, bool | int | float) or not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(f"verify returned {value!r}, not True, False or 0.0 to 1.0")
    return min(1.0, max(0.0, float(value)))


def _reset() -> None:
    """What a process starts with, a forked child too: it must not talk on its parent's pipes."""
    global _idle, _all, _lock, _late
    _idle, _all, _lock, _late = {}, set(), threading.Lock(), 0


def _stop() -> None:
    for worker in [*_all]:
        _bury(worker)


if __name__ == "__main__":
    _serve()
else:
    _reset()
    os.register_at_fork(after_in_child=_reset)
    atexit.register(_stop)
