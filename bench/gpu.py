"""The first minutes on a GPU: what can go wrong there costs one line, and not the rest of them.

    python bench/gpu.py --out gpu.jsonl                # 8 minutes, of parts that may take 13
    python bench/gpu.py --out gpu.jsonl --budget 200 --parts train,hf       # what had no time
    python bench/gpu.py --out gpu.jsonl --budget 200 --parts decode,update  # again, after a fix
    python bench/gpu.py --small                        # a rehearsal on an idle CPU, a minute

Each part is a process of its own, boxed in time, forked from this one, which has imported all and
never touches CUDA: an error that sticks, no memory, or a hang ends that part alone. Each
measurement is a line of JSON, written at once: with the key `error` if it failed, `skipped` if it
could not be made here. The parts come in the order of their worth if all after them were lost.
"""

import os

# torch.cuda.is_available(), which imports ask, would else start CUDA, and no fork could use it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import signal  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from datetime import UTC, datetime  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402

from common import ROOT, flag, parse_args  # noqa: E402
from gpu_parts import correct, decode, hardware, runs, tune, update  # noqa: E402
from gpu_parts.lines import DONE, Part, described  # noqa: E402
from training.command import exit_on_bad_input  # noqa: E402

PARTS = {  # and the seconds that each may take
    "env": (hardware.env, 25),
    "ceilings": (hardware.ceilings, 20),
    "correct": (correct.correct, 70),
    "sdpa": (hardware.sdpa, 30),
    "kernels": (correct.kernels, 50),
    "decode": (decode.decode, 120),
    "update": (update.update, 120),
    "resume": (runs.resume, 115),
    "train": (runs.train, 80),
    "hf": (decode.hf, 180),
    "compiled": (update.compiled, 240),
    "tune": (tune.tune, 120),
}
USUAL = [name for name in PARTS if name != "tune"]
LEAST = 5  # seconds without which no part is begun


@dataclass
class Config:
    out: str = flag("gpu.jsonl", "where the lines go; they are added to what is there")
    parts: str = flag(",".join(USUAL), "which, and in which order")
    budget: float = flag(480.0, "seconds for all of them", above=0)
    small: bool = flag(False, "rehearse all parts on a CPU, with small models")


def check(config: Config) -> list[str]:
    """The names of the parts; ValueError for what can't be run."""
    names = config.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"--parts: no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    try:
        open(config.out, "a").close()
    except OSError as error:
        raise ValueError(f"--out {config.out} can't be written: {error.strerror}") from None
    if config.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the scripts that parts start, too
    elif not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: give --small for a rehearsal on a CPU")
    return names


def about(config: Config) -> dict:
    """What the lines are about; by other programs, since this one never touches CUDA."""
    query = "--query-gpu=name,driver_version,memory.total"
    return {
        "name": "about",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "card": None if config.small else says("nvidia-smi", query, "--format=csv,noheader"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": says("git", "describe", "--always", "--dirty"),
        "small": config.small,
        "budget": config.budget,
    }


def says(*command: str) -> str | None:
    """What a program prints; None if it is not there, or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def work(part: Part, function) -> None:
    """The child's: the part, in a process group of its own, and no way back from it."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1 if part.small else 8)
    try:
        function(part)
        part.doing = DONE
    except BaseException as error:
        part.write(name=part.doing or "all", **described(error))
        part.doing = DONE
    finally:
        os._exit(0)


def watch(part: Part, function, seconds: float) -> None:
    """One part in a process of its own; whatever becomes of it is told in its last line."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        work(part, function)
    try:
        ended = wait(child, seconds)
    finally:  # this process is told to stop, too
        kill_group(child)
    wait(child, 10)  # not for ever: a driver may hold what was killed
    os.waitpid(child, os.WNOHANG)
    part.write(name="all", s=time.monotonic() - started, **fault(part, ended, seconds))


def wait(child: int, seconds: float):
    """How a process ended, which stays to be reaped; None if it has not in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return ended
        time.sleep(0.02)
    return None


def kill_group(child: int) -> None:
    """And what it has started, if it had time to make a group."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass


def fault(part: Part, ended, seconds: float) -> dict:
    """What went wrong with a part as a whole, if anything did."""
    during = {"during": part.doing} if part.doing else {}
    if ended is None:
        return {"error": f"its {seconds:.0f} seconds were over"} | during
    if ended.si_code != os.CLD_EXITED:
        return {"error": f"killed by {signal.Signals(ended.si_status).name}"} | during
    if ended.si_status or part.doing != DONE:
        return {"error": f"it left with exit code {ended.si_status}"} | during
    return {}


def run(names: list[str], config: Config) -> None:
    ends = time.monotonic() + config.budget
    Part("about", config.out, config.budget).write(**about(config))
    for name in names:
        function, seconds = PARTS[name]
        seconds *= 4 if config.small else 1  # a CPU that others use too is no fault
        seconds = min(seconds, ends - time.monotonic())
        part = Part(name, config.out, seconds, config.small)
        if seconds < LEAST:
            part.skip("all", "the budget is used up")
            continue
        watch(part, function, seconds)


def stop(number, _):
    raise SystemExit(128 + number)


def main(config: Config) -> None:
    with exit_on_bad_input():
        names = check(config)
    signal.signal(signal.SIGTERM, stop)  # so that the part that is running does not stay
    run(names, config)


if __name__ == "__main__":
    main(parse_args(Config))
