"""What tests hold of a program's own things, and what they may ask of them. Stdlib only."""

import itertools
import operator
import re
import sys
import types
from collections import deque

# isdigit, issubset, startswith, count ...: what only a plain value may say of itself, for an object
# that a program returns would say what the test wants to hear
VERDICTS = {
    n for kind in (str, float, set) for n in dir(kind) if n.startswith("is") or n.endswith("with")
}
VERDICTS |= {"count", "index", "find", "equals", "union", "intersection", "difference"}
VERDICTS |= {"symmetric_difference"}
CLASS = re.compile("[A-Z][A-Za-z0-9]*")  # how classes are named, and few functions


class Proxy:
    """Something of the guest's. It is equal to nothing but itself, and neither true nor false."""

    def __init__(self, ask, target):
        self.__dict__.update(_ask=ask, _target=target, _made=False, _ahead=deque())

    def __call__(self, /, *arguments, **named):
        result = self._ask("call", self._target, list(arguments), named)
        if isinstance(result, Proxy) and isinstance(self._target, str):
            # made by the tests, of a class by its name: what it says is what they are about
            result.__dict__["_made"] = CLASS.fullmatch(self._target) is not None
        return result

    def __getattr__(self, name):
        if name.startswith("__") or name in VERDICTS and not self._made:
            raise AttributeError(name)
        return self._ask("getattr", self._target, [name], {})

    def __setattr__(self, name, value):
        self._ask("setattr", self._target, [name, value], {})

    def __getitem__(self, key):
        return self._ask("getitem", self._target, [key], {})

    def __delattr__(self, name):
        self._ask("delattr", self._target, [name], {})

    def __setitem__(self, key, value):
        self._ask("setitem", self._target, [key, value], {})

    def __delitem__(self, key):
        self._ask("delitem", self._target, [key], {})

    def __contains__(self, x):
        """By what it holds: of what a program returns, its own word for it counts for nothing."""
        if self._made:
            return self._ask("contains", self._target, [x], {}) is True
        return any(x is y or x == y for y in self)

    def __iter__(self):
        iterator, size = self._ask("iter", self._target, [], {}), 1
        ahead = iterator._ahead  # taken of it, but not asked for yet
        while ahead or (part := iterator._ask("take", iterator._target, [size], {})):
            if not ahead:
                ahead.extend(part)
                size = min(2 * size, 1024)  # of what has no end, not much more than is wanted
            yield ahead.popleft()

    def __next__(self):
        return self._ahead.popleft() if self._ahead else self._ask("next", self._target, [], {})

    def __len__(self):
        return self._ask("len", self._target, [], {})

    def __str__(self):
        return self._ask("str", self._target, [], {})

    def __repr__(self):
        return self._ask("repr", self._target, [], {})

    def __instancecheck__(self, x):
        own = isinstance(x, Proxy) or hasattr(x, "_fields")  # a named tuple
        return own and self._ask("instance", self._target, [x], {})

    def __bool__(self):
        raise TypeError("what the program returned is no plain value")


def target_of(x):
    """What stands for a proxy, or for a part of the standard library, in an argument."""
    if isinstance(x, Proxy):
        return x._target
    name, module = getattr(x, "__name__", None), getattr(x, "__module__", None)
    if module in sys.stdlib_module_names and getattr(sys.modules.get(module), str(name), 0) is x:
        return [module, name]
    raise TypeError(f"{type(x).__name__} can't be handed to the program")


ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed)
ITERATORS += tuple(kind for kind in vars(itertools).values() if isinstance(kind, type))
EMPTY = ([], (), "", b"", set(), range(0), {}, {}.values(), {}.items(), re.finditer("", ""))
ITERATORS += tuple(type(iter(x)) for x in EMPTY)


def _next(x):
    """The end of an iterator of Python's own is told; of a program's own class it might be a lie,
    which would end a test's loop as if all was well."""
    try:
        return next(x)
    except StopIteration:
        if type(x) in ITERATORS:
            raise
        raise RuntimeError("ended by the program") from None


OPERATIONS = {
    "value": lambda x: x,
    "call": lambda x, /, *arguments, **named: x(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "getitem": lambda x, key: x[key],
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": lambda x, key: key in x,
    "iter": iter,
    "take": lambda x, size: [*itertools.islice(x, size)],
    "len": len,
    "next": _next,
    "str": str,
    "repr": repr,
    "instance": lambda x, y: isinstance(y, x),
}
