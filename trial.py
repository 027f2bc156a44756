"""The processes behind sandbox.py: a server that forks workers, workers that run tests, guests that run the program.

In a worker the program's functions are proxies. The guest gets code and arguments and answers with tagged JSON of plain
types, which are compared in the worker alone: it never sees an expected value and never says "passed". It is forked
before the worker reads anything, so its memory has none of it either.

Left out: callbacks (functions of the tests that are passed to the program), and changes that a program makes inside of
nested arguments. Stdlib only: it runs as a script, with `python -I -S`.
"""

import ast
import builtins
import io
import json
import os
import select
import signal
import socket
import struct
import sys
import types
from contextlib import suppress

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which -I leaves out
import jail  # noqa: E402

LARGEST = 1 << 24  # bytes of a message
PRELOADED = (
    "abc array base64 binascii bisect calendar cmath collections contextlib copy dataclasses datetime decimal difflib "
    "enum fractions functools hashlib heapq html itertools json keyword locale math numbers operator os pprint queue "
    "random re secrets statistics string struct sys textwrap threading time traceback types typing unicodedata uuid "
    "warnings zlib"
)
HIDDEN = ("StopIteration", "StopAsyncIteration", "GeneratorExit")  # would end a test's loop as if all was well


def send(connection, message) -> None:
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("<I", len(data)) + data)


def receive(connection):
    """EOFError if the other side is gone, ValueError if what it says is too long or no JSON."""
    (size,) = struct.unpack("<I", _exactly(connection, 4))
    if size > LARGEST:
        raise ValueError("message too long")
    try:
        return json.loads(_exactly(connection, size))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _exactly(connection, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Stop(BaseException):
    """Ends the tests: time is up, or the guest is gone."""


class _Proxy:
    """Something of the guest's. It is equal to nothing but itself, and neither true nor false."""

    def __init__(self, ask, target):
        self.__dict__.update(_ask=ask, _target=target)

    def __call__(self, *arguments, **named):
        return self._ask("call", self._target, list(arguments), named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self._target, [name], {})

    def __setattr__(self, name, value):
        self._ask("setattr", self._target, [name, value], {})

    def __getitem__(self, key):
        return self._ask("getitem", self._target, [key], {})

    def __iter__(self):
        return iter(self._ask("list", self._target, [], {}))

    def __len__(self):
        return self._ask("len", self._target, [], {})

    def __str__(self):
        return self._ask("str", self._target, [], {})

    def __bool__(self):
        raise TypeError("what the program returned is no plain value")


def _target(x):
    """What stands for a proxy, or for something built in, in an argument."""
    if isinstance(x, _Proxy):
        return x._target
    if vars(builtins).get(getattr(x, "__name__", None)) is x:
        return [x.__name__]
    raise TypeError(f"{type(x).__name__} can't be handed to the program")


OPERATIONS = {
    "call": lambda x, *arguments, **named: x(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda x, key: x[key],
    "list": list,
    "len": len,
    "str": str,
}
CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset}


def _encode(x, reference):
    """Plain values as tagged JSON; of anything else, `reference(x)`, a name or number that stands for it."""
    if x is None or isinstance(x, bool | str):
        return x if not isinstance(x, str) else str.__str__(x)
    if isinstance(x, int):
        return ["i", hex(x)]
    if isinstance(x, float):
        return ["f", float(x).hex()]
    if isinstance(x, complex):
        return ["c", x.real.hex(), x.imag.hex()]
    if isinstance(x, bytes | bytearray):
        return ["b", x.hex()]
    if isinstance(x, dict):
        return ["d", *([_encode(k, reference), _encode(v, reference)] for k, v in x.items())]
    for tag, kind in CONTAINERS.items():
        if isinstance(x, kind):
            return [tag, *(_encode(y, reference) for y in x)]
    return ["p", reference(x)]


def _decode(x, dereference):
    """What `_encode` encoded; ValueError, TypeError or the like for anything else."""
    if x is None or isinstance(x, bool | str):
        return x
    tag, *rest = x
    if tag == "i":
        return int(rest[0], 16)
    if tag == "f":
        return float.fromhex(rest[0])
    if tag == "c":
        return complex(*map(float.fromhex, rest))
    if tag == "b":
        return bytes.fromhex(rest[0])
    if tag == "d":
        return {_decode(k, dereference): _decode(v, dereference) for k, v in rest}
    if tag == "p":
        return dereference(rest[0])
    return CONTAINERS[tag](_decode(y, dereference) for y in rest)


def _serve(control: socket.socket) -> None:
    """Forks a worker for each connection that is handed over, until the caller is gone."""
    for name in PRELOADED.split():
        __import__(name)
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
    """One verdict: [passed, fault] to the caller."""
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
    fault, passed = None, False
    try:
        send(here, [request["timeout"], request["unsafe"]])
        fault = receive(here)
        passed = not fault and _passes(request, here)
    except (OSError, EOFError, ValueError):
        fault = fault or "the guest died before it ran anything"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    select.select([handle], [], [])
    send(connection, [passed, fault])


def _passes(request: dict, guest: socket.socket) -> bool:
    def stop(*_):
        raise _Stop

    proxies = {}

    def ask(operation: str, target, arguments: list, named: dict):
        before = [_encode(x, _target) for x in (arguments, named)]
        try:
            send(guest, [operation, target, *before])
            error, result, after = receive(guest)
            result, after = (_decode(x, lambda t: proxies.setdefault(t, _Proxy(ask, t))) for x in (result, after))
        except Exception:
            raise _Stop from None
        if error:
            kind = getattr(builtins, error, None) if isinstance(error, str) and error not in HIDDEN else None
            raise kind("from the program") if kind in SIMPLE_ERRORS else RuntimeError("from the program")
        for old, new in zip(arguments, after or (), strict=False):
            if type(old) is type(new) and isinstance(old, list | dict | set):
                old.clear()
                (old.extend if isinstance(old, list) else old.update)(new)
        return result

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, request["timeout"], 0.1)  # again and again, should a test catch it
    try:
        jail.limit("CPU", int(request["timeout"]) + 3)
        jail.limit("AS", 2 * jail.MEMORY)
        ask("exec", request["program"], [], {})
        tests, entry_point = request["tests"], request["entry_point"]
        names = {name: _Proxy(ask, name) for name in _free_names(tests, entry_point)}
        exec(compile(tests, "tests", "exec"), names)
        if entry_point is not None:
            names["check"](_Proxy(ask, entry_point))
        return True
    except BaseException:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


SIMPLE_ERRORS = {
    e
    for e in vars(builtins).values()
    if isinstance(e, type) and issubclass(e, Exception) and "Unicode" not in e.__name__
}


def _free_names(tests: str, entry_point: str | None) -> set[str]:
    """The names that test code uses and does not define: the program's. Built-in ones only if there are no others,
    for a program might redefine what its tests are written with."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            defined.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
    free = used - defined
    own = {name for name in free if not hasattr(builtins, name)}
    return own if own or entry_point else free


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
        return objects[target] if isinstance(target, int) else vars(module)[target]

    while True:
        error = result = after = None
        operation, target, *given = receive(connection)
        try:
            if operation == "exec":
                exec(compile(target, "program", "exec"), vars(module))
            else:
                arguments, named = (_decode(x, dereference) for x in given)
                result = _encode(OPERATIONS[operation](dereference(target), *arguments, **named), reference)
                after = _encode(arguments, reference)
                after = None if after == given[0] else after
        except BaseException as e:
            error, result, after = type(e).__name__, None, None
        send(connection, [error, result, after])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
