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
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from fractions import Fraction

TIMEOUT = 5.0  # seconds of processor time a verdict: it must not depend on what else runs
LOOK = 0.5  # seconds on the clock between looks whether a worker is at work
MEMORY = 1 << 30  # bytes of address space of a worker
# two irrational numbers are equal if they agree so far behind the point: sympy proves no more
DIGITS = 50
BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # nobody's own doing
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

    False too if it takes more than `timeout` seconds of processor time, crashes or wants too much
    memory. A worker that somebody kills or stops is replaced and asked once more. Raises
    ImportError if math-verify is not installed, RuntimeError if no worker can be started or both
    are lost. Any number of threads may call it.
    """
    request = json.dumps([gold, answer, timeout]).encode() + b"\n"
    with _slots:
        for fresh in (False, True):
            worker, pid = _idle.pop() if _idle and not fresh else _start_worker()
            reply = _ask(worker, pid, request)
            if reply in (b"0", b"1"):
                _idle.append((worker, pid))
                return reply == b"1"
            worker.close()
            if reply:
                return False
    # no fault of the answer: False would be a wrong reward
    raise RuntimeError("two grading workers were killed or stopped: is there enough memory?")


def _ask(worker: socket.socket, pid: int, request: bytes) -> bytes:
    """b"0" or b"1", b"t" from its server if the answer ended it, or b"" if it is lost."""
    worker.settimeout(LOOK)
    before = None
    try:
        worker.sendall(request)
        while True:
            try:
                return worker.recv(1)
            except TimeoutError:
                now = _used(pid)
                if now == before:
                    return b""
                before = now
    except OSError:
        return b""


def _used(pid: int) -> object:
    """A worker's processor time so far, if it sleeps or is stopped; else never twice the same.

    It may wait for a core, or have died: then its server will say so.
    """
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return object()
    return fields[11:13] if fields[0] in "STt" else object()


def _start_worker() -> tuple[socket.socket, int]:
    """A worker's socket, and its process id."""
    global _server
    for _ in range(2):  # a server may have died just now
        with _lock:
            if _server is None or _server[0].poll() is not None:
                _server = _start_server()
            process, control = _server
            ours, theirs = socket.socketpair()
            with theirs, suppress(OSError):
                socket.send_fds(control, [b"+"], [theirs.fileno()])
        ours.settimeout(120)
        with suppress(OSError, ValueError):
            return ours, int(ours.recv(20))
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
    from sandbox.cores import share_of_cores  # not in the server, which imports nothing of ours

    _idle, _lock, _server = [], threading.Lock(), None
    _slots = threading.BoundedSemaphore(share_of_cores())


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
    workers: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that tells of their end
    while True:
        for ready in select.select([control.fileno(), *workers], [], [])[0]:
            if ready in workers:
                _bury(ready, *workers.pop(ready))
                continue
            received, descriptors, *_ = socket.recv_fds(control, 1, 1)
            if not received:
                return
            caller, server = socket.socket(fileno=descriptors[0]), os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                for descriptor, (_, other) in workers.items():
                    os.close(descriptor)
                    other.close()
                _work(caller, server)
                os._exit(0)
            workers[os.pidfd_open(pid)] = pid, caller


def _bury(descriptor: int, pid: int, caller: socket.socket) -> None:
    """Only the kernel knows whether its own doing has ended a worker (SIGPROF is its limit)."""
    status = os.waitpid(pid, 0)[1]
    with caller, suppress(OSError):
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) not in BY_OTHERS:
            caller.send(b"t", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    os.close(descriptor)


def _work(caller: socket.socket, server: int) -> None:
    """A worker: the kernel kills it when a verdict takes too long, or when the server is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        return
    caller.sendall(b"%d" % os.getpid())
    for line in caller.makefile("rb"):
        gold, answer, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout)
        verdict = _verdict(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        with suppress(OSError):  # who asked may be gone: Ctrl-C, a kill
            caller.sendall(b"1" if verdict else b"0")


def _verdict(gold: str, answer: str) -> bool:
    from math_verify import verify
    from sympy import Rational, Symbol

    def equal(gold: list, answer: list) -> bool:
        gold, answer = ([_exact(item) for item in side] for side in (gold, answer))
        return verify(gold, answer, numeric_precision=DIGITS, timeout_seconds=None)

    try:
        gold, answer = _with_equal_letters(_parse(gold), _parse(answer))
        hundredth = Symbol(HUNDREDTH, real=True)
        # a percentage is its value, and its number where only one side says %: many write 20 so
        values = [{hundredth: Rational(1, 100)}]
        if _has(gold, hundredth) != _has(answer, hundredth):
            values.append({hundredth: Rational(1)})
        return any(equal(_replace(gold, v), _replace(answer, v)) for v in values)
    except Exception:  # recursion and memory too
        return False


HUNDREDTH = "hundredth"
# letters are digits where the base is above 10: 3A_{1} is a product
BASED = re.compile(
    r"(?<![0-9A-Za-z.\\])([0-9]+|[0-9][0-9A-F]*(?=[0-9A-F.]*_\{(?:1[1-9]|[23][0-9]))|"
    r"[0-9][0-9a-f]*(?=_\{16\}))(?:\.([0-9A-F]+))?_(?:\{([0-9]{1,2}|[A-Za-z])\}|([01A-Za-z]))"
)
MARKS = {"'": "minute", "''": "second", '"': "second"}  # and the degrees before them
MARKED = re.compile(r"(?<=[0-9])\s*(?:\^\s*\{?\s*\\circ\s*\}?|''|['\"])\s*(?=([0-9]?))")
# `E = (0,3)`: a name, that math-verify reads as a constant
NAME = re.compile(r"\A\s*(?:([A-Za-z]{0,2}[EIei][A-Za-z]{0,2})|\\([gG]amma))(?=\s*=)")


def _parse(text: str) -> list:
    """math-verify's reading of an answer: an expression, if it is one, and a string.

    Percent signs, minutes, bases and dots, which it drops, are letters. Units are gone already (its
    own list takes the letters of `2m` and `3ab` for some).
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    text = MARKED.sub(_marked, NAME.sub(r"N_{\1\2}", BASED.sub(_based, text)))
    text = text.replace(r"\%", rf"\cdot \variable{{{HUNDREDTH}}}")
    text = text.replace(r"\ldots", r"\variable{dots}")
    options = {"basic_latex": True, "malformed_operators": True, "nits": True}
    config = [LatexExtractionConfig(True, 0, NormalizationConfig(**options))]
    return parse(rf"\boxed{{{text}}}", config, extraction_mode="first_match", parsing_timeout=None)


def _marked(match: re.Match) -> str:
    unit = MARKS.get(match[0].strip(), "degree")
    return rf"\cdot\variable{{{unit}}}" + ("+" if match[1] else "")


def _based(match: re.Match) -> str:
    """52_8 is 42 times a letter: equal to no number with another base, or without."""
    whole, part, base = match[1], match[2] or "", match[3] or match[4]
    try:
        base = int(base)
        value = Fraction(int(whole + part, base), base ** len(part))
    except ValueError:  # 52_2, 52_b
        return rf"\variable{{{whole}and{part}base{base}}}"
    number = rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if part else str(value)
    return number + (rf"\variable{{base{base}}}" if base != 10 else "")


def _has(side: list, symbol) -> bool:
    return any(not isinstance(item, str) and item.has(symbol) for item in side)


def _replace(side: list, values: dict) -> list:
    from sympy.core.relational import Relational

    values = {old: new for old, new in values.items() if old != new}

    def replaced(item):
        if isinstance(item, str) or not item.has(*values):
            return item
        if hasattr(item, "_unsorted_args"):  # math-verify's own, which xreplace would sort
            return type(item)(*map(replaced, item._unsorted_args))
        if isinstance(item, Relational):  # not to become true or false
            return type(item)(*map(replaced, item.args), evaluate=False)
        return item.xreplace(values)

    return [replaced(item) for item in side]


def _with_equal_letters(gold: list, answer: list) -> tuple[list, list]:
    """A letter has the same assumptions on both sides.

    i is the imaginary unit, if it isn't an index. A letter is positive if an even root is real for
    one of its signs only: sqrt(1/m) is 1/sqrt(m) then, but sqrt(m^2) is not m. (Of sqrt(x+1) that
    holds for no letter: such roots are equal if sympy sees it without.)
    """
    from sympy import Equality, I, Pow, Symbol

    expressions = [item for item in gold + answer if not isinstance(item, str)]
    symbols = {symbol for one in expressions for symbol in one.atoms(Symbol)}
    if not symbols:
        return gold, answer
    bound = {symbol for one in expressions for symbol in one.atoms(Symbol) - one.free_symbols}
    units = {symbol for symbol in symbols - bound if symbol.name == "i"}
    roots = {
        symbol.name
        for one in expressions
        for power in one.atoms(Pow)
        if power.exp.is_Rational and power.exp.q % 2 == 0
        for symbol in power.base.free_symbols
        if power.base.subs(symbol, -symbol) == -power.base
    }
    # else x^2 = -1 and x^2 = -2 would be equal, having no solutions
    real = not units and not any(one.has(Equality) for one in expressions)
    values = {
        symbol: Symbol(symbol.name, positive=True)
        if symbol.name in roots
        else Symbol(symbol.name, real=real or symbol.name == HUNDREDTH or None)
        for symbol in symbols
    }
    values |= dict.fromkeys(units, I)
    return _replace(gold, values), _replace(answer, values)


def _exact(expression):
    """With its numbers exact.

    Else math-verify rounds decimals to six places and differences of constants to fifteen:
    0.3333333 would be 1/3.
    """
    from sympy import Expr, Float, Rational

    if isinstance(expression, str):
        return expression
    decimals = {number: Rational(str(number)) for number in expression.atoms(Float)}
    if decimals:
        (expression,) = _replace([expression], decimals)
    if not isinstance(expression, Expr) or expression.free_symbols:
        return expression
    value = expression.doit()  # 10^{-200}
    return value if value.is_Rational else expression


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
else:
    _reset()
    os.register_at_fork(after_in_child=_reset)
    atexit.register(_stop)
