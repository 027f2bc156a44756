"""The program that a response stands by, in the ways in which chat models write one."""

import ast
import builtins
import re
import sys
import textwrap
import warnings
from functools import lru_cache
from typing import NamedTuple

FENCE = re.compile(r"`{3,}|(?<![^ \t])~{3,}")  # tildes begin a line
PYTHON = ("py", "python", "py3", "python3", "ipython")
LANGUAGE = re.compile(r"[{.\s]*([\w+#-]*)[}\s]*")
CODE = re.compile(r"(?:async +def|def|class) +\w|@\w|import +\w|from +[\w.]+ +import\b|\w+ *= *\w")
TAG, END_TAG = re.compile(r"\[(?:BEGIN|PYTHON)\]"), re.compile(r"\[(?:DONE|/PYTHON)\]")
SHOWN = (">>>", "$ ")  # how a session of an interpreter or a shell begins
LONGEST_READ = 1 << 16  # characters that are read as Python: no response is a longer program
PACKAGES = {*sys.stdlib_module_names}  # that programs may import; --code_numpy adds one
TRIES = 32  # how often in one response a guess at where a program ends may go wrong

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
QUIET = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
OWN_SCOPE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
IN_FUNCTIONS = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await)

# what Python says of strings in a response is nobody's business
warnings.filterwarnings("ignore", module="a response")


class Block(NamedTuple):
    text: str
    tree: ast.Module | None  # None: no Python
    python: bool  # by its fence, which may name no language


class Mark(NamedTuple):
    """A line with a fence: its number, and what it is made of."""

    line: int
    before: str
    fence: str
    after: str


def extract_code(response: str) -> str:
    """The program in a response, of what follows the last `</think>`.

    Of its fenced blocks those that define, import or assign something, in order: a later definition
    of the same name wins. Drafts that are wholly defined anew, examples of use, tests and output
    are left out. Without a fence it is what stands between `[BEGIN]` and `[DONE]`, or is Python
    among prose. Where nothing is a program it is the last block, or all of the text.
    """
    text = response.rpartition("</think>")[2].removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if bound(parse(text)):
        return lift_futures(text.strip("\n"))  # a fence in it is in a docstring
    blocks = _fenced(text)
    if not blocks:
        text = TAG.split(END_TAG.sub("[DONE]", _without_ends(text)))[-1].partition("[DONE]")[0]
        text = text.strip("\n")
        blocks = _among_prose(text)
    binding = [block for block in blocks if bound(block.tree)]
    programs = _chosen([block for block in binding if block.python] or binding)
    if programs:
        return lift_futures("\n\n".join(block.text for block in programs))
    # a function's body, or a program that was cut off, before what runs and does nothing
    likely = [b for b in blocks if b.python and not b.text.lstrip().startswith(SHOWN)] or blocks
    last = [block for block in likely if block.tree is None] or likely
    return last[-1].text if last else text


def parse(text: str) -> ast.Module | None:
    return _parse(text)[0]


@lru_cache(64)  # whoever asks for the answer of a response asks for its verdict too
def _parse(text: str) -> tuple[ast.Module | None, int]:
    """(syntax tree or None, the line that is no Python)."""
    if len(text) > LONGEST_READ:
        return None, 0
    try:
        return compile(text, "a response", "exec", ast.PyCF_ONLY_AST, dont_inherit=True), 0
    except SyntaxError as error:
        return None, error.lineno or 0
    except (ValueError, RecursionError, MemoryError):
        return None, 0


def bound(tree: ast.Module | None) -> set[str]:
    """The names that a program's own lines bind; empty: it is none, or a function's body."""
    names, nodes = set(), [*tree.body] if tree else []
    for node in nodes:  # which grows
        if isinstance(node, IN_FUNCTIONS):
            return set()
        if isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, OWN_SCOPE):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def lift_futures(program: str) -> str:
    """`from __future__ import` has to stand first, wherever it came to stand by joining."""
    tree = parse(program) if "__future__" in program else None
    if tree is None or not _late(tree):
        return program
    lines, found = program.encode().split(b"\n"), []
    for node in reversed(tree.body):
        if _is_future(node):
            found.insert(0, ast.unparse(node))
            before = lines[node.lineno - 1][: node.col_offset]
            after = lines[node.end_lineno - 1][node.end_col_offset :]
            lines[node.lineno - 1 : node.end_lineno] = [before + b"pass" + after]
    return "\n".join([*found, b"\n".join(lines).decode()])


def _late(tree: ast.Module) -> bool:
    body = tree.body[ast.get_docstring(tree, clean=False) is not None :]
    kinds = [_is_future(node) for node in body]
    return any(kinds[kinds.index(False) :]) if False in kinds else False


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _fenced(text: str) -> list[Block]:
    """The blocks between fences, closed or not, that are not blank."""
    lines = text.split("\n")
    marks, blocks, tries, k = _marks(lines), [], iter(range(TRIES)), 0
    while k < len(marks):
        mark, end = marks[k], k + 1
        if mark.before.strip() and not mark.after and end == len(marks):
            break  # at the end of the last line of code: it only closes
        if mark.after.endswith(mark.fence):  # within a line
            inside = mark.after.removesuffix(mark.fence)
            blocks.append(_block([], mark._replace(after=inside)))
            k = end
            continue
        while end < len(marks) and not (_closes(marks[end], mark) or _opens(marks[end])):
            end += 1
        if end < len(marks) and marks[end].fence == 2 * mark.fence:  # it closes, and opens another
            marks[end] = marks[end]._replace(fence=mark.fence)
        block = _block(_between(lines, mark, marks[end : end + 1]), mark)
        for j in range(end + 1, len(marks)):  # a fence in a docstring is none
            if block.tree and block.text.strip() or next(tries, None) is None:
                break
            longer = _block(_between(lines, mark, [marks[j]]), mark)
            if _closes(marks[j], mark) and bound(longer.tree):
                block, end = longer, j
        blocks.append(block)
        k = end + (end < len(marks) and _closes(marks[end], mark))
    return [block for block in blocks if block.text.strip()]


def _marks(lines: list[str]) -> list[Mark]:
    return [
        Mark(number, line[: fence.start()], fence[0], line[fence.end() :].strip())
        for number, line in enumerate(lines)
        if (fence := FENCE.search(line))
    ]


def _opens(mark: Mark) -> bool:
    """Another block, though one is open."""
    return bool(mark.after) and not mark.before.strip()


def _closes(mark: Mark, opening: Mark) -> bool:
    return mark.fence.startswith(opening.fence) and not mark.after


def _between(lines: list[str], opening: Mark, closing: list[Mark]) -> list[str]:
    last = closing[0] if closing else Mark(len(lines), "", "", "")
    code = [last.before] if last.before.strip() and not last.after else []
    return lines[opening.line + 1 : last.line] + code


def _block(lines: list[str], opening: Mark) -> Block:
    """With what stands on the opening fence's own line, if that is code."""
    language = LANGUAGE.match(opening.after)
    python = language[1].lower() in ("", *PYTHON)
    for start in (language.end() if python else 0, 0):
        if CODE.match(opening.after[start:]):
            lines, python = [opening.after[start:], *lines], True
            break
    if lines and lines[0].strip().lower() in PYTHON:
        lines = lines[1:]
    indent = "" if opening.before.strip() else f"{{0,{len(opening.before)}}}"
    text = "\n".join(lines).strip("\n")
    text = re.sub(f"^[ \\t]{indent}", "", text, flags=re.MULTILINE) if indent else text
    loose = textwrap.dedent(text)
    tree = parse(text)
    if tree is None and bound(parse(loose)):
        text, tree = loose, parse(loose)
    return Block(text, tree, python)


def _without_ends(text: str) -> str:
    """Without fences that close what none has opened, and tags around a program."""
    text = re.sub(rf"({FENCE.pattern})[ \t]*$", "", text, flags=re.MULTILINE)
    return re.sub("</?(?:answer|code|python|program|solution)>", "\n", text)


def _among_prose(text: str) -> list[Block]:
    """The pieces of a text without fences that are Python, indented or not."""
    lines, pieces, start, tries = text.split("\n"), [], 0, iter(range(TRIES))
    while len(text) <= LONGEST_READ:
        while start < len(lines) and not CODE.match(lines[start].lstrip()):
            start += 1
        indent = len(lines[start]) - len(lines[start].lstrip()) if start < len(lines) else 0
        rest = [re.sub(f"^[ \\t]{{0,{indent}}}", "", line) for line in lines[start:]]
        tree = wrong = None
        while rest and next(tries, None) is not None:
            tree, wrong = _parse("\n".join(rest))
            if tree or wrong < 2:
                break
            rest = rest[: wrong - 1]
        if wrong is None:  # nothing is left, or no try
            return pieces
        if tree:
            pieces.append(Block("\n".join(rest).strip(), tree, True))
        start += len(rest) if tree else 1
    return pieces


def _chosen(blocks: list[Block]) -> list[Block]:
    """Of blocks that bind names, those that make the program."""
    programs = [block for block in blocks if _defines(block.tree)]
    programs = [block for block in programs if not _foreign(block.tree)] or programs
    if programs:
        nodes = [node for block in programs for node in ast.walk(block.tree)]
        own = set().union(*(bound(block.tree) for block in programs))
        wanted = _loaded(nodes) - own - _stored(nodes)
        blocks = [b for b in blocks if b in programs or _serves(b.tree, own, wanted)]
    kept, later = [], set()
    for block in reversed(blocks):
        if not bound(block.tree) <= later:  # else a draft
            kept.append(block)
        later |= bound(block.tree) if block in programs or not programs else set()
    return kept[::-1]


def _loaded(nodes: list[ast.AST]) -> set[str]:
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _stored(nodes: list[ast.AST]) -> set[str]:
    names = [node for node in nodes if isinstance(node, ast.Name)]
    names = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _defines(tree: ast.Module) -> bool:
    """Whether it has functions or classes, other than tests and stubs."""
    named = [node for node in tree.body if isinstance(node, DEFINITIONS)]
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return any(not _is_test(node) and not _is_stub(node) for node in named) or any(
        isinstance(value, ast.Lambda) for value in values
    )


def _is_test(node: ast.stmt) -> bool:
    """As pytest and unittest find them; a function that takes something may just be called so."""
    takes = isinstance(node, ast.FunctionDef) and node.args.args
    return node.name.lower().startswith("test") and not takes


def _is_stub(node: ast.stmt) -> bool:
    """A function that says nothing: pass, ..., a docstring, NotImplementedError."""
    return not isinstance(node, ast.ClassDef) and all(
        isinstance(part, ast.Pass)
        or _is_constant(part)
        or (isinstance(part, ast.Raise) and "NotImplementedError" in ast.unparse(part))
        for part in node.body
    )


def _serves(tree: ast.Module, own: set[str], wanted: set[str]) -> bool:
    """Whether a block without definitions belongs to a program that has its `own` names.

    It does if it binds what the program wants. Else an example of its use is told by what it does:
    it prints, asks, asserts, imports the program, calls it, or names what nobody defines.
    """
    if _foreign(tree):
        return False
    if bound(tree) & wanted:
        return True
    nodes = [*ast.walk(tree)]
    called = _loaded([node.func for node in nodes if isinstance(node, ast.Call)])
    loaded = _loaded(nodes) - _stored(nodes) - {*vars(builtins)}
    quiet = all(isinstance(node, QUIET) or _is_constant(node) for node in tree.body)
    return (
        quiet
        and not called & (own | {"input"})
        and loaded <= own | bound(tree)
        and bound(tree) & own <= _loaded(nodes)
    )


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _foreign(tree: ast.Module) -> bool:
    """Whether it imports what no program finds: most often itself, by a made-up name."""
    imported = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module if node.module and not node.level else ".")
    return any(name.partition(".")[0] not in PACKAGES for name in imported)
