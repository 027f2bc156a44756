"""The server behind run.py: forks a worker for every connection that it is handed.

It has the standard library loaded, so that a verdict costs two forks and no interpreter's start.
Stdlib only: it runs as a script, with `python -I -S`.
"""

import gc
import importlib
import os
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
from sandbox import jail  # noqa: E402
from sandbox.worker import work  # noqa: E402

package.__path__ = []  # programs and tests find no more of it

PRELOADED = (
    "__future__ _strptime abc argparse array ast base64 binascii bisect bz2 calendar cmath codecs "
    "collections concurrent.futures.thread contextlib copy csv dataclasses datetime decimal "
    "difflib doctest enum fnmatch fractions functools glob graphlib gzip hashlib heapq hmac html "
    "inspect io ipaddress itertools json keyword locale logging lzma math numbers operator os "
    "pathlib pickle platform pprint queue random re reprlib sched secrets shlex statistics string "
    "struct subprocess sys textwrap threading time timeit tokenize traceback types typing "
    "unicodedata unittest urllib.parse uuid warnings weakref zlib"
)
ENCODINGS = (
    "ascii base64_codec cp1252 cp437 hex_codec idna latin_1 punycode raw_unicode_escape rot_13 "
    "unicode_escape utf_16 utf_16_be utf_16_le utf_32 utf_32_be utf_32_le utf_8_sig"
)


def _serve(control: socket.socket) -> None:
    """Until the caller is gone."""
    for name in [*PRELOADED.split(), *(f"encodings.{name}" for name in ENCODINGS.split())]:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to be waited for
    jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
    server = os.getpid()
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with suppress(OSError):  # no fork: the caller sees its connection end
            if os.fork() == 0:
                try:
                    control.close()
                    jail.die_with_parent(server)
                    work(socket.socket(fileno=descriptors[0]))
                finally:
                    os._exit(0)
        os.close(descriptors[0])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
