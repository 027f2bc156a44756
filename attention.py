"""Attention functions of our own, put under any transformers model of standard attention while it samples or scores.

`attention_is(model, name)` switches them on for a while; a layer then hands over its queries, keys and values and is
told where they stand by `position_ids`. This file has the switch, the check that a layer asks for nothing we ignore,
and the sampler's attention over its cache, "ragged"; the scorer's, "prefix_tree", is in scorer.py.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_layer(module, attention_mask, window, kwargs) -> None:
    """ValueError if a layer asks for what our attention functions can't do; what is unknown is refused."""
    name = f"{type(module).__name__} is not supported: its attention"
    known = {"position_ids", "is_causal", "use_cache", "dropout", "cache_position"}
    unknown = [k for k, v in kwargs.items() if k not in known and v is not None and v is not False]
    causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
    kinds = getattr(module.config, "layer_types", None)
    sliding = kinds and kinds[module.layer_idx] == "sliding_attention"
    require(not unknown, f"{name} asks for {', '.join(unknown)}")
    told = attention_mask is None and kwargs.get("position_ids") is not None
    require(told, f"{name} has a mask of its own or is not told the position_ids")
    require(causal, f"{name} is bidirectional")
    require(window or not sliding, f"{name} is not told its sliding window")


@contextmanager
def attention_is(model, name: str):
    """All layers of the model use the registered attention function `name`; afterwards what they used before."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:  # the public setter would also overwrite nested configs
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def ragged_mask(positions: Tensor, width: int, heads: int, window: int | None, dtype) -> Tensor:
    """What queries at positions (n, Q) may see of slots [0, width): (n, 1, heads * Q, width), to be added.

    Slot j iff j <= position and within the window; the same for each of the `heads` that share a key-value head.
    """
    slot, position = torch.arange(width, device=positions.device), positions[:, :, None]
    hidden = slot > position  # (n, Q, width)
    if window is not None:
        hidden |= slot <= position - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return mask.repeat(1, heads, 1)[:, None]


def _one_query(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Attention as it is written: on CPU, for a single query, a sixth faster than the kernel made for many."""
    return torch.add(attn_mask, query @ key.mT, alpha=scale).softmax(-1) @ value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, spans: list) -> Tensor:
    """query (n, heads, Q, D), key and value (n, kv_heads, K, D), mask of `ragged_mask` -> (n, Q, heads, D).

    spans: (first row, end, width) of neighbours in length, which need not read the cache as far as the longest row.
    """
    # Heads that share a KV head become queries of it: no expanded copy of it, and any kernel will do.
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (n, kv_heads, heads / kv_heads * Q, D)
    single = folded.shape[2] == 1 and folded.device.type == "cpu" and folded.dtype == torch.float32
    kernel = _one_query if single else F.scaled_dot_product_attention
    parts = [
        kernel(folded[a:b], key[a:b, :, :width], value[a:b, :, :width], attn_mask=mask[a:b, ..., :width], scale=scale)
        for a, b, width in spans
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2)


def ragged_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Over the sampler's cache, where slot j of a row holds the token at position j."""
    check_layer(module, attention_mask, sliding_window, kwargs)
    positions, heads, width = kwargs["position_ids"], query.shape[1] // key.shape[1], key.shape[2]
    masks = positions.__dict__.setdefault("masks", {})  # all layers of one forward pass share their masks
    if (width, sliding_window) not in masks:
        masks[width, sliding_window] = ragged_mask(positions, width, heads, sliding_window, query.dtype)
    return attend(query, key, value, masks[width, sliding_window], scaling, positions.spans), None


AttentionInterface.register("ragged", ragged_attention)
