"""Hostile programs: each must be a plain False, in time, and leave nothing behind.

An honest one must still be True.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import run as sandbox
from verifiers import extract_code, verify_code

TEST = ["assert f(3) == 4"]
LONG = 60  # seconds on the clock that nothing here takes, on however busy a machine
HONEST = "def f(x):\n    return x + 1"


def test_an_honest_program_passes_and_a_wrong_one_does_not():
    assert verify_code(HONEST, TEST)
    assert not verify_code("def f(x):\n    return x", TEST)
    assert not verify_code("def f(x):\n    pass", TEST)


FORGED = {
    "an answer equal to everything": "class A:\n __eq__ = lambda s, o: True\n __bool__ = __eq__\n"
    "def f(x): return A()",
    "a number equal to everything": "class A(int):\n def __eq__(s, o): return True\n"
    "def f(x): return A(0)",
    "a text equal to everything": "class A(str):\n def __eq__(s, o): return True\n"
    "def f(x): return A('')",
    "leaving with success": "import os\ndef f(x): os._exit(0)",
    "leaving while it is read": "import sys\nsys.exit(0)",
    "a marker on stdout": "import os\ndef f(x):\n os.write(1, b'passed'); print('True')",
    "asserts patched": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
    "def f(x): return 0",
    "builtins patched": "import builtins\nbuiltins.abs = builtins.len = lambda *a: 0\n"
    "def f(x): return 0",
    "frames": "import sys\ndef f(x):\n g = sys._getframe()\n"
    " while g: g.f_locals.clear(); g = g.f_back\n return 0",
    "a callback of the protocol": "import __main__, sandbox.worker as w\n"
    "__main__._passes = w._run = lambda *a: True\ndef f(x): return 0",
    "frames on the wire": "import os\ndef f(x):\n"
    " os.write(3, b'\\x0d\\0\\0\\0[true,null]   '); return 0",
    "a verdict on the wire": "import os\ndef f(x):\n for d in range(64):\n"
    "  try: os.write(d, b'\\4\\0\\0\\0true')\n  except OSError: pass\n return 0",
    "the end of all iteration": "def f(x): raise StopIteration",
    "the protocol's own functions": "import sandbox.guest as g\ng.encode = lambda x, r: True\n"
    "def f(x): return 0",
    "the modules of the protocol": "import json, socket\njson.dumps = lambda *a, **k: 'true'\n"
    "def f(x): return 0",
    "another module of a name": "import sys\nsys.modules['math'] = sys.modules['json'] = sys\n"
    "def f(x): return 0",
    "a subclass of all that ends iteration": "class E(StopIteration): pass\ndef f(x): raise E",
    "the frames of the worker": "import sys\ndef f(x):\n g = sys._getframe()\n while g:\n"
    "  if 'request' in g.f_locals: return 4\n  g = g.f_back\n return 0",
    "the memory of the process": "import gc\ndef f(x):\n for o in gc.get_objects():\n"
    "  if isinstance(o, dict) and 'tests' in o: return 4\n return 0",
}


@pytest.mark.parametrize("name", FORGED)
def test_no_program_can_forge_a_verdict(name):
    assert not verify_code(FORGED[name], TEST, timeout=2)
    assert not verify_code(FORGED[name], ["assert all(map(lambda g: f(3) == 4, [1]))"], timeout=2)


LIAR = """
class Liar:
    def yes(self, *arguments, **named): return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = yes
    __contains__ = __bool__ = __instancecheck__ = yes
    __hash__ = __int__ = __index__ = __abs__ = __sub__ = __rsub__ = __len__ = lambda *arguments: 0
    __iter__ = lambda self: iter([self])
    __getitem__ = lambda self, key: self
    __getattr__ = lambda self, name: self.yes
    __str__ = __repr__ = lambda self: "4"
def f(x): return Liar()
"""


@pytest.mark.parametrize("test", [
    "f(3) == 4", "4 == f(3)", "not f(3) != 4", "3 < f(3) < 5", "f(3) in [4]", "f(3) in {4}",
    "4 in f(3)", "len(f(3)) == 1", "set(f(3)) == {4}", "sorted(f(3)) == [4]",
    "tuple(f(3)) == (4,)", "f(3)[0] == 4", "abs(f(3) - 4) < 1e-6", "math.isclose(f(3), 4)",
    "isinstance(f(3), int)", "type(f(3)) is int", "not f(3)", "int(f(3)) == 4",
    "max(f(3), 4) == 4", "f(3).startswith('4')", "f(3).issubset({4})", "f(3).isdigit()",
    "{4: True}[f(3)]", "bool(f(3))",
])  # fmt: skip
def test_no_object_can_answer_what_its_test_asks(test):
    assert not verify_code(LIAR, ["import math", f"assert {test}"])


def test_modules_that_tests_use_are_not_the_programs_even_if_nobody_imports_them():
    test = ["assert math.isclose(f(3), 4)"]
    assert not verify_code("class math:\n isclose = lambda *a: True\ndef f(x): return 0", test)
    assert verify_code(HONEST, test)


HUNGRY = {
    "catching everything": "def f(x):\n while True:\n  try: f(x)\n  except BaseException: pass",
    "a loop": "while True: pass",
    "sleep": "import time\ndef f(x): time.sleep(99)",
    "memory": "def f(x): return len(bytearray(3 << 30)) and 4",
    "a big answer": "def f(x): return 'x' * (1 << 28)",
    "a deep answer": "def f(x):\n a = []\n for _ in range(10 ** 6): a = [a]\n return a",
    "an endless answer": "import itertools\ndef f(x): return itertools.count()",
    "endless output": "def f(x):\n while True: print('x' * 10000)",
    "a flood on the wire": "import os\ndef f(x):\n while True: os.write(3, b'x' * 65536)",
    "drops on the wire": "import os, time\ndef f(x):\n os.write(3, b'\\xff\\0\\0\\0')\n"
    " while True: os.write(3, b'['); time.sleep(0.1)",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a huge number": "def f(x): return 1 << (1 << 33)",
    "a slow end": "import atexit, time\natexit.register(time.sleep, 99)\n"
    "class A:\n def __del__(s): time.sleep(99)\na = A()\ndef f(x): return 0",
    "threads": "import time\nfrom threading import Thread\ndef f(x):\n"
    " for _ in range(1000): Thread(target=time.sleep, args=(9,)).start()\n return 4",
    "stdin": "def f(x): return int(input() or 4) and input() and 4",
}


@pytest.mark.parametrize("name", HUNGRY)
def test_no_program_takes_more_than_its_share(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SLEEP", 1.0)
    started = time.monotonic()
    assert not verify_code(HUNGRY[name], TEST, timeout=1)
    assert time.monotonic() - started < LONG


ESCAPES = {
    "reading a file": "open('/etc/passwd').read()",
    "writing a file": "open('{path}', 'w').write('x')",
    "listing a folder": "import os; os.listdir('/')",
    "a socket": "import socket; socket.socket()",
    "a process": "import os; os.fork()",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "a signal": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "a signal to itself's group": "import os, signal; os.killpg(0, 0)",
    "a raw call": "import ctypes; 1 / (ctypes.CDLL(None).syscall(2, b'/etc/passwd', 0) + 1)",
    "a raw clone": "import ctypes; 1 / (ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) + 1)",
    "outliving its parent": "import ctypes; 1 / (ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) + 1)",
    "another memory": "open('/proc/self/mem', 'rb')",
    "tracing": "import ctypes; 1 / (ctypes.CDLL(None).ptrace(0, 0, 0, 0) + 1)",
    "the environment": "import os; os.environ['PATH']",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_what_a_program_must_not_do_fails_in_it(name, tmp_path):
    tmp_path.chmod(0o777)
    attempt = ESCAPES[name].format(path=tmp_path / "escaped")
    guarded = f"try:\n  {attempt}\n except Exception:\n  return 'held'"
    program = f"def f(x):\n {guarded}\n return 'escaped'"
    assert verify_code(program, ["assert f(3) == 'held'"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("test", [
    "f(3) // 3 ** 10 ** 6 == 4", "[f(3) for _ in range(99)] == 4", "math.factorial(f(3) % 10 ** 9)",
])  # fmt: skip
def test_tests_that_hang_or_starve_on_an_answer_are_false_in_time(test):
    started = time.monotonic()
    large = "def f(x): return 2 ** (1 << 25) - 1"
    assert not verify_code(large, ["import math", f"assert {test}"], timeout=0.5)
    assert time.monotonic() - started < LONG


@pytest.mark.parametrize("text", [
    "", "\0", "x = 1" * 10**7, "\ud800", "def f(x):", "(" * 10**5, "x = " + "9" * 10**6,
    "é" * 10**6,
])  # fmt: skip
def test_no_text_raises(text):
    assert not verify_code(text, TEST, timeout=2)


PIECES = [
    "def f(x):", "return ", "x", "4", "yield ", "class A:", "import os", "os._exit(0)", "f",
    "raise ", "lambda: ", "while 1: ", '"""', "async ", "await ", "del ", "global ", "nonlocal ",
    *"()[]:,.=`'\\é \n\0\ud800\x0c",
]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_no_text_makes_verify_code_raise(text):
    for response in (text, f"```python\n{text}\n```", f"def f(x):\n {text}"):
        assert verify_code(extract_code(response), ["assert f(3) == [4, 5]"], timeout=0.2) is False


TAGS = st.sampled_from([*"ifcbadpltszq", "Decimal", "range", "date", "timedelta"])
SAID = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | TAGS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(TAGS, inner).map(list)
        | st.dictionaries(TAGS, inner, max_size=2)
    ),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SAID, SAID, SAID, st.booleans())
def test_nothing_that_a_program_says_on_the_wire_makes_a_verdict(one, two, three, whole):
    words = json.dumps(one if whole else [one, two, three]).encode()
    message = len(words).to_bytes(4, "little") + words
    program = f"import os\ndef f(x):\n while True: os.write(3, {message!r})"
    assert verify_code(program, ["assert f(3) == 'expected'"], timeout=0.2) is False


def test_plain_values_come_back_as_they_are():
    values = "[None, True, 3, -2.5, 10**50, 1j, 'é\\ud800', b'b', [1, (2,)], {3, 4}, "
    values += "frozenset({5}), {(1,): [2]}]"
    assert verify_code(f"def f(): return {values}", [f"assert f() == {values}"])
    same = f"for v in {values}:\n    assert f(v) == v and type(f(v)) is type(v)"
    assert verify_code("def f(x): return x", [same])
    assert verify_code("def f(): return float('nan')", ["x = f()\nassert x != x"])
    assert not verify_code("def f(): return 1", ["assert f() is True"])


def test_values_of_the_standard_library_come_back_as_they_are():
    head = "from collections import deque\nfrom datetime import *\n"
    head += "from decimal import Decimal\nfrom fractions import *\n"
    values = "[Fraction(1, 3), Decimal('1.50'), range(1, 9, 2), date(2020, 2, 29), deque([1]), "
    values += "bytearray(b'a'), datetime(2020, 1, 1, tzinfo=timezone.utc), timedelta(1, 2, 3)]"
    assert verify_code(f"{head}def f(): return {values}", [head, f"v = {values}\nassert f() == v"])
    types = "assert [type(x) for x in f(v)] == [type(x) for x in v] and f(v) == v"
    assert verify_code("def f(x): return x", [head, f"v = {values}\n{types}"])


POOL = "import concurrent.futures as c\npool = c.ThreadPoolExecutor(2)\n"
LOUD = "import logging, warnings\nlogging.warning('x')\nwarnings.warn('x')\nprint(flush=True)\n"


@pytest.mark.parametrize("program", [
    "from __future__ import annotations\ndef f(x: X): return x + 1",
    "import logging, unittest, doctest, csv\n" + HONEST,
    "import datetime\ndef f(x): return datetime.datetime.strptime(str(x), '%d').day + 1",
    "def f(x): return int(str(x).encode('latin-1').decode('cp1252')) + 1",
    POOL + "def f(x): return pool.submit(int, x).result() + 1",
    LOUD + HONEST,
    "if __name__ == '__main__': input()\n" + HONEST,
])  # fmt: skip
def test_honest_programs_find_what_python_has(program):
    assert verify_code(program, TEST)


@pytest.mark.parametrize("name", ["jail", "worker", "score", "sandbox.run", "sandbox.grader"])
def test_files_of_ours_are_no_modules_where_tests_run(name):
    missing = f"try:\n import {name}\n assert False\nexcept ImportError:\n assert f(3) == 4"
    assert verify_code(HONEST, [missing])


def test_exceptions_are_those_that_the_tests_expect():
    program = "class E(ValueError): pass\ndef f(x): raise E('bad', x)\ndef g(): f(1)"
    expected = "try:\n    {}\n    assert False\nexcept {} as e:\n    assert e.args == ('bad', 1)"
    assert verify_code(program, [expected.format("f(1)", "E")])
    assert verify_code(program, [expected.format("g()", "ValueError")])
    assert not verify_code(program, [expected.format("f(1)", "KeyError")])
    assert not verify_code(program, [expected.format("f(2)", "E")])
    assert not verify_code("E = BaseException\ndef f(x): return 0", [expected.format("f(1)", "E")])


ENDLESS = """
import itertools
def f(n): yield from itertools.count(n)
class A:
    def __iter__(s): return iter('ab')
"""
NODE = """
class Node:
    def __init__(s, v): s.v, s.next = v, None
def f(n): return n.v + (f(n.next) if n.next else 0)
"""
COUNT = "def f(n):\n yield from range(n)"
CLASSES = "class A(dict): pass\nclass B:\n d = 0"
RAISES = "def f(x): raise KeyError(x)"
NAMED_AS_A_BUILTIN = "def sum(a, b): return a - b"


@pytest.mark.parametrize("program, tests", [
    (ENDLESS, "import itertools\nassert list(itertools.islice(f(3), 5)) == [3, 4, 5, 6, 7]"),
    (ENDLESS, "assert [*A()] == ['a', 'b'] and 'b' in A() and 9999 in f(0)"),
    (COUNT, "assert list(f(3)) == [0, 1, 2]"),
    (COUNT, "g = f(3)\nassert next(g) == 0 and next(g) == 1"),
    ("def f(x): x.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
    ("def f(a=None): a.append(1)", "a = []\nf(a=a)\nassert a == [1]"),
    (CLASSES, "a = B()\na.d = 1\nassert a.d == 1 and isinstance(a, B)"),
    (NODE, "a = Node(1)\na.next = Node(2)\nassert f(a) == 3 and a.next.v == 2"),
    ("def f(x, t): return isinstance(x, t)", "assert f(3, int) and not f(3, str)"),
    (HONEST, "def g(f): return f\nassert f(3) == 4 and [f for f in [1]] == [g(1)]"),
    (HONEST, "if __name__ == '__main__':\n    assert f(3) == 4\nelse:\n    assert False"),
    (RAISES, "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"),
    (NAMED_AS_A_BUILTIN, "assert sum(abs(-3), 1) == 2"),
    (NAMED_AS_A_BUILTIN, "assert sum(3, 1) == 2"),
])  # fmt: skip
def test_what_tests_do_with_programs_works(program, tests):
    assert verify_code(program, [tests])


def test_a_program_cannot_redefine_what_its_tests_are_written_with():
    patched = "def f(x): return 9\ndef abs(x): return 0"
    assert not verify_code(patched, ["assert abs(f(3) - 4) < 1e-6"])
    check = "def check(candidate):\n    assert abs(candidate(3) - 4) < 1e-6"
    assert not verify_code(f"{patched}\ndef check(c): pass", check, "f")
    assert verify_code(HONEST, check, "f") and not verify_code(HONEST, check, "g")


def test_tests_that_loop_are_false_and_tests_that_do_not_compile_are_an_error():
    assert not verify_code(HONEST, [*TEST, "while True: pass"], timeout=0.5)
    for tests in ("assert f(3 =", "return f(3)", "\0", "(" * 1000):
        with pytest.raises(ValueError):
            verify_code(HONEST, tests)
    started = time.monotonic()
    stubborn = (
        "while True:\n    try:\n        assert f(3) == 5\n    except BaseException:\n        pass"
    )
    assert not verify_code(HONEST, [stubborn], timeout=0.5)
    assert time.monotonic() - started < LONG


def test_a_server_or_worker_that_is_killed_is_replaced():
    assert verify_code(HONEST, TEST)
    server = sandbox._server.process.pid
    os.kill(server, signal.SIGKILL)
    assert verify_code(HONEST, TEST) and sandbox._server.process.pid != server

    with killed_once(lambda server: children(server)) as killed:
        assert verify_code("import time\ntime.sleep(1)\n" + HONEST, TEST) and killed


def test_a_killed_guest_is_no_verdict_but_one_that_leaves_is():
    assert verify_code(HONEST, TEST)
    with killed_once(lambda server: sum(map(children, children(server)), [])) as killed:
        assert verify_code("import time\ntime.sleep(1)\n" + HONEST, TEST) and killed
    assert not verify_code("import os\nos._exit(9)", TEST)


@contextmanager
def killed_once(find, by=signal.SIGKILL):
    """The first processes that `find` finds of the server's are sent a signal: their list."""
    killed, stop = [], threading.Event()

    def look():
        while not killed and not stop.wait(0.01):
            with suppress(OSError):  # it has just ended
                killed.extend(find(sandbox._server.process.pid))
                for pid in killed:
                    os.kill(pid, by)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def test_a_stopped_server_is_replaced(monkeypatch):
    monkeypatch.setattr(sandbox, "PATIENCE", 8.0)
    assert verify_code(HONEST, TEST)
    stopped = sandbox._server.process
    os.kill(stopped.pid, signal.SIGSTOP)
    assert verify_code(HONEST, TEST) and stopped.poll() is not None


def test_faults_of_the_machine_are_raised_and_the_self_test_is_made_up_for(monkeypatch):
    monkeypatch.setattr(sandbox, "_server", sandbox._Server())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with monkeypatch.context() as patch:
        open_too_many = lambda: [os.dup(0) for _ in range(10**6)]  # noqa: E731
        patch.setattr(sandbox, "_self_test", open_too_many)
        before = set(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        with pytest.raises(sandbox.SandboxError, match="Too many open files"):
            verify_code(HONEST, TEST)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in set(os.listdir("/proc/self/fd")) - before:
            with suppress(OSError):
                os.close(int(number))
    assert verify_code(HONEST, TEST)
    sandbox._server.stop()


def test_a_server_that_starts_too_slowly_is_a_fault_and_not_started_again_and_again(monkeypatch):
    starts, start = [], sandbox._Server._start
    monkeypatch.setattr(sandbox, "_server", sandbox._Server())
    monkeypatch.setattr(sandbox, "PATIENCE", 0.001)
    monkeypatch.setattr(sandbox._Server, "_start", lambda self: starts.append(1) or start(self))
    with pytest.raises(sandbox.SandboxError, match="does not start here in time"):
        verify_code(HONEST, TEST)
    assert len(starts) <= 3 and sandbox._server.process is None


@pytest.mark.parametrize("find", ["worker", "guest"])
def test_whoever_is_asked_to_end_has_no_verdict(find):
    assert verify_code(HONEST, TEST)
    guests = lambda server: sum(map(children, children(server)), [])  # noqa: E731
    with killed_once(children if find == "worker" else guests, signal.SIGTERM) as killed:
        assert verify_code("import time\ntime.sleep(1)\n" + HONEST, TEST) and killed


def test_a_server_whose_self_test_did_not_end_is_not_used(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_server", sandbox._Server())
    monkeypatch.setattr(sandbox, "_verdict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sandbox._server.worker()
    assert sandbox._server.process is None


def test_a_forked_child_has_a_server_of_its_own_even_if_a_thread_held_the_lock():
    assert verify_code(HONEST, TEST)
    with sandbox._server.lock, ThreadPoolExecutor(1) as other:
        pid = other.submit(fork_and_verify).result()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert verify_code(HONEST, TEST)


def fork_and_verify() -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            right = verify_code(HONEST, TEST)
            sandbox._server.stop()
        finally:
            os._exit(not right)
    return pid


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_hundreds_of_endless_loops_leave_nothing_behind():
    verify_code(HONEST, TEST)
    server, before = sandbox._server.process.pid, len(os.listdir("/proc/self/fd"))
    loop = partial(verify_code, "while True: pass", TEST, timeout=0.02)
    with ThreadPoolExecutor(8) as threads:
        verdicts = [done.result() for done in [threads.submit(loop) for _ in range(300)]]
    assert not any(verdicts) and len(os.listdir("/proc/self/fd")) == before
    deadline = time.monotonic() + LONG
    while children(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children(server) == []
    assert len(os.listdir(f"/proc/{server}/fd")) <= 7
    assert verify_code(HONEST, TEST)


def test_threads_get_their_own_verdicts():
    with ThreadPoolExecutor(8) as threads:
        programs = [f"def f(): return {i % 3}" for i in range(60)]
        right = threads.map(lambda program: verify_code(program, ["assert f() == 1"]), programs)
        assert list(right) == [i % 3 == 1 for i in range(60)]


WITHOUT_A_JAIL = """
from sandbox import run as sandbox
try:
    sandbox.run_tests("def f(): return 1", "assert f() == 1")
except sandbox.SandboxError as e:
    print(e)
sandbox.unsafe = True
print(sandbox.run_tests("def f(): return 1", "assert f() == 1"))
"""


def test_without_a_jail_there_is_no_verdict_unless_that_is_asked_for(tmp_path):
    broken = shutil.copytree(Path(sandbox.__file__).parent, tmp_path / "sandbox") / "jail.py"
    call = "    prctl(PR_SET_SECCOMP"
    assert call in broken.read_text()
    broken.write_text(broken.read_text().replace(call, f"    raise OSError('no seccomp')\n{call}"))
    command = [sys.executable, "-c", WITHOUT_A_JAIL]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    error, verdict = run.stdout.splitlines()
    assert "no seccomp" in error and "--unsafe" in error and verdict == "True"


IN_A_CONTAINER = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from sandbox import run as sandbox
here, there = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    refused = ctypes.CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER
    os.write(here[1], b"x"), os.read(there[0], 1)
    right = refused or sandbox.run_tests("def f(): return 1", "assert f() == 1")
    print("refused" if refused else right, flush=True)
    sandbox._server.stop()
    os._exit(0)
os.read(here[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{name}", "w") as file:
        file.write("0 0 65536")
os.write(there[1], b"x"), os.wait()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_a_container_with_few_users_holds_programs_too():
    command = [sys.executable, "-c", IN_A_CONTAINER, str(Path(sandbox.__file__).parents[1])]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    if said == "refused\n":
        pytest.skip("this kernel makes no user namespaces")
    assert said == "True\n"
