"""A decode step: of our sampler on each of its paths, and of model.generate.

The step is a difference of two calls, of 17 and 81 new tokens after prompts of 400. A step is
captured in the second block of the first call.
"""

import random
from functools import partial

from common import draw_lengths, generate_step
from gpu_parts.lines import allow_cudnn, cudnn_allowed, described, gpu, once, peak_gib, timed
from gpu_parts.models import NAMES, PATHS, make_sampler, path_of, paths, prompts_of, random_model
from gpu_parts.profiles import kernels_of, ranking
from sampling.steps import Graphs

BATCHES = (64, 1, 256, 16)


def counted_captures(part) -> list[float]:
    """From now on the seconds of each capture are put into this list; one that fails is a line."""
    capture, seconds = Graphs.capture, []

    def timed_capture(self, step):
        made = []
        try:
            seconds.append(once(lambda: made.append(capture(self, step))))
        except Exception as error:
            part.write(name="capture", **described(error))
            raise
        return made[0]

    Graphs.capture = timed_capture
    return seconds


def decode(part):
    captures = counted_captures(part)
    for name in NAMES:
        part.section(name, decode_model, part, name, captures)


def decode_model(part, name: str, captures: list) -> None:
    model = random_model(part, name)
    known = part.measure(f"{name} paths", lambda: {x: path_of(s) for x, s in paths(model).items()})
    known = [path for path in PATHS if path in (known or ())] or ["as it is"]
    for path in PATHS:
        if path not in known:
            part.skip(f"{name} {path}", "it is the one before here")
    for batch in BATCHES if gpu() else (2,):
        for path, cudnn in ways(known, batch):
            label = f"{name} batch {batch} {path}" + (", cuDNN" if cudnn else "")
            part.measure(label, one_way, part, model, batch, path, cudnn, captures, needs=5)
    for path in known[:-1]:  # the last one is transformers' own
        part.measure(f"{name} {path} profile", launches, part, model, path, needs=5)
    part.measure(f"{name} ragged", ragged, part, model, captures, needs=8)


def ways(known: list[str], batch: int) -> list[tuple[str, bool]]:
    """(path, whether cuDNN may attend) of what is worth measuring at this batch.

    Our kernels do without torch's attention while they decode, so cuDNN is tried without them.
    """
    if gpu() and batch not in (64, 1):
        return [("as it is", False)]
    cudnn = [(known[-2], True)] if gpu() and batch == 64 and len(known) > 1 else []
    return [*((path, False) for path in known), *cudnn]


def one_way(part, model, batch: int, path: str, cudnn: bool, captures: list) -> dict:
    length, few, many = (20, 3, 7) if part.small else (400, 17, 81)
    prompts = prompts_of(batch, length)
    sampler = make_sampler(model, **PATHS[path])
    allow_cudnn(cudnn)
    peak_gib()
    captures.clear()
    calls = [partial(sampler.generate, prompts, max_new_tokens=n) for n in (few, many)]
    first, spent = once(calls[0]), list(captures)
    seconds = [timed(call, 2, warm) for call, warm in zip(calls, (0, 1))]
    step = (seconds[1] - seconds[0]) / (many - few)
    needed = sum(p.nbytes for p in model.parameters())  # a tied head counts once
    needed += batch * (length + (few + many) // 2) * sampler.token_bytes
    found = {"ms_a_step": 1e3 * step, "tokens_s": batch / step, "TB_s": needed / step / 1e12}
    found |= {"first_call_s": first, "later_call_s": seconds[0], "first_captures_s": spent}
    return (
        found
        | {"later_captures": len(captures) - len(spent), "peak_GiB": peak_gib()}
        | (path_of(sampler) | {"cudnn_allowed": cudnn_allowed()})
    )


def launches(part, model, path: str) -> dict:
    """Kernels of one step (on a CPU: operations), by name: a difference of two calls."""
    sampler = make_sampler(model, **PATHS[path])
    prompts = prompts_of(2 if part.small else 64, 20 if part.small else 400)
    seen = {}
    for count in (3, 7):
        call = partial(sampler.generate, prompts, max_new_tokens=count)
        call()
        seen[count] = kernels_of(call)
    number, us = (seen[7][i].copy() for i in range(2))
    number.subtract(seen[3][0]), us.subtract(seen[3][1])
    return ranking(number, us, 4) | path_of(sampler)


def ragged(part, model, captures: list) -> dict:
    """As a step of RL asks for it: 32 prompts x 8, log-normal lengths, then a second turn."""
    rng, sampler = random.Random(0), make_sampler(model)
    count, longest, room = (3, 12, 20) if part.small else (32, 256, 256)
    prompts = [row[: rng.randint(room // 4, room)] for row in prompts_of(count, room)]
    limits = [draw_lengths(rng, count * 8, longest / 4, longest) for _ in range(2)]
    captures.clear()
    peak_gib()
    seconds, said = [], [[9] * 12] * count * 8
    for _ in range(2):  # the second time with what the first has captured
        turns = []

        def first(turns=turns):
            turns.append(sampler.generate(prompts, 8, max_new_tokens=limits[0]))

        def second(turns=turns):
            sampler.extend(turns[0], said, max_new_tokens=limits[1])

        seconds.append([once(first), once(second), len(captures)])
    found = {"tokens": [sum(limit) for limit in limits], "turn1_turn2_captures": seconds}
    return found | {"captures_s": sum(captures), "peak_GiB": peak_gib()} | path_of(sampler)


def hf(part):
    """model.generate at its best, last, since compiling takes longest and is the least to lose."""
    allow_cudnn(False)
    for cache in ("static", "dynamic", "compiled"):
        for name in NAMES[:1] if part.small else NAMES:
            part.section(f"{name} {cache}", hf_model, part, name, cache)


def hf_model(part, name: str, cache: str) -> None:
    model, batches = random_model(part, name), BATCHES[:2] if cache == "compiled" else BATCHES
    needs = 60 if cache == "compiled" and gpu() else 4
    for batch in batches if gpu() else (2,):
        label = f"{name} {cache} batch {batch}"
        part.measure(label, theirs, part, model, cache, batch, needs=needs)


def theirs(part, model, cache: str, batch: int) -> dict:
    peak_gib()
    step = generate_step(model, cache, batch, 16 if part.small else 448, 16)
    return {"ms_a_step": 1e3 * step, "tokens_s": batch / step, "peak_GiB": peak_gib()}
