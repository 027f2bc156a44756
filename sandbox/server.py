"""The server behind run.py: forks a worker for every connection that it is handed.

So a verdict costs two forks and no interpreter's start. What programs use most is loaded; the rest
of the standard library lies on a shelf (shelf.py). Stdlib only: it runs as a script, with
`python -I -S`.
"""

import gc
import importlib
import os
import select
import signal
import socket
import sys
import types
from contextlib import suppress

# -I leaves this folder off the path, and there it stays, with the root: a name of ours must hide no
# standard module, neither here nor in a program. So the package is made by hand, of what is needed.
package = types.ModuleType("sandbox")
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
sys.modules["sandbox"] = package
from sandbox import jail, shelf  # noqa: E402
from sandbox.wire import send  # noqa: E402
from sandbox.worker import work  # noqa: E402

package.__path__ = []  # programs and tests find no more of it

PRELOADED = (
    "__future__ _strptime abc array ast base64 bisect calendar cmath collections contextlib copy "
    "csv dataclasses datetime decimal enum fractions functools hashlib heapq inspect io itertools "
    "json logging math numbers operator os pathlib queue random re secrets statistics string "
    "struct sys textwrap threading time timeit traceback types typing unicodedata uuid warnings "
    "zlib"
)
NUMPY = "numpy numpy.linalg numpy.fft numpy.random numpy.ma numpy.polynomial numpy.testing "
NUMPY += "numpy.typing numpy.lib.stride_tricks"


def _load(site: str) -> None:
    """site: where numpy is, or "" where programs may not have it."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    if site:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads would not survive a fork
        sys.path.append(site)
        for name in NUMPY.split():
            importlib.import_module(name)
        sys.path.remove(site)
        os.environ.clear()
    shelf.fill()


def _serve(control: socket.socket) -> None:
    """Until the caller is gone."""
    gc.freeze()
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
    callers = {}  # {worker: its caller's connection}
    while True:
        if woken in select.select([control, woken], [], [])[0]:
            with suppress(BlockingIOError):
                woken.recv(1 << 12)
            _bury(callers)
            continue
        message, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        caller = socket.socket(fileno=descriptors[0])
        try:
            callers[_fork(caller, [control, woken, wake, *callers.values()])] = caller
        except OSError:
            caller.close()  # it sees its connection end


def _fork(caller: socket.socket, ours: list[socket.socket]) -> int:
    """A worker for the caller, without what is the server's: its process id."""
    server, worker = os.getpid(), os.fork()
    if worker:
        return worker
    try:
        signal.set_wakeup_fd(-1)
        for mine in ours:
            mine.close()
        jail.die_with_parent(server)
        work(caller)
    finally:
        os._exit(0)


def _bury(callers: dict[int, socket.socket]) -> None:
    """Whoever has died; of a worker that the kernel ended, at a limit or for a fault, the verdict.

    One that somebody else ended has none.
    """
    with suppress(ChildProcessError):
        while (death := os.waitpid(-1, os.WNOHANG))[0]:
            caller = callers.pop(death[0], None)
            if caller is None:
                continue  # the guest of a worker that died before it
            with caller, suppress(OSError):
                if os.WIFSIGNALED(death[1]) and os.WTERMSIG(death[1]) not in jail.BY_OTHERS:
                    send(caller, False)


if __name__ == "__main__":
    _load(sys.argv[2])
    _serve(socket.socket(fileno=int(sys.argv[1])))
