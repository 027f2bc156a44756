"""verify_math: what is the answer, what equals it, and that the grader's processes do no harm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verifiers
from helpers import ROOT
from sandbox import grader
from verifiers import extract_math, verify_batch, verify_math

HANG = r"\boxed{9^{9^{9^{9}}}}"


@pytest.mark.parametrize("response, answer", [
    (r"\boxed{1} and \boxed{42}", "42"),
    (r"\boxed{\frac{1}{2}} then \boxed{3", r"\frac{1}{2}"),  # the last that is balanced
    (r"\boxed{7}</think> \boxed{8}", "8"),
    (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),  # an escaped brace is a character
    (r"\boxed {5}", "5"), (r"\boxed{1 + \boxed{2}}", "2"),
    (r"\boxed{6} the final answer is 5", "6"),
    ("The final answer is 4. Final Answer is: 5. I hope it is correct.", "5"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("final answer is \\[3.5\\] and more", "3.5"),
    ("final answer is 3.5\nDone", "3.5"),
    ("**final answer is** **1,234**.", "1,234"),
    (r"\boxed{5}</think> so 5", None),
    (r"final answer is \boxed{42", None),
    ("final answer is 42}", None),
    ("42", None),
])  # fmt: skip
def test_the_last_balanced_box_else_the_final_answer_is_graded(response, answer):
    assert extract_math(response) == answer


@pytest.mark.parametrize("gold, answer", [
    ("1,234", "1234"), ("1234", r"1{,}234"), ("1234", r"\$1,234.00"), ("72", "72.0"),
    ("18", "18."), ("-5", "- 5"), ("0.5", r"\frac12"), ("1/2", ".5"), (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"), ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{1}{3}x", "x/3"), ("5", "x=5"), (r"\{1,2\}", "2, 1"), (r"1.5 \cdot 10^3", "1500"),
    (r"[\frac12,1)", "[0.5,1)"), (r"\text{Evelyn}", "Evelyn"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, 0.5\pi)"),
    (r"\begin{pmatrix}1/2\\1\end{pmatrix}", r"\begin{pmatrix}0.5\\1\end{pmatrix}"),
    ("10^{20}", "1" + "0" * 20),
])  # fmt: skip
def test_other_ways_to_write_the_answer_are_right(gold, answer):
    assert verify_math(rf"\boxed{{{answer}}}", gold) is True


@pytest.mark.parametrize("gold, answer", [
    ("1/3", "0.3333"), (r"\frac{1}{3}", "0." + "3" * 40), (r"\pi", "3.14159"),
    (r"\pi", "3.14159265358979323846"), (r"\pi", r"\frac{314159265358979323846}{10^{20}}"),
    (r"\sqrt{2}", "1.41421356237"), ("0.1234567", "0.1234568"),
    ("12345678901234567890123", "12345678901234567890124"), ("10^{20}", "10^{20}+1"),
    ("10^{-20}", "10^{-21}"), ("10^{-200}", "10^{-201}"), ("1", "0." + "9" * 30),
    ("0", "10^{-30}"), ("1" + "0" * 20 + ".5", "1" + "0" * 20),
    (r"\frac{\sqrt{2}}{10^{30}}", r"\frac{\sqrt{3}}{10^{30}}"), ("x/3", "0.3333333x"),
    ("(1/3,1)", "(0.3333333,1)"), (r"\{1/3,1\}", r"\{0.3333333,1\}"), ("x=1/3", "x=0.3333333"),
    ("x>1/3", "x>0.3333333"),
    (r"\begin{pmatrix}1/3\\1\end{pmatrix}", r"\begin{pmatrix}0.3333333\\1\end{pmatrix}"),
    ("10^{20}x", "(10^{20}+1)x"), ("5", "5, 6"), ("5", ""), ("5", " "), ("x", "y"),
    (r"\text{(A)}", r"\text{(B)}"),
])  # fmt: skip
def test_values_that_only_round_alike_are_different(gold, answer):
    assert verify_math(rf"\boxed{{{answer}}}", gold) is False


@pytest.mark.parametrize("response", [
    r"\boxed{" * 100_000, "}" * 1_000_000, "\\" * 1_000_000,
    r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}", "final answer is " * 50_000,
    r"\boxed{" + "9" * 900 + "!}", r"\boxed{" + "9" * 2000 + "}", r"\boxed{\ud800}",
    "\\boxed{\ud800}", "\\boxed{4\x002}", "\\boxed{٤٢}",
    r"\boxed{" + r"\sqrt{" * 140 + "42" + "}" * 141, r"\boxed{[0]*10**10}",
    r"\boxed{__import__('os').abort()}", r"\boxed{\boxed}", "\\boxed{$4\n2$}", r"\boxed{#1}",
])  # fmt: skip
def test_odd_responses_are_wrong_and_do_no_harm(response):
    start = time.monotonic()
    assert verify_math(response, "42", timeout=0.5) is False
    assert time.monotonic() - start < 10


LATEX = st.sampled_from([
    "\\boxed{", "\\frac", "\\sqrt", "\\text{", "\\left(", "\\right)", "\\%", "\\\\", "12", "\ud800",
    "\\begin{pmatrix}", "\\end{pmatrix}", "final answer is ", "</think>", *"{}^_$=,&x.!",
])  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(LATEX | st.text(max_size=3), max_size=12).map("".join), st.booleans())
def test_no_text_makes_verify_math_raise(text, boxed):
    response = rf"\boxed{{{text}}}" if boxed else text
    assert verify_math(response, r"\frac{1}{2}", timeout=0.1) in (True, False)


def test_the_gold_answer_stands_first():
    """An equation asked for is not answered by its right side, but may answer it."""
    assert not verify_math(r"\boxed{10}", "2x=10")
    assert verify_math(r"\boxed{2x=10}", "10")


def test_a_hung_verdict_is_false_in_time_and_not_tried_again(monkeypatch):
    asked, ask = [], grader._ask
    monkeypatch.setattr(grader, "_ask", lambda *given: asked.append(given) or ask(*given))
    start = time.monotonic()
    assert verify_math(HANG, "5", timeout=1.0) is False
    assert time.monotonic() - start < 3.5 and len(asked) == 1
    assert verify_math(r"\boxed{5}", "5")


def test_a_stopped_worker_keeps_nobody_waiting():
    session = server()
    workers = processes(session).keys() - {session}
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    assert verify_math(r"\boxed{5}", "5", timeout=0.1) is False
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert verify_math(r"\boxed{5}", "5")


def test_verdicts_in_parallel_keep_their_order_and_pass_a_hung_one():
    texts = [HANG] + [rf"\boxed{{{n}}}" for n in range(40)]
    problems = [{"answer": str(n // 2 * 2)} for n in range(-1, 40)]
    done = []

    def verify(text, problem):
        verdict = verify_math(text, problem["answer"], timeout=0.5)
        done.append(text)
        return verdict

    expected = [False] + [n % 2 == 0 for n in range(40)]
    for workers in (1, 2, 5):
        done.clear()
        assert verify_batch(verify, texts, problems, workers) == expected
        assert (done[0] == HANG) == (workers == 1)


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


def soon(condition, seconds: float = 5.0) -> bool:
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
    assert soon(lambda: len(processes(session, zombies=True)) <= 1 + grader.WORKERS)
    assert len(os.listdir("/proc/self/fd")) <= files + 2 + grader.WORKERS
    assert sum(processes(session).values()) < 150e6 * len(processes(session))
    assert processes(os.getsid(0))[os.getpid()] < before[os.getpid()] + 50e6


@pytest.mark.parametrize("whole_server", [False, True])
def test_killed_workers_are_replaced_and_no_verdict_is_lost(whole_server):
    session = server()
    grader._idle += [grader._start_worker() for _ in range(2)]
    for pid in [session] if whole_server else processes(session).keys() - {session}:
        os.kill(pid, signal.SIGKILL)
    for n in range(4):
        assert verify_math(rf"\boxed{{{n}}}", str(n))
    assert (server() == session) is not whole_server


def test_an_answer_that_kills_its_worker_twice_is_wrong(monkeypatch):
    asked = []
    monkeypatch.setattr(grader, "_ask", lambda worker, *given: asked.append(worker) or b"")
    assert verify_math(r"\boxed{5}", "5") is False
    assert len(set(map(id, asked))) == 2


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
threading.Thread(target=verifiers.verify_math, args=(sys.argv[1], "5", 60), daemon=True).start()
time.sleep(0.5)
print(grader._server[0].pid, flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["stay", "exit"])
def test_nothing_outlives_its_caller(end):
    command = [sys.executable, "-c", CALLER, HANG, end]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        session = int(caller.stdout.readline())
        if end == "stay":
            assert len(processes(session)) >= 2
            caller.kill()
        caller.wait(timeout=20)
        assert end == "stay" or not Path(f"/proc/{session}").exists()
    assert soon(lambda: not processes(session))


def test_importing_the_verifiers_starts_nothing_and_imports_no_sympy():
    code = """
import sys, verifiers
from sandbox import grader
assert grader._server is None and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_limit_on_length_is_that_of_the_other_verifiers():
    assert verify_math(r"\boxed{" + "0" * (verifiers.MAX_ANSWER_CHARS - 1) + "5}", "5")
    assert not verify_math(r"\boxed{" + "0" * verifiers.MAX_ANSWER_CHARS + "5}", "5")
