"""Runs tests of an untrusted program, which neither sees what is expected nor says that it passed.

Whatever shares an interpreter with a program can be forged by it. So every verdict has two
processes, both forked from a server (server.py), which is started once with `python -I -S` and an
empty environment; nothing is forked from the caller, which may hold a model and threads. worker.py
and guest.py say what the two do, jail.py what holds the one with the program.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from sandbox.wire import receive, send

GRACE = 3.0  # seconds beyond the timeout that a caller waits for the worker's own word
PATIENCE = 30.0  # seconds for a worker to start: a machine that takes longer gives no verdict
LONGEST = 1 << 20  # characters of a program


class SandboxError(RuntimeError):
    """The sandbox itself failed: no verdict."""


unsafe = False  # True: run even where the kernel can't hold the program


def run_tests(
    program: str, tests: str, entry_point: str | None = None, timeout: float = 5.0
) -> bool:
    """True if the test code runs to its end within `timeout` seconds on the clock.

    With an entry_point, the test code defines `check(candidate)`, which is called with that
    function. ValueError if the test code does not compile, SandboxError if there can be no verdict.
    Any number of threads may call it.
    """
    try:
        compile(tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests do not compile: {error}") from None
    if len(program) > LONGEST:
        return False
    request = {"program": program, "tests": tests, "entry_point": entry_point}
    request |= {"timeout": timeout, "unsafe": unsafe}
    for _ in range(3):
        verdict = _try(request, timeout)
        if verdict is not None:
            return verdict
    raise SandboxError("workers die before they have a verdict")


def _try(request: dict, timeout: float) -> bool | None:
    """None: somebody killed the worker or its guest."""
    try:
        connection = _server.worker()
    except OSError as error:
        raise SandboxError(f"no worker can be started: {error}") from error
    started = None
    with connection:
        try:
            connection.settimeout(PATIENCE)
            send(connection, request)
            fault = receive(connection)
            started = time.monotonic()
            connection.settimeout(timeout + GRACE)
            if not fault:
                return receive(connection)
        except (OSError, EOFError, ValueError) as error:
            if started is None and isinstance(error, TimeoutError):
                _server.stop()
            late = started is not None and time.monotonic() - started >= timeout
            # it hangs in the tests' own C code; its processor limit ends it
            return False if late else None
    raise SandboxError(f"{fault}: code can't be tried safely here, and runs only with --unsafe")


class _Server:
    """The fork server's handle: it is started when first needed, and again if it has died."""

    def __init__(self):
        self.lock, self.process, self.control = threading.RLock(), None, None

    def worker(self) -> socket.socket:
        """A connection to a new worker."""
        with self.lock:
            for _ in range(2):
                if self.process is None or self.process.poll() is not None:
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
        self.control.settimeout(PATIENCE)
        script = Path(__file__).with_name("server.py").resolve()
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with theirs:
            command = [sys.executable, "-I", "-S", str(script), str(theirs.fileno())]
            ours_alone = {"env": {}, "cwd": "/", "start_new_session": True}
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], **ours_alone, **nothing
            )

    def stop(self) -> None:
        with self.lock:
            if self.process is not None:
                self.control.close()
                self.process.kill()
                self.process.wait()
            self.process = None


_server = _Server()
# a child has a server of its own, and no lock that a thread held
os.register_at_fork(after_in_child=_server.__init__)
atexit.register(_server.stop)

ESCAPES = """
def probe():
    import os, socket, ctypes, signal
    libc = ctypes.CDLL(None)
    def is_open(descriptor):
        try:
            return os.write(descriptor, b"") == 0
        except OSError:
            return False
    tries = {
        "open": lambda: os.open("/dev/null", os.O_RDONLY),
        "write": lambda: os.open("/dev/null", os.O_WRONLY),
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
        "descriptors": lambda: any(map(is_open, range(4, 64))) or 1 / 0,
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
    checks = {
        "something escapes": ("assert probe() == []", True),
        "wrong answers pass": ("assert probe() == 1", False),
    }
    try:
        for fault, (tests, expected) in checks.items():
            if run_tests(ESCAPES, tests, timeout=20.0) is not expected:
                raise SandboxError(f"the sandbox does not hold here: {fault}")
    except BaseException:  # else it would be used untested
        _server.stop()
        raise
