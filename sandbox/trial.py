"""The processes behind run.py: a server that forks workers, workers that run tests, guests that
run the program.

In a worker the program's functions are proxies. The guest gets code and arguments and answers with
tagged JSON of plain types, which are compared in the worker alone: it never sees an expected value
and never says "passed". It is forked before the worker reads anything, so its memory has none of it
either.

Left out, so that an honest program fails that needs it: callbacks (functions of the tests that are
passed to the program), changes that it makes inside of nested arguments, comparing or adding its
own objects, their truth, `with` and `await` of them, and tests that read what it prints. Stdlib
only: it runs as a script, with `python -I -S`.
"""

import ast
import builtins
import gc
import importlib
import io
import os
import select
import signal
import socket
import symtable
import sys
import types
from contextlib import suppress

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which -I leaves out
import jail  # noqa: E402
from proxy import OPERATIONS, Proxy, target_of  # noqa: E402
from wire import decode, encode, receive, send  # noqa: E402

PRELOADED = (
    "__future__ _strptime abc argparse array ast base64 binascii bisect bz2 calendar cmath codecs collections "
    "concurrent.futures.thread contextlib copy csv dataclasses datetime decimal difflib doctest enum fnmatch fractions "
    "functools glob graphlib gzip hashlib heapq hmac html inspect io ipaddress itertools json keyword locale logging "
    "lzma math numbers operator os pathlib pickle platform pprint queue random re reprlib sched secrets shlex "
    "statistics string struct subprocess sys textwrap threading time timeit tokenize traceback types typing "
    "unicodedata unittest urllib.parse uuid warnings weakref zlib"
)
ENCODINGS = (
    "ascii base64_codec cp1252 cp437 hex_codec idna latin_1 punycode raw_unicode_escape rot_13 unicode_escape utf_16 "
    "utf_16_be utf_16_le utf_32 utf_32_be utf_32_le utf_8_sig"
)
# would end a test's loop as if all was well
HIDDEN = ("StopIteration", "StopAsyncIteration", "GeneratorExit")


def _serve(control: socket.socket) -> None:
    """Forks a worker for each connection that is handed over, until the caller is gone."""
    for name in [*PRELOADED.split(), *(f"encodings.{name}" for name in ENCODINGS.split())]:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to be waited for
    jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
    server = os.getpid()
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with suppress(OSError):  # no fork: the caller sees its connection end
            if os.fork() == 0:
                try:
                    control.close()
                    jail.die_with_parent(server)
                    _work(socket.socket(fileno=descriptors[0]))
                finally:
                    os._exit(0)
        os.close(descriptors[0])


def _work(connection: socket.socket) -> None:
    """To the caller: why there can be no verdict, or None, and then whether all tests hold."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    here, there = socket.socketpair()
    worker = os.getpid()
    guest = os.fork()  # before anything is read
    if guest == 0:
        try:
            _be_guest(there, worker)
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

    def finish(passed: bool):
        """The only way out: no exception ends the tests, for they might catch it."""
        try:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            send(connection, passed)
        finally:
            os._exit(0)

    def lost():
        """The guest is gone: the program's doing, unless it was killed, which it can't do, before
        its time was up."""
        if select.select([handle], [], [], 1)[0]:
            _, status, usage = os.wait4(guest, os.WNOHANG)
            if status == signal.SIGKILL and usage.ru_utime + usage.ru_stime < request["timeout"]:
                os._exit(1)
        finish(False)

    signal.signal(signal.SIGALRM, lambda *_: finish(False))
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    try:
        jail.limit("CPU", int(request["timeout"]) + 3)
        jail.limit("AS", 2 * jail.MEMORY)
        _run(request, _asker(here, lost, finish))
    except BaseException:
        finish(False)
    finish(True)


def _asker(guest: socket.socket, lost, finish):
    """A function that has the guest do one of OPERATIONS: its result is returned, its exception
    raised here."""
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


SIMPLE_ERRORS = {
    name: e
    for name, e in vars(builtins).items()
    if isinstance(e, type)
    and issubclass(e, Exception)
    and "Unicode" not in name
    and name not in HIDDEN
}


def _free_names(tests: str, entry_point: str | None) -> set[str]:
    """The names that test code uses and does not define: the program's. Built-in ones only if there
    are no others, for a program might redefine what its tests are written with."""
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
    """What test code uses as modules of the standard library: `math` in `math.isclose`, imported by
    it or not."""
    owners = (node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute))
    return {owner.id for owner in owners if isinstance(owner, ast.Name)} & sys.stdlib_module_names


def _caught(tests: str) -> set[str]:
    """What test code names in its except clauses."""
    clauses = (
        node.type
        for node in ast.walk(ast.parse(tests))
        if isinstance(node, ast.ExceptHandler) and node.type
    )
    return {
        node.id for clause in clauses for node in ast.walk(clause) if isinstance(node, ast.Name)
    }


class _Sink(io.TextIOBase):
    def write(self, text):
        return len(text)


def _be_guest(connection: socket.socket, worker: int) -> None:
    """Runs the program and does what it is asked with it, until it is killed."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, source in enumerate((nothing, nothing, nothing, connection.fileno())):
        os.dup2(source, number) if source != number else os.set_inheritable(number, True)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    connection.detach()
    connection = socket.socket(fileno=3)
    os.setsid()
    timeout, unsafe = receive(connection)
    try:
        jail.confine(timeout, worker)
    except (OSError, ValueError) as error:
        if not unsafe:
            return send(connection, f"this machine can't hold untrusted code ({error})")
    send(connection, None)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), _Sink(), _Sink()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects, numbers = [], {}

    def reference(x) -> int:
        if id(x) not in numbers:
            numbers[id(x)] = len(objects)
            objects.append(x)
        return numbers[id(x)]

    def dereference(target):
        if isinstance(target, list):
            return vars(builtins)[target[0]]
        if isinstance(target, int):
            return objects[target]
        return vars(module)[target] if target in vars(module) else vars(builtins)[target]

    while True:
        operation, target, *given = receive(connection)
        error = result = after = None
        try:
            if operation == "exec":
                exec(compile(target, "program", "exec"), vars(module))
            else:
                arguments, named = (decode(x, dereference) for x in given)
                result = encode(
                    OPERATIONS[operation](dereference(target), *arguments, **named), reference
                )
                after = _changed(arguments, named, given, reference)
        except BaseException as e:
            error = encode([[kind.__name__ for kind in type(e).__mro__], e.args], reference)
        send(connection, [error, result, after])


def _changed(arguments: list, named: dict, given: list, reference) -> list:
    """{place or name: value} of the arguments that are no longer what was given, encoded."""
    before = [*given[0][1:], *(value for _, value in given[1][1:])]
    after = [[key, encode(x, reference)] for key, x in [*enumerate(arguments), *named.items()]]
    return [
        "d",
        *([encode(key, None), new] for (key, new), old in zip(after, before) if new != old),
    ]


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
