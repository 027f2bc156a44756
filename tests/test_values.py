"""What tests see of an honest program, and that none can lie to them by it."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import ROOT
from sandbox import cores
from sandbox import run as sandbox
from verifiers import verify_code

MILLION = "def f(x): return list(range(x)) if type(x) is int else len(x)"
POINT = "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, [2])"
BAG = "class Bag:\n def __init__(self): self.d = {1: 2}\n def __delitem__(self, k): del self.d[k]"
ONE = "def f():\n    yield 1"
HELD = "class Even:\n    def __contains__(self, x): return x % 2 == 0"
COUNTER = "COUNT = 0\ndef f():\n    global COUNT\n    COUNT += 1"
TIME = "from datetime import time\ndef f(): return time(3, 4)"
STDOUT = "import sys\nsys.stdout.buffer.write(b'x')\nsys.stdout.write('\\ud800')\ndef f(): return 1"
FIBONACCI = "def f():\n a, b = 0, 1\n while True:\n  yield a\n  a, b = b, a + b"
ENDS = "next(g)\ntry:\n    next(g)\n    assert False\nexcept StopIteration:\n    pass"


@pytest.mark.parametrize("program, tests", [
    ("LIMIT = 3", "assert LIMIT == 3"),
    ("NAMES = ['a', (1,)]", "assert NAMES == ['a', (1,)] and NAMES[1] == (1,)"),
    (COUNTER, "f()\nassert COUNT == 1\ndef g():\n    f()\n    return COUNT\nassert g() == 2"),
    ("def f(x, self): return x - self", "assert f(self=1, x=3) == 2"),
    (POINT, "assert f().x == 1 and f() == (1, [2]) and P(y=1, x=2).x == 2"),
    (POINT + "\ndef g(p): return p.x", "assert g(f()) == 1 and g(P(3, 4)) == 3"),
    (POINT + "\ndef g(p): return type(p) is P", "assert g(f()) and isinstance(f(), P)"),
    (TIME, "import datetime\nassert f() == datetime.time(3, 4)"),
    ("def f(d): return d.keys()", "assert f({1: 2}) == {1} and [*f({3: 4})] == [3]"),
    ("def f(d): return d.values()", "assert sorted(f({1: 2, 3: 2})) == [2, 2]"),
    ("def f(d): return d.items()", "assert (1, 2) in f({1: 2})"),
    ("from collections import *\ndef f(x): return Counter(x)", "assert f('aab').most_common(1)"),
    (ONE, "g = f()\nnext(g)\nassert next(g, None) is None"),
    (ONE, f"g = f()\n{ENDS}"),
    ("def f(): return iter([1])", f"g = f()\n{ENDS}"),
    (BAG, "b = Bag()\ndel b[1]\nassert b.d == {}\ndel b.d\nassert not hasattr(b, 'd')"),
    (HELD, "assert 2 in Even() and 3 not in Even()"),
    (MILLION, "assert len(f(10**6)) == 10**6 and f(list(range(10**6))) == 10**6"),
    (STDOUT, "assert f() == 1"),
    ("\ufeffdef f(): return 1", "assert f() == 1"),
    (FIBONACCI, "from itertools import islice\ng = f()\nassert [*islice(g, 5)][4] == 3\n"
     "assert [*islice(g, 2)] == [5, 8]"),
    (FIBONACCI, "g = f()\nfor x in g:\n    if x > 4: break\nassert next(g) == 8"),
    ("from itertools import *\ndef f(): return combinations([1, 2], 2)", f"g = f()\n{ENDS}"),
    ("def f(q): q.append(3)", "from collections import deque\nq = deque()\nf(q)\nassert 3 in q"),
    ("class S(list):\n    def top(self): return self[-1]",
     "s = S()\ns.append(4)\nassert s.top() == 4"),
    ("from functools import reduce\ndef f(x, op): return reduce(op, x)",
     "import operator\nassert f([2, 3], operator.mul) == 6 and f([2, 3], max) == 3"),
    ("def f(): return 2**63, -(2**64), 0.1, float('inf')",
     "assert f() == (2**63, -(2**64), 0.1, float('inf'))"),
])  # fmt: skip
def test_tests_see_it(program, tests):
    assert verify_code(program, [tests])


EQUAL = "__eq__ = __contains__ = lambda s, o: True\n __hash__ = lambda s: 0"
LIES = {
    "a constant that equals everything": (f"class A:\n {EQUAL}\nLIMIT = A()", "LIMIT == 3"),
    "another constant": ("LIMIT = 4", "LIMIT == 3"),
    "no constant": ("", "LIMIT == 3"),
    "fields that equal everything": (
        f"from collections import namedtuple\nclass P(namedtuple('P', 'x')):\n {EQUAL}\n"
        "def f(): return P(1)",
        "f() == (2,) or f().x == 2",
    ),
    "keys that hold everything": (f"class dict_keys:\n {EQUAL}\ndef f(): return dict_keys()",
                                  "f() == {1} or 1 in f()"),
    "a date that equals everything": (
        f"import datetime\nclass time(datetime.time):\n {EQUAL}\ndef f(): return time(1)",
        "f() == 3",
    ),
    "what a function returns holds everything": (f"class A:\n {EQUAL}\ndef f(): return A()",
                                                 "4 in f()"),
    "what a function returns counts what it is asked for": (
        "class A:\n count = intersection = lambda s, x: x if type(x) is set else 1\n"
        "def f(): return A()",
        "f().count(4) == 1 or f().intersection({4}) == {4}",
    ),
    "a function with a capital holds everything": (
        f"class A:\n {EQUAL}\ndef Find_Max(): return A()",
        "4 in Find_Max()",
    ),
    "an end of its own": (
        "class A:\n def __next__(s): raise StopIteration\ndef f(): return A()",
        "all(map(lambda g: next(f()) == 4, [1]))",
    ),
    "an end in a call": (
        "def f():\n yield 1\n raise StopIteration\ndef g(): raise StopIteration",
        "all(map(lambda _: g() == 4, [1]))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_no_value_lies(name):
    program, test = LIES[name]
    assert not verify_code(program, [f"assert {test}"])


def test_the_standard_library_can_be_imported():
    for names in (
        "asyncio, multiprocessing, tempfile, shutil, sqlite3, xml.etree.ElementTree, html.parser",
        "configparser, zipfile, optparse, getopt, colorsys, zoneinfo, tomllib, importlib.util",
        "contextvars, logging.handlers, mimetypes, urllib.request, email.mime.text, unittest.mock",
        "ssl, ctypes.util, concurrent.futures, encodings.cp500, this, antigravity, turtle as t",
    ):
        have_tk = "turtle" not in names or __import__("importlib.util").util.find_spec("_tkinter")
        names = names if have_tk else names.partition(", turtle")[0]
        program = f"import {names}\ndef f(x): return x"
        assert verify_code(program, ["assert f(1) == 1"]), names
    used = "import sqlite3, email\ndef f():\n    email.message_from_string('a: b')\n"
    used += "    return sqlite3.connect(':memory:').execute('select 1 + 1').fetchall()"
    assert verify_code(used, ["assert f() == [(2,)]"])
    fails = "import tempfile\ndef f():\n    with tempfile.TemporaryFile(): return 1"
    assert not verify_code(fails, ["assert f() == 1"])
    assert not verify_code("import no_such_module\ndef f(): return 1", ["assert f() == 1"])


POISON = """
import ctypes, sys
from sandbox import shelf
class Buffer(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("rest", ctypes.c_char * 200)]
def f():
    buffer, size = Buffer(), len(shelf._memory) // 4096 * 4096
    api = ctypes.pythonapi.PyObject_GetBuffer
    assert api(ctypes.py_object(shelf._memory), ctypes.byref(buffer), 0) == 0
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(buffer.at), ctypes.c_size_t(size), 3) == 0
    ctypes.memset(buffer.at, 0, size)
    return shelf._memory[:9]
"""


def test_a_program_can_poison_no_module_but_its_own():
    assert verify_code(POISON, ["assert f() == bytes(9)"])
    assert verify_code("import optparse\ndef f(): return 1", ["assert f() == 1"])


def test_numpy_comes_by_a_flag_alone(monkeypatch):
    program = "import numpy as np\ndef f(x): return np.array(x) * 2"
    tests = ["import numpy as np", "assert (f([1, 2]) == np.array([2, 4])).all()"]
    tests += ["assert f(3) == 6 and f([1.5]).tolist() == [3.0] and f([1]).shape == (1,)"]
    assert not verify_code(program, ["assert f(3) == 6"])
    monkeypatch.setattr(sandbox, "numpy", True)
    assert verify_code(program, tests)
    assert not verify_code("def f(x): return 5", ["assert f(3) == 6"])
    reads = "import numpy\ndef f(): return len(numpy.fromfile('/etc/passwd', 'u1'))"
    assert not verify_code(reads, ["assert f() > 0"])


DOUBLE = "def double(x): return 2 * x"
CHECK = "def check(candidate):\n    assert candidate(4) == 8"


@pytest.mark.parametrize("tests", ["assert double(4) == 8", f"{CHECK}\ncheck(double)", CHECK])
def test_with_an_entry_point_asserts_and_check_both_judge(tests):
    assert verify_code(DOUBLE, tests, "double")
    assert not verify_code("def double(x): return x", tests, "double")


@pytest.mark.parametrize("tests, entry_point, message", [
    ("", None, "assert nothing"),
    ("", "double", "assert nothing"),
    ("double(4)", "double", "assert nothing"),
    ("def check(candidate):\n    candidate(4)", "double", "assert nothing"),
    (CHECK, None, "assert nothing that is reached: give the entry_point"),
    ("META = {'a': 1}\n\n" + CHECK, None, "assert nothing that is reached: give the entry_point"),
    ("def test_double():\n    assert double(4) == 8\nprint('ok')", None, "assert nothing"),
    ("assert (double(4) == 9, 'why')", None, "assert nothing"),
    ("import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(double(4), 8)\n"
     "unittest.main(exit=False)", None, "unittest.main"),
    ("import numpy as np\nnp.testing.assert_allclose(double(4), 8)", None, "numpy.*--code_numpy"),
    ("from solution import double\nassert double(4) == 8", None, "solution, which is not there"),
    ("def check(candidate, *, n):\n    assert candidate(4) == n", "double", "must take one thing"),
    ("assert double(4) == 8", "class", "no name of a function"),
    ("def check():\n    assert double(4) == 8", "double", "must take one thing"),
    ("def check(f, g):\n    assert f(4) == 8", "double", "must take one thing"),
    ("check = 3\nassert double(4) == ", "double", "do not compile"),
    (CHECK, "2double", "no name of a function"),
])  # fmt: skip
def test_tests_that_can_not_judge_are_an_error_and_no_verdict(tests, entry_point, message):
    with pytest.raises(ValueError, match=message):
        verify_code(DOUBLE, tests, entry_point)


@pytest.mark.parametrize("tests", [
    "def test():\n    assert double(4) == 8\ntest()",
    "class T:\n    def test(self): assert double(4) == 8\nT().test()",
    "def one(x): assert double(x) == 2 * x\ndef check(candidate): one(4)\ncheck(double)",
    "def test_a():\n    assert double(4) == 8\n"
    "for name in [*globals()]:\n    if name.startswith('test_'): globals()[name]()",
    "for x in range(4):\n    if double(x) != 2 * x:\n        raise ValueError(x)",
    "import sys\nassert double(4) == 8\nsys.exit(0)",
    "import sys\nif double(4) != 8:\n    sys.exit(1)",
    "if double(4) != 8: exit('wrong')\nquit()",
    "try:\n    import no_such\nexcept ImportError: pass\nassert double(4) == 8",
    "assert candidate(4) == 8",
])  # fmt: skip
def test_other_tests_can_judge(tests):
    assert verify_code(DOUBLE, tests, "double")
    assert not verify_code("def double(x): return x", tests, "double")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_an_error(timeout):
    with pytest.raises(ValueError, match="timeout"):
        verify_code(DOUBLE, ["assert double(4) == 8"], timeout=timeout)


CYCLE = "class Node:\n    next = None\ndef f():\n    n = Node()\n    n.next = n\n    return n"
LENGTH = "def length(n):\n    return 0 if n is None else 1 + length(n.next)\n"
NESTED = """
import json, os
def f():
    deep = b'[' * 400000 + b']' * 400000
    os.write(3, len(deep).to_bytes(4, 'little') + deep)
"""


@pytest.mark.parametrize("program, tests", [
    (CYCLE, LENGTH + "assert length(f()) == 1"),
    (CYCLE, "import sys\nsys.setrecursionlimit(10**6)\n" + LENGTH + "assert length(f()) == 1"),
    (NESTED, "import sys\nsys.setrecursionlimit(10**6)\nassert f() == 1"),
])  # fmt: skip
def test_a_program_that_drives_its_tests_too_deep_is_wrong_and_ends_no_run(program, tests):
    assert verify_code(program, tests, timeout=1.0) is False


def test_what_computes_is_limited_by_processor_time_and_what_sleeps_by_the_clock(monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "_try", lambda request: asked.append(request) or True)
    verify_code(DOUBLE, ["assert double(4) == 8"], timeout=2.0)
    monkeypatch.setattr(sandbox, "timeout", 7.0)
    verify_code(DOUBLE, ["assert double(4) == 8"])
    assert [request["timeout"] for request in asked] == [2.0, 7.0]
    assert all(9 < request["sleep"] - request["timeout"] < 10 for request in asked)


SPENDS = """
import time
def f(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return 1
def g(seconds):
    time.sleep(seconds)
    return 1
"""


def test_processor_time_is_counted_of_program_and_tests_together():
    assert verify_code(SPENDS, ["assert f(0.3) == 1"], timeout=0.9)
    assert not verify_code(SPENDS, ["assert f(1.5) == 1"], timeout=0.9)
    assert not verify_code(SPENDS, ["for _ in range(9):\n    assert f(0.3) == 1"], timeout=0.9)
    spend = "import time\nwhile time.process_time() < 0.6:\n    pass\n"
    assert verify_code(SPENDS, [spend + "assert f(0.1) == 1"], timeout=0.9)
    assert not verify_code(SPENDS, [spend + "assert f(0.6) == 1"], timeout=0.9)


def test_sleep_is_no_processor_time_but_ends(monkeypatch):
    monkeypatch.setattr(sandbox, "SLEEP", 2.0)
    assert verify_code(SPENDS, ["assert g(1.0) == 1"], timeout=0.3)
    assert not verify_code(SPENDS, ["assert g(9.0) == 1"], timeout=0.3)
    assert not verify_code(SPENDS, ["while True: assert g(0.1) == 1"], timeout=0.3)
    assert not verify_code(SPENDS, ["import time", "time.sleep(9)\nassert f(0)"], timeout=0.3)


CROWD = """
import hashlib, threading, time
def spend():
    for _ in range(300):
        hashlib.sha256(bytes(10**6)).digest()  # which lets the others run
def f():
    threads = [threading.Thread(target=spend) for _ in range(12)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    time.sleep(1000)
"""


@pytest.mark.slow
def test_threads_that_wait_side_by_side_earn_no_sleep(monkeypatch):
    monkeypatch.setattr(sandbox, "SLEEP", 2.0)
    started = time.monotonic()
    assert not verify_code(CROWD, ["assert f() == 1"], timeout=6.0)
    assert time.monotonic() - started < 40


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores.share_of_cores() == 8
    for ranks, share in (("3", 2), ("8", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cores.share_of_cores() == share


BUSY_CALLER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from sandbox import run
from verifiers import verify_code
program, = json.load(sys.stdin)
run.SLEEP = 0.5  # less than all of them wait for a core
def one(_):
    return verify_code(program, ["assert f(0.8) == 1"], timeout=1.5)
with ThreadPoolExecutor(4) as threads:
    print(json.dumps([*threads.map(one, range(8))]))
"""


@pytest.mark.slow
def test_verdicts_do_not_depend_on_how_busy_the_machine_is():
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with ThreadPoolExecutor(3) as callers:
            said = [*callers.map(lambda _: busy_caller(), range(3))]
    finally:
        for process in spin:
            process.kill()
            process.wait()
    assert said == [[True] * 8] * 3


def busy_caller() -> list[bool]:
    command = [sys.executable, "-c", BUSY_CALLER]
    run = subprocess.run(command, cwd=ROOT, input=json.dumps([SPENDS]), capture_output=True,
                         text=True, check=True)  # fmt: skip
    return json.loads(run.stdout)
