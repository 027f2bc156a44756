"""A guest runs one untrusted program, and does with it what the worker asks, until it is killed.

It is forked by a worker that has read nothing yet, and hears of code and arguments alone. Stdlib
only.
"""

import builtins
import importlib
import io
import os
import socket
import sys
import types
from collections import deque

from sandbox import jail, shelf
from sandbox.proxy import OPERATIONS
from sandbox.wire import decode, encode, receive, send


def obey(connection: socket.socket, worker: int) -> None:
    """Says why it can't be held, or None; then answers [error, result, arguments that changed]."""
    connection = _alone_with(connection)
    timeout, unsafe, wide = receive(connection)
    if wide:
        shelf.load_extensions()
    try:
        jail.confine(timeout, worker)
    except (OSError, ValueError) as error:
        if not unsafe:
            return send(connection, f"this machine can't hold untrusted code ({error})")
    send(connection, None)
    sys.stdin, sys.stdout, sys.stderr = (_text(file) for file in (io.BytesIO(), _Sink(), _Sink()))
    module = sys.modules["program"] = types.ModuleType("program")
    reference, dereference = _references(vars(module))
    while True:
        operation, target, *given = receive(connection)
        try:
            if operation == "exec":
                exec(compile(target, "program", "exec", dont_inherit=True), vars(module))
                answer = [None, None, None]
            else:
                subject = dereference(target)
                answer = [None, *_done(operation, subject, given, reference, dereference)]
        except BaseException as e:
            kinds = [kind.__name__ for kind in type(e).__mro__]
            answer = [encode([kinds, e.args], reference), None, None]
        send(connection, answer)


def _done(operation: str, subject, given: list, reference, dereference) -> tuple:
    """(result, arguments that changed), encoded, of one of OPERATIONS on a subject."""
    arguments, named = (decode(x, dereference) for x in given)
    result = OPERATIONS[operation](subject, *arguments, **named)
    own = _is_own(result) and type(result) is subject  # made by the tests
    result = ["p", reference(result)] if own else encode(result, reference)
    return result, _changed(arguments, named, given, reference)


def _alone_with(connection: socket.socket) -> socket.socket:
    """The connection as descriptor 3; 0 to 2 lead nowhere, and no other is left open."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, source in enumerate((nothing, nothing, nothing, connection.fileno())):
        os.dup2(source, number) if source != number else os.set_inheritable(number, True)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    connection.detach()
    os.setsid()
    return socket.socket(fileno=3)


class _Sink(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        return len(data)


def _text(file) -> io.TextIOWrapper:
    """A text stream that has its `buffer`; what no encoding can write does not matter."""
    return io.TextIOWrapper(file, "utf-8", "backslashreplace", write_through=True)


def _references(program: dict):
    """(object -> number, what stands for an object -> object).

    An object of the program's is its number, a name is the program's own or built in, and
    [module, name] the standard library's.
    """
    objects, numbers = [], {}

    def reference(x) -> int:
        if id(x) not in numbers:
            numbers[id(x)] = len(objects)
            objects.append(x)
        return numbers[id(x)]

    def dereference(target):
        if isinstance(target, list):
            return getattr(importlib.import_module(target[0]), target[1])
        if isinstance(target, int):
            return objects[target]
        return program[target] if target in program else vars(builtins)[target]

    return reference, dereference


def _is_own(x) -> bool:
    """A list or the like with methods of the program's own, which a plain one would lack."""
    named = vars(type(x)).items() if isinstance(x, list | dict | set | deque) else ()
    return any(callable(value) and not name.startswith("_") for name, value in named)


def _changed(arguments: list, named: dict, given: list, reference) -> list:
    """{place or name: value} of the arguments that are no longer what was given, encoded."""
    before = [*given[0][1:], *(value for _, value in given[1][1:])]
    after = [[key, encode(x, reference)] for key, x in [*enumerate(arguments), *named.items()]]
    pairs = zip(after, before)
    return ["d", *([encode(key, None), new] for (key, new), old in pairs if new != old)]
