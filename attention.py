"""Attention functions of our own, put under any transformers model of standard attention while it samples or scores.

`attention_is(model, name)` switches them on for a while; a layer then hands over its queries, keys and values and is
told where they stand by `position_ids`. This file has the switch, the check that a layer asks for nothing we ignore,
the sampler's attention over its cache ("ragged") and the scorer's over a tree of prefixes ("prefix_tree").
"""

from contextlib import contextmanager
from typing import NamedTuple

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
    visible = slot <= position  # (n, Q, width)
    if window is not None:
        visible &= slot > position - window
    return torch.where(visible, 0.0, -torch.inf).to(dtype).repeat(1, heads, 1)[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query (n, heads, Q, D), key and value (n, kv_heads, K, D), mask of `ragged_mask` -> (n, Q, heads, D)."""
    # Heads that share a KV head become queries of it: no expanded copy of it, and any kernel will do.
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (n, kv_heads, heads / kv_heads * Q, D)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2)


def ragged_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Over the sampler's cache, where slot j of a row holds the token at position j."""
    check_layer(module, attention_mask, sliding_window, kwargs)
    positions, heads, width = kwargs["position_ids"], query.shape[1] // key.shape[1], key.shape[2]
    masks = positions.__dict__.setdefault("masks", {})  # all layers of one forward pass share their masks
    if (width, sliding_window) not in masks:
        masks[width, sliding_window] = ragged_mask(positions, width, heads, sliding_window, query.dtype)
    return attend(query, key, value, masks[width, sliding_window], scaling), None


class PrefixTree(NamedTuple):
    """The distinct prefixes of B rows, each a node that is encoded once; R distinct rows, N nodes.

    ids, positions: (1, N) int64, what to feed
    parent:         (N,) int64, the node of the prefix without its last token; its own index at position 0
    node:           (R, T) int64, the node at each place of a distinct row; 0 in the padding on the right
    row:            (B,) int64, which distinct row a row is
    place:          (N,) int64, one place of `node`, flattened, where the node stands
    """

    ids: Tensor
    positions: Tensor
    parent: Tensor
    node: Tensor
    row: Tensor
    place: Tensor


def prefix_tree(ids: Tensor, real: Tensor) -> PrefixTree:
    """The tree of rows ids (B, T), right-padded where `real` (B, T) is False. Exact: tokens are compared, not hashed.

    In the sorted rows a prefix that any row above has, the next row above has too.
    """
    rows, row = torch.unique(ids.masked_fill(~real, -1), dim=0, return_inverse=True)  # (R, T), (B,)
    shared = F.pad((rows[1:] == rows[:-1]).long().cumprod(1), (0, 0, 1, 0)).bool()  # as in the row above up to here
    new = (rows >= 0) & ~shared  # (R, T)
    number = (new.flatten().cumsum(0) - 1).view_as(rows)
    first = torch.arange(len(rows), device=ids.device)[:, None] * new
    node = number.gather(0, first.cummax(0).values).masked_fill(rows < 0, 0)  # (R, T)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(rows)[new]
    place = new.flatten().nonzero()[:, 0]
    parent = node.flatten()[place - (positions > 0).long()]
    return PrefixTree(rows[new][None], positions[None], parent, node, row, place)


def tree_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Over a PrefixTree: query (1, heads, N, D), key and value (1, kv_heads, N, D) -> (1, N, heads, D).

    Only here are rows whole again: every node is copied to where it stands. All else in a layer is done once a node.
    """
    check_layer(module, attention_mask, sliding_window, kwargs)
    tree = kwargs["position_ids"].tree
    R, T = tree.node.shape

    def spread_out(x: Tensor) -> Tensor:  # (1, heads, N, D) -> (R, heads, T, D)
        flat = x[0].transpose(0, 1).flatten(1).index_select(0, tree.node.flatten())
        return flat.view(R, T, *x.shape[1::2]).transpose(1, 2)

    mask = None  # causal, which also keeps the padding on the right out of sight
    if sliding_window is not None:
        t = torch.arange(T, device=query.device)
        mask = (t <= t[:, None]) & (t > t[:, None] - sliding_window)
    rows = [spread_out(x) for x in (query, key, value)]
    options = {"attn_mask": mask, "is_causal": mask is None, "scale": scaling, "enable_gqa": True}
    out = F.scaled_dot_product_attention(*rows, **options).transpose(1, 2)  # (R, T, heads, D)
    return out.flatten(0, 1).index_select(0, tree.place)[None], None


AttentionInterface.register("ragged", ragged_attention)
AttentionInterface.register("prefix_tree", tree_attention)
