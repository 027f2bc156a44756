"""A worker runs the tests of one program, whose functions are proxies in it, and says the verdict.

The program runs in a guest of the worker's own, which gets code and arguments and answers with
tagged JSON of plain types. They are compared in the worker alone: the guest never sees an expected
value and never says "passed". It is forked before the worker reads anything, so its memory has none
of it either.

What an honest program can't do here is listed in docs/data.md, under "Programs". Stdlib only.
"""

import ast
import builtins
import importlib
import os
import resource
import select
import signal
import socket
import symtable
import sys
import time
from array import array
from collections import deque
from contextlib import suppress
from pathlib import Path

from sandbox import jail, shelf
from sandbox.guest import obey
from sandbox.proxy import Proxy, target_of
from sandbox.wire import decode, encode, receive, send

TICK = 0.05  # seconds between two looks at how much a verdict has used
# would end a test's loop as if all was well
HIDDEN = ("StopIteration", "StopAsyncIteration", "GeneratorExit")
SIMPLE_ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
    if "Unicode" not in name and name not in HIDDEN
}


def work(connection: socket.socket) -> None:
    """To the caller: why there can be no verdict, or None, and then whether all tests hold."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    here, there = socket.socketpair()
    worker, guest = os.getpid(), os.fork()  # before anything is read
    if guest == 0:
        try:
            obey(there, worker)
        finally:
            os._exit(0)
    there.close()
    handle = os.pidfd_open(guest)
    request = receive(connection)
    timeout = request["timeout"]
    send(here, [timeout, request["unsafe"], shelf.wanted_by(request["program"])])
    fault = receive(here)
    send(connection, fault)
    if fault:
        return
    finish, lost = _ends(connection, guest, handle, timeout)
    _watch(guest, timeout, request["sleep"], finish)
    try:
        jail.limit("AS", 2 * jail.MEMORY)
        _run(request, _asker(here, lost, finish))
        ended = True
    except SystemExit as end:  # the tests' own: no program can raise it here
        ended = end.code in (None, 0)
    except BaseException:
        ended = False
    finish(ended and _used(guest) <= timeout)


def _used(guest: int) -> float:
    """Seconds of processor time, of the tests and of the program with all its threads."""
    return time.process_time() + time.clock_gettime(~guest << 3 | 2)  # the clock of a process


def _watch(guest: int, timeout: float, sleep: float, finish) -> None:
    """Ends what has used its `timeout` of processor time, or taken `sleep` seconds on the clock.

    The clock stands still while they wait for a processor: a verdict must not depend on what else
    runs.
    """
    started, me, waited = time.monotonic(), os.getpid(), 0.0

    def account() -> tuple[float, ...]:
        """Seconds on the clock, of processor time and waited for it; pauses of its own will."""
        pauses = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        return time.monotonic(), _used(guest), _waited(me) + _waited(guest), pauses

    before = account()

    def look(*_):
        nonlocal before, waited
        now = account()
        passed, worked, more, pauses = (new - old for new, old in zip(now, before))
        before = now
        if not ACCOUNTED:  # whatever might have waited has
            rests = worked < 0.02 * passed and pauses and not _wants_to_run(guest)
            more = 0.0 if rests else passed - worked
        # threads wait side by side, and what one has waited is lost when it ends
        waited += min(passed, max(0.0, more))
        if now[1] > timeout or now[0] - started - waited > sleep:
            finish(False)

    signal.signal(signal.SIGALRM, look)
    tick = min(TICK, timeout)
    signal.setitimer(signal.ITIMER_REAL, tick, tick)
    # where tests hang in C code no handler runs: the kernel ends them, and the server says so
    signal.setitimer(signal.ITIMER_PROF, timeout + 1)


def _waited(pid: int) -> float:
    """Seconds that the threads of a process have waited for a processor."""
    return sum(int(fields.split()[1]) for fields in _of_threads(pid, "schedstat")) / 1e9


def _wants_to_run(pid: int) -> bool:
    states = {fields.rpartition(")")[2].split()[0] for fields in _of_threads(pid, "stat")}
    return not states.isdisjoint("RD")


def _of_threads(pid: int, name: str) -> list[str]:
    found = []
    with suppress(OSError):  # a thread that ended just now
        for task in Path(f"/proc/{pid}/task").iterdir():
            found.append((task / name).read_text())
    return found


# a kernel that keeps none writes zeros, if anything
ACCOUNTED = any(fields.split()[2] != "0" for fields in _of_threads(os.getpid(), "schedstat"))


def _ends(connection: socket.socket, guest: int, handle: int, timeout: float):
    """The two ways out, `finish(passed)` and `lost()`; neither comes back.

    No exception ends the tests, for they might catch it.
    """

    def finish(passed: bool):
        try:
            sys.setrecursionlimit(sys.getrecursionlimit() + 1000)  # it may be called at the last
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            send(connection, passed)
        finally:
            os._exit(0)

    def lost():
        """The guest is gone: the program's doing, unless it was killed before its time was up."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # its clock goes with it
        if select.select([handle], [], [], 1)[0]:
            _, status, usage = os.wait4(guest, os.WNOHANG)
            if status in jail.BY_OTHERS and usage.ru_utime + usage.ru_stime < timeout:
                os._exit(1)  # no verdict: whoever killed it, the program has no call for that
        finish(False)

    return finish, lost


def _asker(guest: socket.socket, lost, finish):
    """A function that has the guest do one of OPERATIONS; it returns the result, or raises."""
    proxies = {}

    def ask(operation: str, target, arguments: list, named: dict):
        before = [encode(x, target_of) for x in (arguments, named)]
        try:
            send(guest, [operation, target, *before])
            reply = receive(guest)
        except (OSError, EOFError):
            lost()
        except Exception:
            finish(False)
        try:
            decoded = [decode(x, lambda t: proxies.setdefault(t, Proxy(ask, t))) for x in reply]
            error, result, after = decoded
            after = dict(after or ())
        except Exception:
            finish(False)
        if error:
            raise _exception(operation, *error)
        for key, new in after.items():
            _become(named[key] if isinstance(key, str) else arguments[key], new)
        return result

    return ask


def _exception(operation: str, kinds, arguments) -> Exception:
    """The first built-in one of the kinds that a program's exception was of."""
    if operation == "next" and kinds[0] == "StopIteration":
        return StopIteration(*arguments)
    for kind in (SIMPLE_ERRORS.get(name) for name in kinds):
        if kind:
            return kind(*arguments)
    return RuntimeError("from the program")


def _become(old, new) -> None:
    """Changes an argument to what the program has made of it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | bytearray | array):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)
    elif hasattr(old, "shape") and old.shape == new.shape:
        old[...] = new


class _Names(dict):
    """What test code finds: its own names, and of the `free` ones what the program has now."""

    def __init__(self, ask, free: set[str], **own):
        super().__init__(own)
        self.ask, self.free = ask, free

    def __missing__(self, name):
        if name not in self.free:
            raise KeyError(name)
        value = self.ask("value", name, [], {})
        if isinstance(value, Proxy):  # it asks for the name each time it is used
            value = self[name] = Proxy(self.ask, name)
        return value


def _run(request: dict, ask) -> None:
    ask("exec", request["program"], [], {})
    tests, entry_point = request["tests"], request["entry_point"]
    free = _free_names(tests, entry_point)
    # `-S` leaves out exit and quit
    names = _Names(ask, free, __name__="__main__", exit=sys.exit, quit=sys.exit)
    entry = Proxy(ask, entry_point)
    if entry_point is not None:
        names["candidate"] = entry
    for name in free & _modules(tests):
        names[name] = importlib.import_module(name)
    for name in free & _caught(tests):
        names[name] = SIMPLE_ERRORS[name] = type(name, (Exception,), {})
    exec(compile(tests, "tests", "exec", dont_inherit=True), names)
    if "check" in names and entry_point is not None:
        names["check"](entry)


def _free_names(tests: str, entry_point: str | None) -> set[str]:
    """The names that test code uses and does not define: the program's.

    Built-in ones only if there are no others, for a program might redefine what its tests are
    written with.
    """
    used, defined, scopes = set(), set(), [symtable.symtable(tests, "tests", "exec")]
    for scope in scopes:
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() or scope.get_type() == "module":
                if symbol.is_referenced():
                    used.add(symbol.get_name())
                if symbol.is_assigned() or symbol.is_imported():
                    defined.add(symbol.get_name())
    free = used - defined
    own = {name for name in free if not hasattr(builtins, name)}
    return own if own or entry_point else free


def _modules(tests: str) -> set[str]:
    """What test code uses as standard modules: `math` in `math.isclose`, imported by it or not."""
    owners = (node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute))
    return {owner.id for owner in owners if isinstance(owner, ast.Name)} & sys.stdlib_module_names


def _caught(tests: str) -> set[str]:
    """What test code names in its except clauses."""
    handlers = (n for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.ExceptHandler))
    named = (n for handler in handlers if handler.type for n in ast.walk(handler.type))
    return {node.id for node in named if isinstance(node, ast.Name)}
