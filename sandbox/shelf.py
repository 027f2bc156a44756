"""The standard library for programs that are jailed, and so can open no file.

The server puts the code of all its modules in Python on a shelf: memory that all its forks share,
so that none pays for what it does not import. Modules in C can't lie there: a guest loads them
before it is jailed, if its program names a module of the shelf. Stdlib only.
"""

import importlib
import marshal
import mmap
import os
import pkgutil
import re
import sys
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader, ModuleSpec

# Python's own tests, and _asyncio, which loads all of asyncio, and which that does without
LEFT_OUT = ("test", "tests", "idlelib", "turtledemo", "ensurepip", "_test", "_ctypes_test", "_xx")
LEFT_OUT += ("xx", "_asyncio")
WORD = re.compile(r"[a-z_]\w*")

_places: dict[str, tuple[int, int, bool]] = {}  # of a module: where its code lies; is it a package
_extensions: list[str] = []
_memory: mmap.mmap


def fill() -> None:
    """With what is not loaded yet; from then on, importing looks here first."""
    global _memory
    with open(os.memfd_create("shelf"), "w+b") as file:
        _put(file, sys.path)
        file.flush()
        # private: if a program writes there all the same, nobody else sees it
        _memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    sys.meta_path.insert(0, sys.modules[__name__])


def _put(file, path: list[str], prefix: str = "") -> None:
    for info in pkgutil.iter_modules(path, prefix):
        name = info.name
        if name.rpartition(".")[2].startswith(LEFT_OUT):
            continue
        if name.partition(".")[0] not in sys.stdlib_module_names:
            continue
        spec = info.module_finder.find_spec(name)
        if isinstance(spec.loader, ExtensionFileLoader):
            _extensions.append(name)
        elif name not in sys.modules:
            with suppress(ImportError, SyntaxError):
                code = marshal.dumps(spec.loader.get_code(name))
                _places[name] = (file.tell(), file.write(code), info.ispkg)
        if info.ispkg:
            _put(file, spec.submodule_search_locations, name + ".")


def wanted_by(program: str) -> bool:
    """Whether it imports any module that is not loaded; `this` is mostly a word of a docstring."""
    lines = (line for line in program.split("\n") if "import" in line)
    return not _places.keys().isdisjoint(WORD.findall(" ".join(lines)))


def load_extensions() -> None:
    for name in _extensions:
        with suppress(Exception):  # one that lacks a library of the system, say
            importlib.import_module(name)


# What follows is Python's protocol of an importer, whose part this module plays.


def find_spec(name, path=None, target=None):
    if name in _places:
        return ModuleSpec(name, sys.modules[__name__], is_package=_places[name][2])
    return None


def create_module(spec):
    return None


def exec_module(module):
    start, size, _ = _places[module.__name__]
    exec(marshal.loads(_memory[start : start + size]), vars(module))
