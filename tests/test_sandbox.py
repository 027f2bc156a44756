"""Hostile programs. Each must be a plain False, in time, and leave nothing behind; an honest one must still be True."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import jail
import sandbox
from verifiers import extract_code, verify_code

TEST = ["assert f(3) == 4"]
HONEST = "def f(x):\n    return x + 1"


def test_an_honest_program_passes_and_a_wrong_one_does_not():
    assert verify_code(HONEST, TEST)
    assert not verify_code("def f(x):\n    return x", TEST)
    assert not verify_code("def f(x):\n    pass", TEST)


FORGED = {
    "an answer equal to everything": "class A:\n __eq__ = lambda s, o: True\n __bool__ = __eq__\ndef f(x): return A()",
    "a number equal to everything": "class A(int):\n def __eq__(s, o): return True\ndef f(x): return A(0)",
    "a text equal to everything": "class A(str):\n def __eq__(s, o): return True\ndef f(x): return A('')",
    "leaving with success": "import os\ndef f(x): os._exit(0)",
    "leaving while it is read": "import sys\nsys.exit(0)",
    "a marker on stdout": "import os\ndef f(x):\n os.write(1, b'passed'); print('True')",
    "asserts patched": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\ndef f(x): return 0",
    "builtins patched": "import builtins\nbuiltins.abs = builtins.len = lambda *a: 0\ndef f(x): return 0",
    "frames": "import sys\ndef f(x):\n g = sys._getframe()\n while g: g.f_locals.clear(); g = g.f_back\n return 0",
    "a callback of the protocol": "import __main__\n__main__._passes = lambda *a: True\ndef f(x): return 0",
    "frames on the wire": "import os\ndef f(x):\n os.write(3, b'\\x0d\\0\\0\\0[true,null]   '); return 0",
    "a verdict on the wire": "import os\ndef f(x):\n for d in range(64):\n  try: os.write(d, b'\\5\\0\\0\\0[1,0]')\n"
    "  except OSError: pass\n return 0",
    "the end of all iteration": "def f(x): raise StopIteration",
    "the memory of the process": "import gc\ndef f(x):\n for o in gc.get_objects():\n"
    "  if isinstance(o, dict) and 'tests' in o: return 4\n return 0",
}


@pytest.mark.parametrize("name", FORGED)
def test_no_program_can_forge_a_verdict(name):
    assert not verify_code(FORGED[name], TEST, timeout=2)
    assert not verify_code(FORGED[name], ["assert all(map(lambda g: f(3) == 4, [1]))"], timeout=2)


HUNGRY = {
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
    "a slow end": "import atexit, time\natexit.register(time.sleep, 99)\nclass A:\n def __del__(s): time.sleep(99)\n"
    "a = A()\ndef f(x): return 0",
    "threads": "import threading, time\ndef f(x):\n for _ in range(1000): threading.Thread(target=time.sleep, "
    "args=(9,)).start()\n return 4",
    "stdin": "def f(x): return int(input() or 4) and input() and 4",
}


@pytest.mark.parametrize("name", HUNGRY)
def test_no_program_takes_more_than_its_share(name):
    started = time.monotonic()
    assert not verify_code(HUNGRY[name], TEST, timeout=1)
    assert time.monotonic() - started < 6


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
    program = f"def f(x):\n try:\n  {attempt}\n except Exception:\n  return 'held'\n return 'escaped'"
    assert verify_code(program, ["assert f(3) == 'held'"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "def f(x):", "(" * 10**5, "x = " + "9" * 10**6, "é" * 10**6])
def test_no_text_raises(text):
    assert not verify_code(text, TEST, timeout=2)


def test_plain_values_come_back_as_they_are():
    values = "[None, True, 3, -2.5, 10**50, 1j, 'é\\ud800', b'b', [1, (2,)], {3, 4}, frozenset({5}), {(1,): [2]}]"
    assert verify_code(f"def f(): return {values}", [f"assert f() == {values}"])
    assert verify_code("def f(x): return x", [f"for v in {values}:\n    assert f(v) == v and type(f(v)) is type(v)"])
    assert verify_code("def f(): return float('nan')", ["x = f()\nassert x != x"])
    assert not verify_code("def f(): return 1", ["assert f() is True"])


def test_what_tests_do_with_programs_works():
    assert verify_code("def f(x): x.sort()", ["a = [2, 1]\nf(a)\nassert a == [1, 2]"])
    assert verify_code("def f(n):\n yield from range(n)", ["assert list(f(3)) == [0, 1, 2]"])
    assert verify_code("def f(x): raise KeyError(x)", ["try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"])
    node = (
        "class Node:\n def __init__(s, v): s.v, s.next = v, None\ndef f(n): return n.v + (f(n.next) if n.next else 0)"
    )
    assert verify_code(node, ["root = Node(1)\nroot.next = Node(2)", "assert f(root) == 3 and root.next.v == 2"])
    assert verify_code("def f(x, t): return isinstance(x, t)", ["assert f(3, int) and not f(3, str)"])
    assert verify_code("def sum(a, b): return a - b", ["assert sum(3, 1) == 2"])  # named as a builtin, and asked for


def test_a_program_cannot_redefine_what_its_tests_are_written_with():
    assert not verify_code("def f(x): return 9\ndef abs(x): return 0", ["assert abs(f(3) - 4) < 1e-6"])
    check = "def check(candidate):\n    assert abs(candidate(3) - 4) < 1e-6"
    assert not verify_code("def f(x): return 9\ndef abs(x): return 0\ndef check(c): pass", check, "f")
    assert verify_code(HONEST, check, "f") and not verify_code(HONEST, check, "g")


def test_tests_that_loop_are_false_and_tests_that_do_not_compile_are_an_error():
    assert not verify_code(HONEST, ["while True: pass"], timeout=0.5)
    with pytest.raises(ValueError, match="do not compile"):
        verify_code(HONEST, ["assert f(3 ="])


def test_a_server_or_worker_that_is_killed_is_replaced():
    assert verify_code(HONEST, TEST)
    server = sandbox._server.process.pid
    os.kill(server, signal.SIGKILL)
    assert verify_code(HONEST, TEST) and sandbox._server.process.pid != server
    killer = threading.Timer(
        0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in children(sandbox._server.process.pid)]
    )
    killer.start()
    assert verify_code("import time\ntime.sleep(1)\n" + HONEST, TEST)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_thousand_endless_loops_leave_nothing_behind():
    verify_code(HONEST, TEST)
    server, before = sandbox._server.process.pid, len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda _: verify_code("while True: pass", TEST, timeout=0.02), range(1000)))
    assert not any(verdicts) and len(os.listdir("/proc/self/fd")) == before
    deadline = time.monotonic() + 5
    while children(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children(server) == []
    assert len(os.listdir(f"/proc/{server}/fd")) <= 5
    assert verify_code(HONEST, TEST)


def test_threads_get_their_own_verdicts():
    with ThreadPoolExecutor(8) as threads:
        right = threads.map(lambda i: verify_code(f"def f(): return {i % 3}", ["assert f() == 1"]), range(60))
        assert list(right) == [i % 3 == 1 for i in range(60)]


def test_without_a_jail_there_is_no_verdict_unless_that_is_asked_for(monkeypatch, tmp_path):
    for name in ("sandbox.py", "trial.py", "jail.py"):
        (tmp_path / name).write_text(Path(jail.__file__).with_name(name).read_text())
    broken = tmp_path / "jail.py"
    call = "    prctl(PR_SET_SECCOMP"
    broken.write_text(broken.read_text().replace(call, f"    raise OSError('no seccomp')\n{call}"))
    script = (
        "import sandbox\n"
        "try:\n    sandbox.run_tests('def f(): return 1', 'assert f() == 1')\n"
        "except sandbox.SandboxError as e:\n    print(e)\n"
        "sandbox.unsafe = True\n"
        "print(sandbox.run_tests('def f(): return 1', 'assert f() == 1'))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    error, verdict = run.stdout.splitlines()
    assert "no seccomp" in error and "--unsafe" in error and verdict == "True"


@pytest.mark.parametrize(
    "response, program",
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2"),
        ("```python\nx = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2", "x = 2"),
        ("[BEGIN]\nx = 1\n[DONE]\n[BEGIN]\nx = 2\n[DONE] bye", "x = 2"),
        ("[BEGIN] x = 1", " x = 1"),
        ("<think>```python\nx = 1\n```</think>x = 2", "x = 2"),
        ("x = 1\n", "x = 1"),
        ("", ""),
    ],
)
def test_the_program_in_a_response(response, program):
    assert extract_code(response) == program


def test_long_responses_are_searched_in_no_time():
    started = time.monotonic()
    for text in ("`" * 10**6, "```\n" * 10**5, "``` " * 10**5, "[BEGIN]" * 10**5, " " * 10**6 + "```"):
        extract_code(text)
    assert time.monotonic() - started < 2
