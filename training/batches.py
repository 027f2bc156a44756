"""Which problems a step is about, which of them are this rank's, and the seeds of their rows.

All are pure functions of the run's seed and the step, so a resumed run needs no place in the data,
and any number of ranks samples the same.
"""

import hashlib
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from training.distributed import share


class Share(NamedTuple):
    """This rank's part of the things (problems, failures, queries) that a step is about."""

    items: list
    span: range  # where they stand among all of the step's
    key: tuple  # what tells this step's seeds from others': the run's seed, the step

    def seeds(self, what: str, each: int = 1) -> list[int]:
        """A seed for each of `each` rows an item; another purpose has seeds of its own."""
        return row_seeds(self.span, what, *self.key, each=each)

    def parts(self, most: int) -> list["Share"]:
        """As few parts as have up to `most` items each, about alike; without items one of none."""
        total, count = len(self.items), max(1, -(-len(self.items) // most))
        bounds = pairwise(total * i // count for i in range(count + 1))
        return [Share(self.items[a:b], self.span[a:b], self.key) for a, b in bounds]


def share_of(things: list, *key) -> Share:
    span = share(len(things))
    return Share(things[span.start : span.stop], span, key)


def pick(things: list, count: int, seed: int, step: int) -> Share:
    """This rank's share of the `step`-th batch of `count` things."""
    return share_of(pick_things(things, seed, step, count), seed, step)


def pick_things(things: list, seed: int, step: int, count: int) -> list:
    """The `step`-th batch of an endless stream of shuffled epochs."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(things))
        chosen.append(things[_epoch_order(len(things), seed, epoch)[index]])
    return chosen


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def row_seeds(things: int | range, *key, each: int = 1) -> list[int]:
    """A seed for each row: `each` rows a thing; a range is a rank's share of the things."""
    things = range(things) if isinstance(things, int) else things
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    return [(start + row) % 2**63 for row in range(things.start * each, things.stop * each)]
