"""What tests hold of a program's own things, and what they may ask of them. Stdlib only."""

import builtins
import itertools
import operator
import types

# isdigit, issubset, startswith ...: what only a plain value may say of itself, for a program's own
# object would say what the test wants to hear
VERDICTS = {
    n for kind in (str, float, set) for n in dir(kind) if n.startswith("is") or n.endswith("with")
}


class Proxy:
    """Something of the guest's. It is equal to nothing but itself, and neither true nor false."""

    def __init__(self, ask, target):
        self.__dict__.update(_ask=ask, _target=target, _made=False)

    def __call__(self, /, *arguments, **named):
        result = self._ask("call", self._target, list(arguments), named)
        if isinstance(result, Proxy) and isinstance(self._target, str):
            # made by the tests, of a class by its name: its `in` is what they are about
            result.__dict__["_made"] = self._target[:1].isupper()
        return result

    def __getattr__(self, name):
        if name.startswith("__") or name in VERDICTS:
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
        while part := iterator._ask("take", iterator._target, [size], {}):
            yield from part
            size = min(2 * size, 1024)  # of what has no end, not much more than is wanted

    def __next__(self):
        return self._ask("next", self._target, [], {})

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
    """What stands for a proxy, or for something built in, in an argument."""
    if isinstance(x, Proxy):
        return x._target
    if vars(builtins).get(getattr(x, "__name__", None)) is x:
        return [x.__name__]
    raise TypeError(f"{type(x).__name__} can't be handed to the program")


ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain)
ITERATORS += tuple(type(iter(x)) for x in ([], (), "", b"", {}, set(), range(0)))


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
