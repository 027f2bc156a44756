"""What a block of decoding steps works on, how much of the cache it reads, and its CUDA graphs."""

import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sampling.draws import uniform


class State(NamedTuple):
    """Rows that are decoded together, for a block of steps; column c is what c steps have led to.

    All that is written stays here until the block is done: a CUDA graph knows one place in memory.
    """

    end: Tensor  # (n,) the length at which a row is cut off
    start: Tensor  # (n,) the position of the last token before the block
    position: Tensor  # (n,) of the last token, which is fed next
    token: Tensor  # (n,)
    logprob: Tensor  # (n,)
    done: Tensor  # (n,)
    draws: Tensor  # (n, columns) in [0, 1), for the token after column c
    tokens: Tensor  # (n, columns)
    logprobs: Tensor  # (n, columns)


def state_of(rollout, rows: Tensor, end: Tensor, columns: int) -> State:
    """Where `rows` (n,) of a rollout are, before up to columns - 1 steps; end: (B,)."""
    start = rollout.lengths[rows] - 1
    token, logprob = rollout.ids[rows, start], rollout.logprobs[rows, start]
    # A row draws the same whatever its neighbours do and wherever a block begins.
    column = torch.arange(columns, device=rows.device)
    draws = uniform(rollout.seeds[rows, None], start[:, None] + 1 + column)
    tokens, logprobs = (x[:, None].repeat(1, columns) for x in (token, logprob))
    done = torch.zeros_like(rows, dtype=torch.bool)
    return State(end[rows], start, start.clone(), token, logprob, done, draws, tokens, logprobs)


def write(rollout, rows: Tensor, state: State) -> None:
    """What a block has sampled, and how long the rows (n,) are by now; more of a state is idle."""
    _, start, position, _, _, _, _, tokens, logprobs = (x[: len(rows)] for x in state)
    column = torch.arange(tokens.shape[1], device=rows.device)
    column = torch.minimum(column, (position - start)[:, None])  # (n, columns), no further
    at = rows[:, None], start[:, None] + column
    rollout.ids[at], rollout.logprobs[at] = tokens.gather(1, column), logprobs.gather(1, column)
    rollout.lengths[rows] = position + 1


def widths_of(lengths: list[int]) -> list[int]:
    """How far to read the cache for rows of these lengths, one for each run of neighbours.

    As far as the longest row, or in runs of 16 rows if that spares a fifth of it.
    """
    count = -(-len(lengths) // 16)
    run = -(-len(lengths) // count)
    widths = [max(lengths[i * run : (i + 1) * run]) for i in range(count)]
    return widths if 5 * sum(widths) < 4 * max(widths) * count else [max(widths)]


class Graphs:
    """Decoding steps captured on CUDA and replayed, since launching them costs more than they do.

    They live as long as the sampler, and their memory with them. A graph is for one number of rows,
    so that is rounded up, and for one temperature. It reads and writes one State of its own, into
    which each block's is copied; the cache it finds by a table (fast/cuda_step.py); and if weights
    have moved, all graphs are thrown away.
    """

    def __init__(self):
        self.reads = None
        self.places, self.met, self.replays, self.pool = {}, set(), {}, None

    @staticmethod
    def rounded(active: int) -> int:
        """With how many rows to decode so many: 1, 8, 16, 32, 64, 96, 128, 192, 256 and so on.

        Fewer than 8 take as long as 8: a step's time is that of reading the weights.
        """
        if active == 1:
            return 1
        power = max(8, 1 << (active - 1).bit_length())
        three_quarters = power * 3 // 4
        return three_quarters if power > 64 and active <= three_quarters else power

    def run(self, step, state: State, temperature: float, reads: tuple, count: int) -> State:
        """`count` steps from `state`, each step(state) in place; returns where they have led.

        reads: of Step (fast/cuda_step.py). The first block of a size is run as it is, which also
        warms up. So what is captured is replayed, and what occurs once is not captured.
        """
        if reads != self.reads:
            self.reads, self.met, self.replays, self.pool = reads, set(), {}, None
        n, active = self.rounded(len(state.done)), len(state.done)
        shape = n, state.tokens.shape[1]
        if shape not in self.places:
            self.places[shape] = State(*(x.new_zeros(n, *x.shape[1:]) for x in state))
        fixed, key = self.places[shape], (*shape, temperature)
        for old, new in zip(fixed, state, strict=True):
            old[:active] = new
        fixed.done[active:] = True  # rows that are none
        once = partial(step, fixed)
        if key in self.met and key not in self.replays:
            self.replays[key] = self.captured_or_not(once)
        self.met.add(key)
        for _ in range(count):
            self.replays.get(key, once)()
        return fixed

    def captured_or_not(self, step):
        """Its graph; where that can't be had the step itself, which a capture does not run."""
        try:
            return self.capture(step)
        except RuntimeError as error:
            said = (
                "a decoding step can't be a CUDA graph, and is launched each time, which is slower"
            )
            warnings.warn(f"{said}: {error}", stacklevel=2)
            return step

    def capture(self, step):
        """The CUDA graph of step(), which is not run by this, as a function."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # other threads may use CUDA meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode=mode):
            step()
        return graph.replay
