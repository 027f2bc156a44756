"""Random draws that depend on a row's own seed and position only, and tokens drawn from logits.

Pure tensor functions. A row of seed s draws the same whatever its neighbours are, and on whatever
rank it is: no generator's state, which the order of the rows would be a part of.
"""

import torch


def _hash(seeds, counters):
    """Two rounds of splitmix64 in int64 (>> is arithmetic, hence the masks).

    Counters from 0 on are positions, negative ones are children.
    """
    for step in (1, counters):
        seeds = seeds + step * (0x9E3779B97F4A7C15 - 2**64)
        seeds = (seeds ^ ((seeds >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
        seeds = (seeds ^ ((seeds >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
        seeds = seeds ^ ((seeds >> 31) & (2**33 - 1))
    return seeds


def uniform(seeds, positions):
    """A float32 in [0, 1) for each int64 seed and position; 23 bits, so that u * total < total."""
    return ((_hash(seeds, positions) >> 41) & (2**23 - 1)).float() * 2.0**-23


def child_seeds(seeds, count):
    """Seeds (n, count) of the rows that go on from rows of seeds (n,)."""
    return _hash(seeds[:, None], -1 - torch.arange(count, device=seeds.device))


def _draw(mass, x):
    """The first index where the cumulative mass (n, K) exceeds x (n, 1), and x's rest there."""
    cdf = mass.cumsum(-1)
    index = torch.searchsorted(cdf, x, right=True).clamp(max=mass.shape[1] - 1)
    # Rounding may lift x to the end, and a parallel cumsum is not quite monotone: nothing
    # impossible slips through.
    fine = (mass.gather(1, index) > 0) & (x < cdf[:, -1:])
    index = torch.where(fine, index, mass.argmax(-1, keepdim=True))
    return index, (x - (cdf - mass).gather(1, index)).clamp(min=0)


def sample(logits, temperature, u):
    """Tokens (n,) from softmax(logits (n, V) / temperature) by its CDF at u (n,), and log-probs.

    Log-probs (n,) are float32; temperature 0 is greedy, with log-probs at 1. The CDF is searched in
    two levels, blocks of words and then the words of one block, so that all V words are only
    exponentiated and summed.
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    (n, V), size, top = logits.shape, min(logits.shape[1], 256), logits.amax(-1, keepdim=True)
    mass = logits.new_empty(n, -(-V // size), size)
    words = mass.view(n, -1)
    words[:, V:] = 0
    torch.sub(logits, top, out=words[:, :V]).exp_()
    blocks = mass.sum(-1)
    total = blocks.sum(-1, keepdim=True)
    if temperature > 0:
        block, x = _draw(blocks, u[:, None] * total)
        token = block * size + _draw(mass.take_along_dim(block[:, :, None], 1)[:, 0], x)[0]
    else:
        token = logits.argmax(-1, keepdim=True)
    return token[:, 0], (logits.gather(1, token) - top - total.log())[:, 0]
