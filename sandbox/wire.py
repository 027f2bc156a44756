"""How caller, worker and guest speak: JSON of a known length, and in it plain values.

`encode` tags all that JSON does not tell apart (a tuple from a list, 1 from 1.0) and makes plain
what only looks it: of a program's own subclass of int or list, what arrives is the number or the
list. Stdlib only.
"""

import json
import struct
from collections import deque
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

LARGEST = 1 << 24  # bytes of a message
CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": deque}
VALUES = {
    kind.__name__: kind for kind in (Decimal, Fraction, range, date, datetime, timezone, timedelta)
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
    if x is None or isinstance(x, bool | str):
        return x if not isinstance(x, str) else str.__str__(x)
    if isinstance(x, int):
        return ["i", hex(x)]
    if isinstance(x, float):
        return ["f", float(x).hex()]
    if isinstance(x, complex):
        return ["c", x.real.hex(), x.imag.hex()]
    if isinstance(x, bytes):
        return ["b", x.hex()]
    if isinstance(x, bytearray):
        return ["a", x.hex()]
    if isinstance(x, dict):
        return ["d", *([encode(k, reference), encode(v, reference)] for k, v in x.items())]
    for tag, kind in CONTAINERS.items():
        if isinstance(x, kind):
            return [tag, *(encode(y, reference) for y in x)]
    if VALUES.get(type(x).__name__) is type(x):
        return [type(x).__name__, *(encode(y, reference) for y in x.__reduce__()[1])]
    return ["p", reference(x)]


def decode(x, dereference):
    """What `encode` encoded; ValueError, TypeError or the like for anything else."""
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
    if tag == "a":
        return bytearray.fromhex(rest[0])
    if tag == "d":
        return {decode(k, dereference): decode(v, dereference) for k, v in rest}
    if tag == "p":
        return dereference(rest[0])
    parts = (decode(y, dereference) for y in rest)
    return VALUES[tag](*parts) if tag in VALUES else CONTAINERS[tag](parts)
