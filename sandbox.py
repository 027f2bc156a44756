"""Runs tests of an untrusted Python program, which can neither see what is expected of it nor say that it passed.

Whatever shares an interpreter with a program can be forged by it. So every verdict has two processes, both forked from
a server, trial.py, which is started once with `python -I -S` and an empty environment; nothing is forked from the
caller, which may hold a model and threads. trial.py says what the two do, jail.py what holds the one with the program.
"""

import ast
import atexit
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from trial import receive, send

GRACE = 3.0  # seconds beyond the timeout that a caller waits for the worker's own word


class SandboxError(RuntimeError):
    """The sandbox itself failed: no verdict."""


unsafe = False  # True: run even where the kernel can't hold the program


def run_tests(program: str, tests: str, entry_point: str | None = None, timeout: float = 5.0) -> bool:
    """True if the test code runs to its end within `timeout` seconds on the clock; any number of threads may call it.

    With an entry_point, the test code defines `check(candidate)`, which is called with that function. ValueError if the
    test code does not compile, SandboxError if there can be no verdict.
    """
    try:
        ast.parse(tests)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests do not compile: {error}") from None
    request = {"program": program, "tests": tests, "entry_point": entry_point, "timeout": timeout, "unsafe": unsafe}
    for _ in range(2):
        with _server.worker() as connection:
            connection.settimeout(timeout + GRACE)
            try:
                send(connection, request)
                verdict, fault = receive(connection)
            except TimeoutError:
                return False  # the worker hangs in the tests' own C code; its processor limit ends it
            except (OSError, EOFError, ValueError):
                continue  # somebody killed it: once more
        if fault:
            raise SandboxError(f"{fault}: code can't be tried safely here, and runs only with --unsafe")
        return verdict
    raise SandboxError("workers die before they have a verdict")


class _Server:
    """The caller's side of the fork server, started when it is first needed and again if it has died."""

    def __init__(self):
        self.lock, self.process, self.control, self.owner = threading.RLock(), None, None, None

    def worker(self) -> socket.socket:
        """A connection to a new worker."""
        with self.lock:
            for _ in range(2):
                if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                    self._start()
                    if not unsafe:
                        _self_test()
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        socket.send_fds(self.control, [b"w"], [theirs.fileno()])
                    return ours
                except OSError:
                    ours.close()
                    self.stop()
            raise SandboxError("the fork server does not start")

    def _start(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [
            sys.executable,
            "-I",
            "-S",
            str(Path(__file__).with_name("trial.py").resolve()),
            str(theirs.fileno()),
        ]
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with theirs:
            self.process = subprocess.Popen(
                command, env={}, cwd="/", pass_fds=[theirs.fileno()], start_new_session=True, **nothing
            )
        self.owner = os.getpid()

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.control.close()
            self.process.kill()
            self.process.wait()
        self.process = None


_server = _Server()
atexit.register(_server.stop)

ESCAPES = """
def probe():
    import os, socket, ctypes, signal
    libc = ctypes.CDLL(None)
    tries = {
        "open": lambda: os.open("/proc/self/mem", os.O_RDONLY),
        "write": lambda: os.open("/tmp/escaped", os.O_WRONLY | os.O_CREAT),
        "list": lambda: os.listdir("/"),
        "socket": lambda: socket.socket(),
        "fork": lambda: os.fork() or os._exit(0),
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "kill": lambda: os.kill(os.getppid(), 0),
        "session": lambda: os.setsid(),
        "ptrace": lambda: libc.ptrace(0, 0, 0, 0) and 1 / 0,
        "unshare": lambda: libc.unshare(0x10000000) and 1 / 0,
        "prctl": lambda: libc.prctl(1, 0, 0, 0, 0) and 1 / 0,
        "environment": lambda: dict(os.environ)["PATH"],
        "memory": lambda: bytearray(1 << 31),
        "root": lambda: os.getuid() and 1 / 0,
        "descriptors": lambda: os.fstat(4),
    }
    escaped = []
    for name, attempt in tries.items():
        try:
            attempt()
            escaped.append(name)
        except Exception:
            pass
    return escaped
"""


def _self_test() -> None:
    """SandboxError if anything succeeds that must fail, or the other way round."""
    checks = {"something escapes": ("assert probe() == []", True), "wrong answers pass": ("assert probe() == 1", False)}
    try:
        for fault, (tests, expected) in checks.items():
            if run_tests(ESCAPES, tests, timeout=20.0) is not expected:
                raise SandboxError(f"the sandbox does not hold here: {fault}")
    except SandboxError:
        _server.stop()
        raise
