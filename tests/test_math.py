"""verify_math's processes: they do no harm, and no verdict depends on what else runs.

Limits on the clock here are for a test that hangs; none is for one that is slow.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import ROOT
from sandbox import grader
from sandbox.cores import share_of_cores
from verifiers import verify_batch, verify_math

HANG = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def replies(monkeypatch):
    """What the workers said, each time that one was asked."""
    ask, said = grader._ask, []
    monkeypatch.setattr(grader, "_ask", lambda *given: said.append(ask(*given)) or said[-1])
    return said


def test_a_hung_verdict_is_ended_by_its_processor_time_and_not_tried_again(replies):
    assert verify_math(HANG, "5", timeout=0.5) is False
    assert replies == [b"t"]
    assert verify_math(r"\boxed{5}", "5") and replies[1:] == [b"1"]


def test_the_clock_ends_no_worker_that_computes_or_waits_for_a_core(replies, monkeypatch):
    monkeypatch.setattr(grader, "LOOK", 0.001)  # hundreds of looks, as on a machine that is slow
    assert verify_math(HANG, "5", timeout=0.5) is False
    assert replies == [b"t"]


def test_a_stopped_worker_is_replaced(replies):
    session = server()
    workers = processes(session).keys() - {session}
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    assert verify_math(r"\boxed{5}", "5") and replies[-2:] == [b"", b"1"]
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert soon(lambda: len(processes(session)) <= 1 + len(grader._idle))


def test_a_worker_that_is_killed_late_is_not_taken_for_one_whose_time_was_up(replies, monkeypatch):
    server()
    ask, killed = grader._ask, []

    def killed_late(worker, pid, request):
        if not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.4)  # longer than the limit
            os.kill(pid, signal.SIGKILL)
        return ask(worker, pid, request)

    monkeypatch.setattr(grader, "_ask", killed_late)
    assert verify_math(r"\boxed{5}", "5", timeout=0.3) is True
    assert replies[-2:] == [b"", b"1"]


def test_verdicts_in_parallel_keep_their_order_and_pass_a_hung_one():
    texts = [HANG] + [rf"\boxed{{{n}}}" for n in range(40)]
    problems = [{"answer": str(n // 2 * 2)} for n in range(-1, 40)]
    expected = [False] + [n % 2 == 0 for n in range(40)]
    for workers in (1, 2, 5):
        passed = threading.Event()

        def verify(text, problem, workers=workers, passed=passed):
            if text == HANG:  # hangs until another is done, and then until its limit
                assert workers == 1 or passed.wait(300)
                return verify_math(text, problem["answer"], timeout=0.1)
            verdict = verify_math(text, problem["answer"])
            passed.set()
            return verdict

        assert verify_batch(verify, texts, problems, workers) == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_a_fault_in_one_verdict_of_a_batch_is_raised(workers):
    def verify(text, problem):
        if text == "b":
            raise OSError("no process")
        return True

    with pytest.raises(OSError, match="no process"):
        verify_batch(verify, ["a", "b", "c"], [{}, {}, {}], workers)
    with pytest.raises(ValueError):
        verify_batch(verify, ["a", "a"], [{}], workers)


def processes(session: int, zombies: bool = False) -> dict[int, int]:
    """{pid: resident bytes} of the processes in a session."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(fields[3]) == session and (zombies or fields[0] != "Z"):
                found[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return found


def soon(condition, seconds: float = 120.0) -> bool:
    """Whether it comes true: on a busy machine the kernel ends a worker late."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def server() -> int:
    assert verify_math(r"\boxed{5}", "5")
    return grader._server[0].pid


def test_a_thousand_hung_verdicts_leave_nothing_behind():
    before, files = processes(os.getsid(0)), len(os.listdir("/proc/self/fd"))
    session = server()

    def verify(text, problem):
        return verify_math(text, "5", timeout=0.008)

    assert verify_batch(verify, [HANG] * 1000, [{}] * 1000, 4) == [False] * 1000
    assert server() == session
    assert soon(lambda: len(processes(session, zombies=True)) <= 1 + share_of_cores())
    assert len(os.listdir("/proc/self/fd")) <= files + 2 + share_of_cores()
    assert sum(processes(session).values()) < 150e6 * len(processes(session))
    assert processes(os.getsid(0))[os.getpid()] < before[os.getpid()] + 50e6


@pytest.mark.parametrize("whole_server", [False, True])
def test_killed_workers_are_replaced_and_no_verdict_is_lost(whole_server):
    session = server()
    grader._idle += [grader._start_worker() for _ in range(2)]
    for pid in [session] if whole_server else processes(session).keys() - {session}:
        os.kill(pid, signal.SIGKILL)
    if whole_server:  # until it is gone, which may take a busy machine, its workers go on
        os.waitid(os.P_PID, session, os.WEXITED | os.WNOWAIT)
    for n in range(4):
        assert verify_math(rf"\boxed{{{n}}}", str(n))
    assert (server() == session) is not whole_server


@pytest.fixture
def no_server():
    grader._stop()
    grader._reset()
    yield
    grader._reset()


def test_a_grader_that_can_not_start_raises(no_server, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start a worker"):
        verify_math(r"\boxed{5}", "5")
    monkeypatch.setattr(grader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs math-verify: pip install"):
        verify_math(r"\boxed{5}", "5")


def test_a_math_verify_that_can_not_grade_is_a_fault(no_server, monkeypatch, tmp_path):
    broken = "LatexExtractionConfig = dict\ndef parse(): ...\ndef verify(): ...\n"
    (tmp_path / "math_verify.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not start a worker"):
        verify_math(r"\boxed{5}", "5")


CRASHES = """
import os, resource, signal
class LatexExtractionConfig:
    def __init__(*given): ...
def parse(text, *given, **options):
    if "SIG" in text:
        os.kill(os.getpid(), getattr(signal, text[7:-1]))
    if "memory" in text:
        list(range(10**9))
    return [text]
def verify(*given, **options):
    return True
"""


@pytest.fixture
def grader_that_crashes(no_server, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(CRASHES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("crash", ["SIGSEGV", "SIGABRT", "SIGPROF", "memory"])
def test_an_answer_that_ends_its_worker_is_wrong_at_once(grader_that_crashes, replies, crash):
    assert grader.equivalent("5", crash) is False
    assert len(replies) == 1 and grader.equivalent("5", "5")


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_workers_that_others_end_or_stop_twice_are_a_fault(grader_that_crashes, replies, fault):
    with pytest.raises(RuntimeError, match="two grading workers were killed or stopped"):
        grader.equivalent("5", fault)
    assert replies == [b"", b""] and grader.equivalent("5", "5")


def test_a_worker_whose_asker_is_gone_says_nothing(no_server, capfd):
    caller, pid = grader._start_worker()
    caller.shutdown(socket.SHUT_RD)  # as after Ctrl-C in the midst of a verdict
    caller.sendall(json.dumps(["5", "5", 5.0]).encode() + b"\n")
    caller.shutdown(socket.SHUT_WR)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_a_forked_child_has_workers_of_its_own():
    session = server()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if server() != session and not verify_math(HANG, "5", timeout=0.1):
                status = 0
            grader._stop()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert server() == session


CALLER = """
import sys, threading, time
import verifiers
from sandbox import grader
verifiers.verify_math("\\\\boxed{5}", "5")
threading.Thread(target=verifiers.verify_math, args=(sys.argv[1], "5", 600), daemon=True).start()
while grader._idle:  # until the worker is asked
    time.sleep(0.01)
print(grader._server[0].pid, flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["stay", "exit"])
def test_nothing_outlives_its_caller(end):
    command = [sys.executable, "-c", CALLER, HANG, end]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        session = int(caller.stdout.readline())
        if end == "stay":
            assert len(processes(session)) >= 2
            caller.kill()
        caller.wait(timeout=120)
        assert end == "stay" or not Path(f"/proc/{session}").exists()
    assert soon(lambda: not processes(session))


def test_importing_the_verifiers_starts_nothing_and_imports_no_sympy():
    code = """
import sys, verifiers
from sandbox import grader
assert grader._server is None and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
