"""A worker runs the tests of one program, whose functions are proxies in it, and says the verdict.

The program runs in a guest of the worker's own, which gets code and arguments and answers with
tagged JSON of plain types. They are compared in the worker alone: the guest never sees an expected
value and never says "passed". It is forked before the worker reads anything, so its memory has none
of it either.

Left out, so that an honest program fails that needs it: callbacks (functions of the tests that are
passed to the program), changes that it makes inside of nested arguments, comparing or adding its
own objects, their truth, `with` and `await` of them, and tests that read what it prints. Stdlib
only.
"""

import ast
import builtins
import importlib
import os
import select
import signal
import socket
import symtable
import sys
from contextlib import suppress

from sandbox import jail
from sandbox.guest import obey
from sandbox.proxy import Proxy, target_of
from sandbox.wire import decode, encode, receive, send

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
    worker = os.getpid()
    guest = os.fork()  # before anything is read
    if guest == 0:
        try:
            obey(there, worker)
        finally:
            os._exit(0)
    there.close()
    handle = os.pidfd_open(guest)
    request = receive(connection)
    send(here, [request["timeout"], request["unsafe"]])
    fault = receive(here)
    send(connection, fault)
    if fault:
        return
    finish, lost = _ends(connection, guest, handle, request["timeout"])
    signal.signal(signal.SIGALRM, lambda *_: finish(False))
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    try:
        jail.limit("CPU", int(request["timeout"]) + 3)
        jail.limit("AS", 2 * jail.MEMORY)
        _run(request, _asker(here, lost, finish))
    except BaseException:
        finish(False)
    finish(True)


def _ends(connection: socket.socket, guest: int, handle: int, timeout: float):
    """The two ways out, `finish(passed)` and `lost()`; neither comes back.

    No exception ends the tests, for they might catch it.
    """

    def finish(passed: bool):
        try:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            send(connection, passed)
        finally:
            os._exit(0)

    def lost():
        """The guest is gone: the program's doing, unless it was killed before its time was up."""
        if select.select([handle], [], [], 1)[0]:
            _, status, usage = os.wait4(guest, os.WNOHANG)
            if status == signal.SIGKILL and usage.ru_utime + usage.ru_stime < timeout:
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
            raise _exception(*error)
        for key, new in after.items():
            _become(named[key] if isinstance(key, str) else arguments[key], new)
        return result

    return ask


def _exception(kinds, arguments) -> Exception:
    """The first built-in one of the kinds that a program's exception was of."""
    for kind in (SIMPLE_ERRORS.get(name) for name in kinds):
        if kind:
            return kind(*arguments)
    return RuntimeError("from the program")


def _become(old, new) -> None:
    """Changes an argument to what the program has made of it."""
    if type(old) is type(new) and isinstance(old, list | bytearray):
        old[:] = new
    elif type(old) is type(new) and isinstance(old, dict | set):
        old.clear()
        old.update(new)


def _run(request: dict, ask) -> None:
    ask("exec", request["program"], [], {})
    tests, entry_point = request["tests"], request["entry_point"]
    names = {name: Proxy(ask, name) for name in _free_names(tests, entry_point)}
    for name in names.keys() & _modules(tests):
        names[name] = importlib.import_module(name)
    for name in names.keys() & _caught(tests):
        names[name] = SIMPLE_ERRORS[name] = type(name, (Exception,), {})
    names["__name__"] = "__main__"
    exec(compile(tests, "tests", "exec"), names)
    if entry_point is not None:
        names["check"](Proxy(ask, entry_point))


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
