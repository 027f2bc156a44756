"""What a block of decoding steps works on, how much of the cache it reads, and its CUDA graphs."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Rows that are decoded together, each tensor (n,)."""

    rows: Tensor  # of the rollout
    end: Tensor  # the length at which a row is cut off
    seeds: Tensor
    position: Tensor  # of the last token, which is fed next
    token: Tensor
    logprob: Tensor
    done: Tensor


def state_of(rollout, rows: list[int], end: Tensor, active: int) -> State:
    """Where `rows` of a rollout are, of which the first `active` count; end: (B,)."""
    rows = torch.tensor(rows, device=end.device)
    position = rollout.lengths[rows] - 1
    idle = torch.arange(len(rows), device=end.device) >= active
    token, logprob = rollout.ids[rows, position], rollout.logprobs[rows, position]
    return State(rows, end[rows], rollout.seeds[rows], position, token, logprob, idle)


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

    A graph is for one number of rows and one width of the cache, so both are rounded up; and all
    that it reads and writes stays in one place. They live as long as one call of the sampler, and
    their pool of memory with them.
    """

    def __init__(self, device):
        self.device, self.pool, self.kept = device, None, {}

    @staticmethod
    def rounded(active: int, rows: int, widths: list[int]) -> tuple[int, list[int]]:
        """How many of all rows to decode together (some idle ones come along), and how far."""
        power = 1 << (active - 1).bit_length()
        bucket = next(n for n in (power * 3 // 4, power) if n >= active)
        return min(bucket, rows), [-(-max(widths) // 128) * 128]

    def run(self, step, state: State, width: int, count: int) -> State:
        """`count` steps from `state`, each step(state) in place; returns where they have led."""
        fixed, replays = self.kept.setdefault(len(state.rows), (state, {}))
        for old, new in zip(fixed, state, strict=True):
            old.copy_(new)
        for _ in range(count):
            if width in replays:
                replays[width]()
            else:
                step(fixed)  # one as it is, which also warms up
                replays[width] = self.capture(partial(step, fixed))
        return fixed

    def capture(self, step):
        """The CUDA graph of step(), which is not run by this, as a function."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph.replay
