"""What the sampler refuses, and why: models for which its cache would be wrong, bad requests."""

import torch

from sampling.attention import require


def check_model(model) -> str:
    """ValueError for a model that says of itself that a ragged cache can't be right for it.

    Returns how such an error begins, for what only a run of the model will show.
    """
    name = f"{type(model).__name__} can't be sampled from with a ragged cache"
    layers = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())}
    other = layers - {"full_attention", "sliding_attention"}
    recurrent = getattr(model, "_is_stateful", False)
    pluggable = getattr(model, "_supports_attention_backend", False)
    require(not model.config.is_encoder_decoder, f"{name}: it is an encoder-decoder")
    require(not other and not recurrent, f"{name}: it has recurrent or unknown layers {[*other]}")
    require(pluggable, f"{name}: it keeps to its own attention function")
    return name


def position_limit(config) -> int:
    """The longest sequence, in tokens, that a model of this text config can be fed."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, one long row would change the others' rope
        return min(config.max_position_embeddings, rope["original_max_position_embeddings"])
    return config.max_position_embeddings


def token_limits(max_new_tokens, total: int) -> list[int]:
    """`max_new_tokens`, a number or one for each of `total` rows, as a list; ValueError else."""
    limits = torch.as_tensor(max_new_tokens)
    whole = limits.ndim < 2 and not limits.is_floating_point()
    must = "it must be a whole number, or one for each row"
    require(whole, f"max_new_tokens is {max_new_tokens}: {must}")
    limits = limits.tolist() if limits.ndim else [int(limits)] * total
    need = f"need 1 or {total}: one a row"
    require(len(limits) == total, f"max_new_tokens has {len(limits)} numbers, {need}")
    return limits


def check_request(sampler, prompts, old, group_size, max_new_tokens, temperature) -> list[int]:
    """ValueError for input that makes no sense; else max_new_tokens of each row."""
    limits = token_limits(max_new_tokens, len(prompts) * group_size)
    numbers = f"{len(prompts)} prompts, {group_size=}, {max_new_tokens=}"
    require(min(len(prompts), group_size, *limits) >= 1, f"{numbers}: none may be below 1")
    must = "it must be positive, or 0 for greedy"
    require(temperature >= 0, f"temperature is {temperature}: {must}")
    groups = [limits[i * group_size : (i + 1) * group_size] for i in range(len(prompts))]
    check_prompts(prompts, old, map(max, groups), len(sampler.is_stop), sampler.limit)
    return limits


def check_prompts(prompts, old, new, vocabulary: int, positions: int) -> None:
    """ValueError for a prompt that is empty, has an unknown id or leaves no room for new tokens.

    prompts: lists of ids; old, new: how many tokens stand before each, and may follow it at most.
    """
    for i, (prompt, before, after) in enumerate(zip(prompts, old, new, strict=True)):
        known = all(0 <= token < vocabulary for token in prompt)
        fits = before + len(prompt) + after <= positions
        sizes = f"{before} old tokens + {len(prompt)} of the prompt + {after} new ones"
        require(len(prompt), f"prompt {i} is empty: give it at least one token (a BOS, say)")
        require(known, f"prompt {i} has an id outside the vocabulary of {vocabulary}")
        require(fits, f"prompt {i}: {sizes} exceed {positions} positions: lower max_new_tokens")


def goes_on_from(cache, model, seeds) -> bool:
    """Whether a model can go on from this cache; ValueError if it can't, nor encode it all anew."""
    if cache is not None and cache.owner is model:
        return True
    fault = "was freed: keep it until the last turn, or" if cache is None else "is another model's:"
    anew = "give `seeds`, one for each new row, to have the conversation encoded anew"
    require(seeds is not None, f"this rollout's cache {fault} {anew}")
    return False
