"""What tests hold of a program's own things, and what they may ask of them. Stdlib only."""

import builtins
import itertools

# isdigit, issubset, startswith ...: what only a plain value may say of itself, for a program's own
# object would say what the test wants to hear
VERDICTS = {
    n for kind in (str, float, set) for n in dir(kind) if n.startswith("is") or n.endswith("with")
}


class Proxy:
    """Something of the guest's. It is equal to nothing but itself, and neither true nor false."""

    def __init__(self, ask, target):
        self.__dict__.update(_ask=ask, _target=target)

    def __call__(self, *arguments, **named):
        return self._ask("call", self._target, list(arguments), named)

    def __getattr__(self, name):
        if name.startswith("__") or name in VERDICTS:
            raise AttributeError(name)
        return self._ask("getattr", self._target, [name], {})

    def __setattr__(self, name, value):
        self._ask("setattr", self._target, [name, value], {})

    def __getitem__(self, key):
        return self._ask("getitem", self._target, [key], {})

    def __setitem__(self, key, value):
        self._ask("setitem", self._target, [key, value], {})

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
        return isinstance(x, Proxy) and self._ask("instance", self._target, [x], {})

    def __bool__(self):
        raise TypeError("what the program returned is no plain value")


def target_of(x):
    """What stands for a proxy, or for something built in, in an argument."""
    if isinstance(x, Proxy):
        return x._target
    if vars(builtins).get(getattr(x, "__name__", None)) is x:
        return [x.__name__]
    raise TypeError(f"{type(x).__name__} can't be handed to the program")


OPERATIONS = {
    "call": lambda x, *arguments, **named: x(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda x, key: x[key],
    "setitem": lambda x, key, value: x.__setitem__(key, value),
    "iter": iter,
    "take": lambda x, size: [*itertools.islice(x, size)],
    "len": len,
    "next": next,
    "str": str,
    "repr": repr,
    "instance": lambda x, y: isinstance(y, x),
}
