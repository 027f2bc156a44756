"""How caller, worker and guest speak: JSON of a known length, and in it plain values.

`encode` tags all that JSON does not tell apart (a tuple from a list) and makes plain what only
looks it: of a program's own subclass of int or list, what arrives is the number or the list, of a
named tuple one with the same fields. Stdlib only; arrays of numpy pass where it is loaded.
"""

import json
import struct
import sys
from array import array
from collections import Counter, OrderedDict, deque, namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath

LARGEST = 1 << 26  # bytes of a message
ATOMS = {str, int, float, bool, type(None)}  # JSON has them, NaN and the infinities too
BIG = 1 << 63  # an int from here on is written in hex, for decimals of thousands of digits are slow
CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": deque}
VALUES = {
    kind.__name__: kind
    for kind in (Decimal, Fraction, range, slice, array, PurePosixPath, PosixPath)
    + (date, datetime, time, timezone, timedelta)
}
WRITTEN = {
    "i": lambda x: int(x, 16),
    "c": lambda *parts: complex(*map(float.fromhex, parts)),
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
}
MAPPINGS = {kind.__name__: kind for kind in (OrderedDict, Counter)}
VIEWS = {  # of a dict that is made of what is in them
    "dict_keys": (dict.keys, dict.fromkeys),
    "dict_values": (dict.values, lambda x: dict(enumerate(x))),
    "dict_items": (dict.items, dict),
}


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


def encode(x, reference):
    """Plain values as tagged JSON; of anything else, what `reference(x)` says stands for it."""
    if isinstance(x, int | float | str) or x is None:
        return _atom(x)
    if isinstance(x, complex):
        return ["c", x.real.hex(), x.imag.hex()]
    if isinstance(x, bytes | bytearray):
        return ["b" if isinstance(x, bytes) else "a", x.hex()]
    if isinstance(x, dict):
        pairs = ([encode(k, reference), encode(v, reference)] for k, v in x.items())
        name = type(x).__name__
        return ["m", name, *pairs] if MAPPINGS.get(name) is type(x) else ["d", *pairs]
    for tag, kind in CONTAINERS.items():
        if isinstance(x, kind):
            whole = set(map(type, x)) <= ATOMS and not any(type(y) is int and _big(y) for y in x)
            parts = x if whole else [encode(y, reference) for y in x]
            return [*_named(x), *parts] if tag == "t" else [tag, *parts]
    return _object(x, reference)


def _atom(x):
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, float):
        return float.__float__(x)
    if x is None or isinstance(x, bool):
        return x
    x = int.__int__(x)
    return ["i", hex(x)] if _big(x) else x


def _big(x: int) -> bool:
    return not -BIG < x < BIG


def _named(x: tuple) -> list:
    fields = getattr(type(x), "_fields", None)
    if isinstance(fields, tuple) and len(fields) == len(x):
        return ["n", type(x).__name__, list(fields)]
    return ["t"]


def _object(x, reference) -> list:
    name = type(x).__name__
    if VALUES.get(name) is type(x):
        return [name, *(encode(y, reference) for y in x.__reduce_ex__(2)[1])]
    view, whole = VIEWS.get(name, (None, None))
    if view and type(x) is type(view({})):
        return ["v", name, encode(whole(x), reference)]
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(x, numpy.generic):
        return encode(x.item(), reference)
    if numpy and isinstance(x, numpy.ndarray) and x.dtype.kind in "biufcUS":
        return ["numpy", x.dtype.str, list(x.shape), encode(x.ravel().tolist(), reference)]
    return ["p", reference(x)]


def decode(x, dereference):
    """What `encode` encoded; ValueError, TypeError or the like for anything else."""
    if type(x) in ATOMS:
        return x
    tag, *rest = x
    if tag in WRITTEN:
        return WRITTEN[tag](*rest)
    if tag == "d":
        return {decode(k, dereference): decode(v, dereference) for k, v in rest}
    if tag == "p":
        return dereference(rest[0])
    if tag == "m":
        return MAPPINGS[rest[0]](decode(["d", *rest[1:]], dereference))
    if tag == "v":
        return VIEWS[rest[0]][0](decode(rest[1], dereference))
    if tag == "n":
        name, fields, *values = rest
        own = getattr(sys.modules.get("program"), name, None)  # of a guest's program
        same = getattr(own, "_fields", None) == tuple(fields)
        kind = own if same else namedtuple(name, fields, rename=True)
        return kind(*decode(["l", *values], dereference))
    if tag == "numpy":
        kind, shape, values = rest
        return sys.modules["numpy"].array(decode(values, dereference), dtype=kind).reshape(shape)
    parts = rest if set(map(type, rest)) <= ATOMS else [decode(y, dereference) for y in rest]
    return VALUES[tag](*parts) if tag in VALUES else CONTAINERS[tag](parts)
