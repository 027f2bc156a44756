"""A batch whose cache would not fit is sampled in parts, and is the same batch (--cache_tokens).

A row's sample depends on its own seed only, and seeds are functions of the run's seed, the step and
the row's place: so a step may sample some of its problems, all their turns, then the next ones, and
join what they gave. Float32 on CPU gives the same ids, but where a draw falls on the very edge
between two words (one row of 1,024, 500 tokens long); else rows differ as rounding has it.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.rollout import Rollout, join_rollouts
from training.batches import Share
from training.distributed import exchange
from training.fitting import SHARE, memory_of


def cache_tokens(config, sampler) -> int:
    """How many tokens the cache of a rank's rollout may hold: --cache_tokens, or its default.

    That is what a quarter of the device's memory holds: weights, and at the update gradients and
    activations, need the rest.
    """
    return config.cache_tokens or least_memory(sampler.model.device) // SHARE // sampler.token_bytes


@cache
def least_memory(device) -> int:
    """Of the ranks' devices: all must agree on it, and first ask together (`check_cache`)."""
    return min(exchange(memory_of(device)))


def longest(env, things: list[dict], config) -> int:
    """Tokens of the longest conversation about some problems, or failures, at all its limits.

    Rounded up to slots of the cache.
    """
    begun = [0]
    for thing in things:
        if "answer_ids" in thing:
            first = len(thing["answer_ids"]) - config.max_new_tokens
            begun.append(len(thing["prompt_ids"]) + first)
        else:
            begun.append(len(env.prompts([thing])[0]) + len(env.given_ids(thing)))
    return -(-(max(begun) + env.tokens_after(config)) // 8) * 8


def tokens_of(sampler, rows: int, most: int) -> int:
    """What rows of up to `most` tokens take of the cache: while it is copied, half a layer more."""
    return rows * most + -(-rows * most // (2 * sampler.config.num_hidden_layers))


def check_cache(env, sampler, things: list[dict], config, each: int) -> None:
    """ValueError if the `each` rows of a problem, which are sampled together, don't fit."""
    most, room = longest(env, things, config), cache_tokens(config, sampler)
    needed = tokens_of(sampler, each, most)
    if needed > room:
        usual = "" if config.cache_tokens else " (a quarter of the memory)"
        raise ValueError(
            f"--cache_tokens {room:,}{usual}: one problem alone needs {needed:,}, for {each} "
            f"rows of up to {most:,} tokens: raise it, or lower the token limits or the rows"
        )


def in_parts(roll_out, env, sampler, mine: Share, config, *more, each: int | None = None):
    """roll_out(env, sampler, mine, config, *more), of as many problems at once as fit the cache.

    each: rows of a problem, by default the config's. What comes has no cache any more: its memory
    is wanted for the next part, or the update.
    """
    tokens = tokens_of(sampler, each or config.rows_each, longest(env, mine.items, config))
    shares, parts = mine.parts(max(1, cache_tokens(config, sampler) // tokens)), []
    for share in shares:
        parts.append(roll_out(env, sampler, share, config, *more))
        if hasattr(parts[-1], "rollout"):
            parts[-1].rollout.cache = None
    return join(parts, [len(share.items) for share in shares], sampler.pad_id)


def join(parts: list, counts: list[int], pad_id: int):
    """What parts of `counts` problems gave, as if they had been one.

    Rollouts, tensors by row (a row's tokens padded with 0), lists, flags that are the same for all,
    and named tuples of these.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Rollout):
        return join_rollouts(parts, counts, pad_id)
    if isinstance(first, Tensor):
        width = max(part.shape[-1] for part in parts)
        wide = [F.pad(x, (0, width - x.shape[1])) if x.ndim == 2 else x for x in parts]
        return torch.cat(wide)
    if isinstance(first, list):
        return [thing for part in parts for thing in part]
    if isinstance(first, tuple):
        fields = zip(*parts, strict=True)
        return type(first)(*(join([*field], counts, pad_id) for field in fields))
    return first
