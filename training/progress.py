"""What a long phase says on stderr: a bar in a terminal; in a log file a line now and then.

A bar redraws itself with carriage returns, of which a log file would keep every one, in one line
without end.
"""

import sys
import threading
from contextlib import contextmanager, suppress

from tqdm import tqdm

from training.distributed import rank

EVERY = 10.0  # seconds between lines, where stderr is no terminal; later on a 30th of the time gone
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm to draw on: each drawing that differs from the last becomes a line."""

    def __init__(self, file):
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text not in ("", self.last):
            with suppress(OSError):  # no run ends because nobody reads its log any more
                self.file.write(f"{text}\n")
            self.last = text

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()


class _Log(tqdm):
    """The longer it takes, the rarer its lines are: a hundred and some in ten hours."""

    def display(self, *arguments, **more):
        self.mininterval = max(EVERY, self.format_dict["elapsed"] / 30)
        return super().display(*arguments, **more)


@contextmanager
def bar(what: str, total: int, first: int = 0, leave: bool = True, delay: float = 0.0):
    """Around a phase: a tqdm bar of the first rank; in a log file its lines.

    leave: whether a terminal keeps it when the phase is over. delay: seconds in which it says
    nothing; a phase that ends before says nothing at all.
    """
    options = {"desc": what, "total": total, "initial": first, "disable": rank() > 0}
    options["delay"] = delay
    if sys.stderr.isatty():
        with tqdm(**options, leave=leave, dynamic_ncols=True) as drawn:
            yield drawn
        return
    # one within another (position) would move the cursor up
    lines = {"mininterval": EVERY, "miniters": 1, "bar_format": LINE, "position": 0}
    with _Log(**options, **lines, leave=False, file=_Lines(sys.stderr)) as drawn:
        yield drawn
        if not drawn.disable and drawn._time() >= drawn.start_t + delay:
            drawn.refresh()  # the last line, unless something else is to be said of its end


def over(things, what: str, *samplers):
    """The things, one after the other, with a bar of those that are done and of sampled tokens."""
    with bar(what, len(things), leave=False) as drawn, counted(drawn, *samplers):
        for thing in things:
            yield thing
            drawn.update()


@contextmanager
def counted(bar, *samplers):
    """Around sampling: the bar also counts tokens, so that one answer of minutes is seen to grow.

    The samplers' own hooks are in use meanwhile.
    """
    if bar.disable:  # it has no clock then
        yield
        return
    count, before = 0, f"{bar.postfix}, " if bar.postfix else ""

    def grow(rows, ids):
        nonlocal count
        count += sum(map(len, ids))
        bar.set_postfix_str(f"{before}{count:,} tokens so far", refresh=False)
        now = bar._time()
        if now >= bar.start_t + bar.delay and now - bar.last_print_t >= bar.mininterval:
            bar.refresh()
            bar.last_print_t = now

    for sampler in samplers:
        sampler.on_tokens = grow
    try:
        yield
    finally:
        for sampler in samplers:
            sampler.on_tokens = None


@contextmanager
def said_if_slow(text: str, seconds: float = 5.0):
    """Around what has nothing to count, a large model's loading: a line if it takes a while."""
    timer = threading.Timer(seconds, print, [text])
    timer.daemon = True
    if rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def about(seconds: float) -> str:
    """A time as a person would say it: about 40 seconds, about 2 minutes, about 30 hours."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    name, size = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    return f"about {max(2, round(seconds / size))} {name}s"
