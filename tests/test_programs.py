"""extract_code: the program that a response stands by, and nothing else, in whatever fences."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answers.programs import bound, extract_code, lift_futures, parse
from tasks import TASKS

F = "```"
DOUBLE = "def double(x):\n    return 2 * x"
FENCED = f"{F}python\n{DOUBLE}\n{F}"
INDENTED = DOUBLE.replace("\n", "\n   ")
DOCUMENTED = f'def double(x):\n    """Twice.\n\n    {F}python\n    double(1)\n    {F}\n    """\n'
DOCUMENTED += "    return 2 * x"


@pytest.mark.parametrize("response, program", [
    ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1"),
    ("```\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2"),
    ("```python\nx = 1", "x = 1"),
    ("a\n```python\nx = 1\n```\nb\n```python\nx = 2", "x = 2"),
    ("```python title='a b'\nx = 1\n```\nyes\n```", "x = 1"),
    ("```python\nx = 1\n```python\nx = 2\n```", "x = 2"),
    ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
    ("```\n```", ""),
    ("[BEGIN]\nx = 1\n[DONE]\n[BEGIN]\nx = 2\n[DONE] bye", "x = 2"),
    ("[BEGIN] x = 1", "x = 1"),
    ("<think>```python\nx = 1\n```</think>x = 2", "x = 2"),
    ("x = 1\n", "x = 1"),
    ("", ""),
])  # fmt: skip
def test_the_program_in_a_response(response, program):
    assert extract_code(response) == program


def test_long_responses_are_searched_in_no_time():
    started = time.process_time()
    for piece, times in (("`", 10**6), ("```\n", 10**5), ("``` ", 10**5), ("[BEGIN]", 10**5)):
        extract_code(piece * times)
    extract_code(" " * 10**6 + "```")
    sums = "".join(f"x{n} = {n} + {n}\n" for n in range(3000))
    extract_code(f"Hi there:\n{sums}" + "x = (\n" * 40)
    assert time.process_time() - started < 30  # and not hours


@pytest.mark.parametrize("response", [
    f"{FENCED}\nUse it so:\n{F}python\nprint(double(4))\n{F}",
    f"{FENCED}\nUse it so:\n{F}python\nn = int(input())\nprint(double(n))\n{F}",
    f"{FENCED}\nUse it so:\n{F}\nfrom solution import double\nprint(double(4))\n{F}",
    f"{FENCED}\nUse it so:\n{F}\nfrom solution import double\nfour = double(2)\n{F}",
    f"{FENCED}\nTests:\n{F}python\nassert double(4) == 9\n{F}",
    f"{FENCED}\nTests:\n{F}\nimport pytest\ndef test_double():\n    assert double(4) == 9\n{F}",
    f"{FENCED}\nThis prints:\n{F}\n8\n{F}",
    f"{FENCED}\n{F}bash\npython double.py\n{F}\n{F}bash\nX=1\n{F}",
    f"{FENCED}\n{F}text\nO(1)\n{F}",
    f"{FENCED}\n{F}\n>>> double(4)\n8\n{F}",
    f"{F}python\ndef double(x):\n    return x\n{F}\nBetter:\n{FENCED}",
    f"{F}python\nraise SystemExit\ndouble = 3\n{F}\nBetter:\n{FENCED}",
    f"{FENCED}\nBetter:\n{F}python\ndef double(x):\n    return (x +",  # cut off
    f"{FENCED}\nUse it so:\n{F}\nresult = double(my_number)\n{F}",
    f"{FENCED}\nIt does:\n{F}\ny = 2 * number\n{F}",
    f"{FENCED}\nIt says:\n{F}\ndouble = 8\n{F}",
    f"{FENCED}\nOr with NumPy:\n{F}python\nimport numpy\ndef double(x):\n    return x\n{F}",
    f"{FENCED}\nFill in:\n{F}python\ndef double(x):\n    # your code here\n    pass\n{F}",
    f"{F}python\ndef double(x):\n    return x\n{F}{F}python\n{DOUBLE}\n{F}",  # glued
])  # fmt: skip
def test_what_stands_around_a_program_does_not_replace_it(response):
    assert extract_code(response) == DOUBLE


@pytest.mark.parametrize("first, second", [
    ("def twice(x):\n    return x + x", "def double(x):\n    return twice(x)"),
    ("import math", DOUBLE),
    (DOUBLE, "LIMIT = 3"),
    ("memo = []\nfor i in range(3):\n    memo.append(i)", "def f():\n    return memo"),
    ("import functools\ndef mul(a, b): return a * b", "double = functools.partial(mul, 2)"),
    ("x = 4", "print(x)\ny = x"),
    ("def fib(n):\n    return n", "import functools\nfib = functools.lru_cache(None)(fib)"),
    ("class E(Exception):\n    pass", "def double(x):\n    raise E"),
    ("LINE = '~~~~'\nFENCE = '```'", DOUBLE),
])  # fmt: skip
def test_a_program_in_two_blocks_is_whole(first, second):
    assert extract_code(f"{F}\n{first}\n{F}\nand\n{F}py\n{second}\n{F}") == f"{first}\n\n{second}"


@pytest.mark.parametrize("response", [
    f"{F}python\n{DOUBLE}\n",
    f"{DOUBLE}\n{F}",
    f"{F}python\n{DOUBLE}{F}",
    f"{DOUBLE}{F}",
    f"Solution: {F}python\n{DOUBLE}\n{F}",
    f"{F}python {DOUBLE}\n{F}",
    f"{F}{DOUBLE}\n{F}",
    f"~~~python\n{DOUBLE}\n~~~",
    f"{F}`python\n{DOUBLE}\n{F}`",
    f"{F}\npython\n{DOUBLE}\n{F}",
    f"{F}{{.python}}\n{DOUBLE}\n{F}",
    f"{F}python\r\n{DOUBLE}\r\n{F}\r\n".replace("\n    ", "\r\n    "),
    f"Use {F}double{F} so:\n{FENCED}",
    f"1. So:\n   {F}python\n   {INDENTED}\n   {F}",
    f"1. {F}python\n   {INDENTED}\n   {F}",
    f"[PYTHON]\n{DOUBLE}\n[/PYTHON]",
    f"<code>\n{DOUBLE}\n</code>",
    f"Here is the program:\n\n{DOUBLE}\n\nIt's double, that's all.",
    f"\ufeff{DOUBLE}",
    "So:\n\n    " + DOUBLE.replace("\n", "\n    ") + "\n\nDone.",
    f"<answer>{DOUBLE}</answer>",
])  # fmt: skip
def test_a_program_is_found_in_whatever_it_is_put(response):
    assert extract_code(response) == DOUBLE


@pytest.mark.parametrize("program", [
    "def test_even(x):\n    return x % 2 == 0", "def test_even(x):\n    yield x",
])  # fmt: skip
def test_what_looks_like_a_test_or_a_stub_may_be_the_program(program):
    usage = f"{F}python\nfrom solution import *\nprint(test_even(4))\n{F}"
    assert extract_code(f"{F}python\n{program}\n{F}\n{usage}") == program


def test_pieces_among_prose_are_joined():
    twice, double = "def twice(x):\n    return x + x", "def double(x):\n    return twice(x)"
    assert (
        extract_code(f"First:\n\n{twice}\n\nThen:\n\n{double}\n\nDone.") == f"{twice}\n\n{double}"
    )


def test_a_fence_in_a_docstring_ends_no_program():
    for response in (DOCUMENTED, f"{F}python\n{DOCUMENTED}\n{F}\nDone."):
        assert extract_code(response) == DOCUMENTED


def test_the_body_of_a_function_stays_indented():
    body = "    y = 2 * x\n    return y"
    assert extract_code(f"{F}python\n{body}\n{F}\nprints\n{F}\n8\n{F}") == body
    problem = TASKS["humaneval"].parse(HUMANEVAL)
    assert TASKS["humaneval"].verify(f"{F}python\n{body}\n{F}", problem)


HUMANEVAL = {
    "prompt": 'import math\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    "entry_point": "double",
}


@pytest.mark.parametrize("start", [
    "from __future__ import annotations\n",
    "# solution\nfrom __future__ import annotations\n",
    '"""Doubles."""\nfrom __future__ import annotations\n',
    "from __future__ import (\n    division, annotations,\n)\n",
    "from __future__ import annotations; import math\n",
])  # fmt: skip
def test_future_imports_stand_first_behind_a_prompt_too(start):
    task = TASKS["humaneval"]
    assert task.verify(f"{F}python\n{start}{DOUBLE}\n{F}", task.parse(HUMANEVAL))
    assert not task.verify(f"{F}python\n{start}double = 3\n{F}", task.parse(HUMANEVAL))
    whole = start + DOUBLE
    assert lift_futures(whole) == whole  # where they stand first, nothing is changed
    lifted = lift_futures("import re\n" + whole)
    assert lift_futures(lifted) == lifted and "import re" in lifted


PIECES = st.sampled_from([
    F, "~~~", "\n", "\n", "python", "def f(x):", "\n    return x", "import math", "x = 1", '"""',
    "from __future__ import annotations", "print(f(1))", "[BEGIN]", "[DONE]", "</think>", "\r", "(",
    "\ud800", "\0", "class A:\n    pass", "Sure: ", ">>> ", "    ", "async ", "@f", ";", "#",
])  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES | st.text(max_size=3), max_size=16).map("".join))
def test_no_text_makes_extract_code_raise_and_a_program_is_its_own_program(text):
    program = extract_code(text)
    if bound(parse(program)):
        assert extract_code(program) == program
