"""What tests can't judge is said before they run: else every program, or none, would pass them."""

import ast
import functools
import keyword
import sys
import warnings

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
RUNNERS = {"unittest": ("main", "TextTestRunner"), "doctest": ("testmod",), "pytest": ("main",)}
BY_NAME = {"globals", "locals", "vars", "eval", "exec"}


warnings.filterwarnings("ignore", module="a test")  # `assert (x, y)`, say: it is refused below


@functools.lru_cache(1 << 12)
def require_judge(tests: str, entry_point: str | None = None, numpy: bool = False) -> None:
    """ValueError if test code can't tell a right program from a wrong one.

    With an entry_point, test code may define `check(candidate)`, HumanEval's form, which is called
    with that function. Else what it asserts has to be reached when it runs from top to bottom.
    numpy: tests may import it.
    """
    try:
        body = compile(tests, "a test", "exec", ast.PyCF_ONLY_AST, dont_inherit=True).body
        compile(tests, "a test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests do not compile: {error}") from None
    if entry_point is not None:
        if not entry_point.isidentifier() or keyword.iskeyword(entry_point):
            raise ValueError(f"the entry point {entry_point!r} is no name of a function")
    _require_packages(body, numpy)
    reached = [*_reached(body, entry_point)]
    for node in reached:
        module = getattr(getattr(node, "value", None), "id", None)
        if isinstance(node, ast.Attribute) and node.attr in RUNNERS.get(module, ()):
            raise ValueError(f"the tests call {module}.{node.attr}, which finds none: call them")
    if not any(map(_asserts, reached)):
        names = [getattr(node, "name", "") for node in body]
        hint = ": give the entry_point that `check` is for" if "check" in names else ""
        raise ValueError(f"the tests assert nothing that is reached{hint * (entry_point is None)}")


def _require_packages(body: list[ast.stmt], numpy: bool) -> None:
    named = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "." for node in body if isinstance(node, ast.ImportFrom)]
    for name in (name.partition(".")[0] for name in named):
        if name not in sys.stdlib_module_names and not (numpy and name == "numpy"):
            hint = (
                ": see --code_numpy" if name == "numpy" else "; a program's names are there as such"
            )
            raise ValueError(f"the tests import {name}, which is not there{hint}")


def _reached(body: list[ast.stmt], entry_point: str | None):
    """All nodes of what runs: no definition that nothing names."""
    defined = {node.name: node for node in body if isinstance(node, DEFINITIONS)}
    check = defined.get("check") if entry_point is not None else None
    if check is not None:
        _require_one_thing(check)
    parts = [node for node in body if not isinstance(node, DEFINITIONS) or node.decorator_list]
    parts += [check] * (check is not None)
    for part in parts:  # which grows
        for node in ast.walk(part):
            yield node
            name = getattr(node, "attr", getattr(node, "id", None))
            names = [*defined] if name in BY_NAME else [name]
            parts += [defined.pop(name) for name in names if name in defined]


def _require_one_thing(check: ast.stmt) -> None:
    takes = getattr(check, "args", None)
    known = isinstance(check, ast.FunctionDef)
    needed = len(takes.posonlyargs + takes.args) - len(takes.defaults) if known else 0
    one = known and (needed == 1 or needed < 1 and bool(takes.args or takes.vararg))
    if not one or None in takes.kw_defaults:
        raise ValueError("the tests' `check` must take one thing, the function to be checked")


def _asserts(node: ast.AST) -> bool:
    """An assert, a raise, an exit, or self.assertEqual(...), assert_allclose(...) and the like."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Tuple)  # assert (x, "why") always holds
    called = node.func if isinstance(node, ast.Call) else None
    name = getattr(called, "attr", getattr(called, "id", ""))
    return isinstance(node, ast.Raise) or "assert" in name.lower() or name in ("exit", "quit")
