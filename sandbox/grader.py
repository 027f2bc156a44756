"""Grades answers with math-verify, in processes that may hang, crash or run out of memory.

math-verify's own timeout works in a main thread only, and sympy can spend hours or gigabytes on a
short answer. So a server process imports math-verify once and forks a worker (10 ms) whenever one
is wanted or has died; each worker answers one line of JSON at a time. It is this file run as a
script: nothing is forked from the caller, which may hold a model and threads, and nothing of the
caller is imported again.
"""

import atexit
import ctypes
import gc
import importlib.util
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

TIMEOUT = 5.0  # seconds of processor time a verdict: it must not depend on what else runs
WALL = 4  # times the timeout: how long a worker is waited for, in seconds on the clock
MEMORY = 1 << 30  # bytes of address space of a worker
# two irrational numbers are equal if they agree so far behind the point: sympy proves no more
DIGITS = 50
WORKERS = max(4, os.cpu_count() or 1)  # at a time
# what a server is shown first: its parser is faster for it, and to find them unequal is a fault
SAME = [
    (r"\frac{1}{2}+3\sqrt{2}x", r"0.5+\sqrt{18}x"),
    ("x^2-5x=3", "x^2=5x+3"),
    ("(1,2.5)", r"(1,\frac{5}{2})"),
    (r"\begin{pmatrix}1\\1.5\pi\end{pmatrix}", r"\begin{pmatrix}1\\\frac{3\pi}{2}\end{pmatrix}"),
    ("1,234", "1234"),
]


def equivalent(gold: str, answer: str, timeout: float = TIMEOUT) -> bool:
    """True if math-verify finds two LaTeX answers equal.

    False too if it hangs, crashes or wants too much memory. A worker that dies of anything but its
    limits is replaced and asked once more. Raises ImportError if math-verify is not installed,
    RuntimeError if no worker can be started. Any number of threads may call it.
    """
    request = json.dumps([gold, answer, timeout]).encode() + b"\n"
    with _slots:
        for fresh in (False, True):
            worker = _idle.pop() if _idle and not fresh else _start_worker()
            started = time.monotonic()
            reply = _ask(worker, request, timeout)
            if reply:
                _idle.append(worker)
                return reply == b"1"
            worker.close()
            if time.monotonic() - started >= timeout:
                return False
    return False


def _ask(worker: socket.socket, request: bytes, timeout: float) -> bytes:
    """b"0" or b"1", or b"" from a worker that is lost."""
    # long after the worker's own limit, if it is not stopped or starved
    worker.settimeout(WALL * timeout)
    try:
        worker.sendall(request)
        return worker.recv(1)
    except OSError:
        return b""


def _start_worker() -> socket.socket:
    global _server
    for _ in range(2):  # a server may have died just now
        with _lock:
            if _server is None or _server[0].poll() is not None:
                _server = _start_server()
            process, control = _server
            ours, theirs = socket.socketpair()
            with theirs, suppress(OSError):
                socket.send_fds(control, [b"+"], [theirs.fileno()])
        ours.settimeout(60)
        with suppress(OSError):
            if ours.recv(1) == b"r":
                return ours
        ours.close()
        process.kill()
        process.wait()
    raise RuntimeError("grader.py could not start a worker: its own words are on stderr")


def _start_server() -> tuple[subprocess.Popen, socket.socket]:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("grading mathematics needs math-verify: pip install -r requirements.txt")
    if _server is not None:
        _server[1].close()
    ours, theirs = socket.socketpair()
    # -P: not this folder, whose names would hide others'; a session of its own: no Ctrl-C
    with theirs:
        command = [sys.executable, "-P", os.path.abspath(__file__), str(theirs.fileno())]
        options = {"pass_fds": [theirs.fileno()], "start_new_session": True}
        options["env"] = os.environ | {"PYTHONHASHSEED": "0"}  # sympy orders terms by hashes
        return subprocess.Popen(command, **options), ours


def _reset() -> None:
    """What a process starts with, a forked child too: it must not talk on its parent's sockets."""
    global _idle, _lock, _server, _slots
    _idle, _lock, _server, _slots = [], threading.Lock(), None, threading.BoundedSemaphore(WORKERS)


def _stop() -> None:
    if _server is not None:
        _server[0].kill()  # and with it, by PR_SET_PDEATHSIG, all workers
        _server[0].wait()


def _serve(control: socket.socket) -> None:
    """The server: a worker for every socket that comes in, until the caller is gone."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not all(_verdict(gold, answer) for gold, answer in SAME):
        advice = "install the version in requirements.txt"
        raise RuntimeError(f"math-verify does not find equal what is: {advice}")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    server = os.getpid()
    while True:
        received, worker, *_ = socket.recv_fds(control, 1, 1)
        if not received:
            return
        if os.fork() == 0:
            control.close()
            _work(socket.socket(fileno=worker[0]), server)
            os._exit(0)
        os.close(worker[0])


def _work(caller: socket.socket, server: int) -> None:
    """A worker: the kernel kills it when a verdict takes too long, or when the server is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        return
    caller.sendall(b"r")
    for line in caller.makefile("rb"):
        gold, answer, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout)
        verdict = _verdict(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        caller.sendall(b"1" if verdict else b"0")


def _verdict(gold: str, answer: str) -> bool:
    from math_verify import verify

    try:
        return verify(_parse(gold), _parse(answer), numeric_precision=DIGITS, timeout_seconds=None)
    except Exception:  # recursion and memory too
        return False


def _parse(text: str) -> list:
    """math-verify's reading of an answer, an expression and a string, with its numbers exact.

    Else it rounds decimals to six places and differences of constants to fifteen: 0.3333333 would
    be 1/3.
    """
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    found = parse(rf"\boxed{{{text}}}", config, extraction_mode="first_match", parsing_timeout=None)
    return [item if isinstance(item, str) else _exact(item) for item in found]


def _exact(expression):
    from sympy import Expr, Float, Rational, UnevaluatedExpr

    decimals = {number: Rational(str(number)) for number in expression.atoms(Float)}
    expression = expression.xreplace(decimals)
    if not isinstance(expression, Expr) or expression.free_symbols:
        return expression
    if expression.has(UnevaluatedExpr):
        return expression  # a percentage stays one
    value = expression.doit()  # 10^{-200}
    return value if value.is_Rational else expression


_reset()
os.register_at_fork(after_in_child=_reset)
atexit.register(_stop)

if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
