"""Runs tests of an untrusted program, which neither sees what is expected nor says that it passed.

Whatever shares an interpreter with a program can be forged by it. So every verdict has two
processes, both forked from a server (server.py), which is started once with `python -I -S` and an
empty environment; nothing is forked from the caller, which may hold a model and threads. worker.py
and guest.py say what the two do, jail.py what holds the one with the program.
"""

import atexit
import importlib.util
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from sandbox.cores import share_of_cores
from sandbox.judge import require_judge
from sandbox.wire import receive, send

SLEEP = 9.5  # seconds beyond its timeout that a program may sleep: it ends within 10
PATIENCE = 30.0  # seconds for a worker to start: a machine that takes longer gives no verdict
STARVED = 20  # times what a verdict may take: a machine that is slower gives none either
LONGEST_PROGRAM = 1 << 20  # characters of a program


class SandboxError(RuntimeError):
    """The sandbox itself failed: no verdict."""


# What flags say, for all verdicts of this process; `numpy` is heard when the server starts.
timeout = 5.0  # seconds of processor time of a verdict
numpy = False  # True: programs may import numpy
unsafe = False  # True: run even where the kernel can't hold the program


def run_tests(
    program: str, tests: str, entry_point: str | None = None, seconds: float | None = None
) -> bool:
    """True if the test code runs to its end within `seconds` (default: `timeout`).

    They are seconds of processor time, of program and tests together; the clock ends only what
    sleeps, 10 seconds later. So no verdict depends on how busy the machine is. Any number of
    threads may call it: no more run at once than this rank has cores. ValueError if the test code
    can't judge, SandboxError if there can be no verdict.
    """
    seconds = timeout if seconds is None else seconds
    if not 0 < seconds < math.inf:
        raise ValueError(f"a timeout of {seconds} seconds: it must be above 0")
    require_judge(tests, entry_point, numpy)
    if len(program) > LONGEST_PROGRAM:
        return False
    with _slots:
        return _verdict(program, tests, entry_point, seconds)


def _verdict(program: str, tests: str, entry_point: str | None, seconds: float) -> bool:
    request = {"program": program.removeprefix("\ufeff"), "tests": tests, "unsafe": unsafe}
    request |= {"entry_point": entry_point, "timeout": seconds, "sleep": seconds + SLEEP}
    for _ in range(3):
        verdict = _try(request)
        if verdict is not None:
            return verdict
    raise SandboxError("workers die before they have a verdict")


def _try(request: dict) -> bool | None:
    """None: somebody killed the worker or its guest, or the machine is too busy for either."""
    try:
        connection = _server.worker()
    except OSError as error:
        raise SandboxError(f"no worker can be started: {error}") from error
    started = False
    with connection:
        try:
            connection.settimeout(PATIENCE)
            send(connection, request)
            fault = receive(connection)
            started = True
            connection.settimeout(STARVED * request["sleep"])
            if not fault:
                return receive(connection)
        except (OSError, EOFError, ValueError) as error:
            if not started and isinstance(error, TimeoutError):
                _server.stop()
            return None
    raise SandboxError(f"{fault}: code can't be tried safely here, and runs only with --unsafe")


class _Server:
    """The fork server's handle: it is started when first needed, and again if it has died."""

    def __init__(self):
        self.lock, self.process, self.control = threading.RLock(), None, None
        self.in_test = False

    def worker(self) -> socket.socket:
        """A connection to a new worker."""
        with self.lock:
            for _ in range(2):
                if self.process is not None and self.numpy is not numpy:
                    self.stop()  # the flag has changed
                if self.process is None or self.process.poll() is not None:
                    if self.in_test:
                        raise SandboxError("the sandbox does not start here in time")
                    self._start()
                    if not unsafe:
                        self._test()
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
        self.numpy, site = numpy, _home_of_numpy() if numpy else ""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE)
        script = Path(__file__).with_name("server.py").resolve()
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with theirs:
            command = [sys.executable, "-I", "-S", str(script), str(theirs.fileno()), site]
            ours_alone = {"env": {}, "cwd": "/", "start_new_session": True}
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], **ours_alone, **nothing
            )

    def _test(self) -> None:
        self.in_test = True
        try:
            _self_test()
        except BaseException:  # else it would be used untested
            self.stop()
            raise
        finally:
            self.in_test = False

    def stop(self) -> None:
        with self.lock:
            if self.process is not None:
                self.control.close()
                self.process.kill()
                self.process.wait()
            self.process = None


def _home_of_numpy() -> str:
    found = importlib.util.find_spec("numpy")
    if found is None:
        raise SandboxError("programs may import numpy, which is not there: pip install numpy")
    return str(Path(found.origin).parents[1])


def _reset() -> None:
    """A forked child has a server of its own, and no lock that a thread held."""
    global _server, _slots
    _server, _slots = _Server(), threading.BoundedSemaphore(share_of_cores())


_reset()
os.register_at_fork(after_in_child=_reset)
atexit.register(lambda: _server.stop())

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
    try:
        import numpy
    except ImportError:
        pass
    else:
        tries["numpy reads"] = lambda: numpy.fromfile("/etc/passwd", "u1")
        tries["numpy maps"] = lambda: numpy.memmap("/etc/passwd", "u1", "r")
        tries["numpy writes"] = lambda: numpy.ones(3).tofile("/tmp/sandbox")
        tries["numpy saves"] = lambda: numpy.save("/tmp/sandbox", numpy.ones(3))
    escaped = []
    for name, attempt in tries.items():
        try:
            attempt()
            escaped.append(name)
        except Exception:
            pass
    return escaped
"""


WITH_NUMPY = "import numpy\ndef solve(): return numpy.linalg.inv(numpy.eye(50) * 2)"
INVERSE = "import numpy\nassert (solve() == numpy.eye(50) / 2).all()"


def _self_test() -> None:
    """SandboxError if anything succeeds that must fail, or the other way round."""
    checks = {
        "something escapes": (ESCAPES, "assert probe() == []", True),
        "wrong answers pass": (ESCAPES, "assert probe() == 1", False),
    }
    if numpy:
        checks["numpy does not work in it"] = (WITH_NUMPY, INVERSE, True)
    for fault, (program, tests, expected) in checks.items():
        if _verdict(program, tests, None, 20.0) is not expected:
            raise SandboxError(f"the sandbox does not hold here: {fault}")
