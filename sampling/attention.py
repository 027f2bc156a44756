"""Attention of our own, put under a transformers model of standard attention for a while.

`attention_is(model, name)` switches it on; a layer then hands over its queries, keys and values,
and `position_ids` say where they stand. This file has the switch, the check that a layer asks for
nothing we ignore, the sampler's cache and its attention over it, "ragged"; the scorer's,
"prefix_tree", is in training/scorer.py.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Our attention functions by name. transformers gets to know them when one is first switched on: to
# import it takes seconds, which --help and a misspelt flag should not.
OURS = {}

# Whether torch may take cuDNN's attention on CUDA. It makes a plan for each new shape first, which
# is said to take 25 to 1,000 ms; and here almost every call has a new one.
CUDNN = False


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_layer(module, attention_mask, window, kwargs) -> None:
    """ValueError if a layer asks for what our attention can't do; what is unknown is refused."""
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
    """All layers use the attention function OURS[name]; afterwards what they used before."""
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(name, OURS[name])
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    configs = {id(m.config): m.config for m in parts}.values()
    before = [(config, config._attn_implementation) for config in configs]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(CUDNN)
    try:
        for config, _ in before:  # the public setter would also overwrite nested configs
            config._attn_implementation_internal = name
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def head_is(model, product):
    """A linear head of 16-bit floats computes product(hidden (n, H), weights (V, H)) instead."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype.itemsize > 2 or "forward" in vars(head):
        yield
        return

    def forward(hidden):
        logits = product(hidden.flatten(0, -2), head.weight).view(*hidden.shape[:-1], -1)
        return logits if head.bias is None else logits + head.bias

    try:
        head.forward = forward
        yield
    finally:
        del head.forward


@contextmanager
def sampling_mode(model):
    """Evaluation mode, no gradients, ragged attention, the model's GPU; afterwards as it was."""
    training = [m for m in model.modules() if m.training]
    cuda = model.device.type == "cuda"
    here = torch.cuda.device(model.device) if cuda else nullcontext()  # where kernels start
    try:
        model.eval()
        # no_grad, since inference_mode's tensors can't enter a loss later
        with attention_is(model, "ragged"), torch.no_grad(), here:
            yield
    finally:
        for module in training:
            module.training = True


def room_for(tokens: int, limit: int) -> int:
    """How many slots rows get of which the longest needs `tokens` now and `limit` at most.

    A quarter more than it needs, since a cache that grows is copied; and 64, not to do so for
    short rows.
    """
    return min(max(tokens + tokens // 4, tokens + 64), limit)


class KVCache:
    """Keys and values of all rows, (rows, kv_heads, capacity, D) a layer, as past_key_values.

    One block of memory a layer, in which each row has `capacity` slots. `grow` makes it larger.
    """

    def __init__(self, rows, capacity, device, owner=None):
        self.capacity = -(-capacity // 8) * 8  # multiples of 8, as attention kernels like them
        self.slots = torch.arange(rows, device=device)  # (B,) where each row of the rollout lives
        self.layers = {}
        self.owner = owner  # the model whose keys and values they are: no other can go on from them

    def aim(self, first, positions, widths):
        """Write the next tokens of rows first, first + 1, ... at positions (n, Q).

        widths: how many slots to read, for each run of ceil(n / len(widths)) rows.
        """
        n, run = len(positions), -(-len(positions) // len(widths))
        row = torch.arange(first, first + n, device=positions.device)
        self.rows, self.spot = slice(first, first + n), (row[:, None], slice(None), positions)
        widths = [min(-(-width // 8) * 8, self.capacity) for width in widths]
        self.width = max(widths)
        self.spans = [(i * run, min(i * run + run, n), w) for i, w in enumerate(widths)]

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Store key and value (n, kv_heads, Q, D); these rows so far, (n, kv_heads, width, D)."""
        stores = self.stores(layer_idx, key, value)
        for store, new in zip(stores, (key, value), strict=True):
            store[self.spot] = new.transpose(1, 2)
        return tuple(store[self.rows, :, : self.width] for store in stores)

    def stores(self, layer_idx, key, value):
        """The layer's keys and values, made when it first has some (n, kv_heads, Q, D) to keep."""
        if layer_idx not in self.layers:
            empty = [self._empty(x, len(self.slots), self.capacity) for x in (key, value)]
            self.layers[layer_idx] = [store.zero_() for store in empty]
        return self.layers[layer_idx]

    @staticmethod
    def _empty(like, rows, capacity):
        return like.new_empty(rows, like.shape[1], capacity, like.shape[3])

    def get_seq_length(self, layer_idx=0):
        return 0  # models ask only to make up position ids, and ours are given

    def gather(self, slots, capacity, used, free=False):
        """A new cache whose rows are copies of the first `used` positions of `slots` (rows,).

        free: give up this one meanwhile, so that there is never more of it than a layer's keys or
        values beside the new one. It holds nothing afterwards.
        """
        new = KVCache(len(slots), capacity, slots.device, self.owner)
        for layer in [*self.layers]:
            stores = self.layers.pop(layer) if free else [*self.layers[layer]]
            new.layers[layer] = copies = []
            while stores:
                store = stores.pop(0)  # with this the one before is freed
                copy = self._empty(store, len(slots), new.capacity)
                torch.index_select(store[:, :, :used], 0, slots, out=copy[:, :, :used])
                copy[:, :, used:] = 0  # or else 0 * NaN would leak through a masked slot
                copies.append(copy)
        return new

    def grow(self, capacity, used):
        """More slots for every row; of those that are there the first `used` count."""
        same = torch.arange(len(self.slots), device=self.slots.device)
        new = self.gather(same, capacity, used, free=True)
        self.layers, self.capacity = new.layers, new.capacity

    def move(self, before, after, used):
        """Reorder rows: slot s held row before[s] and shall hold row after[s] (host lists)."""
        moves = [(slot, before.index(row)) for slot, row in enumerate(after) if before[slot] != row]
        if moves:
            target, source = torch.tensor(moves, device=self.slots.device).T
            for store in (s for stores in self.layers.values() for s in stores):
                store[target, :, :used] = store[source, :, :used]


def ragged_mask(positions: Tensor, width: int, heads: int, window: int | None, dtype) -> Tensor:
    """What queries at positions (n, Q) see of slots [0, width): (n, 1, heads * Q, width), to add.

    Slot j iff j <= position and within the window: since every row begins at slot 0, no padding has
    to be left out. The same for each of the `heads` that share a key-value head.
    """
    slot, position = torch.arange(width, device=positions.device), positions[:, :, None]
    hidden = slot > position  # (n, Q, width)
    if window is not None:
        hidden |= slot <= position - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).repeat(1, heads, 1)[:, None]


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention as it is written: on CPU, for one position, faster than a kernel made for many.

    The long side of a product comes first: keys times queries takes two thirds of the time of
    queries times keys.
    """
    return torch.add(mask, (key @ query.mT).mT, alpha=scale).softmax(-1) @ value


def _many_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, spans) -> Tensor:
    """query (n, heads, Q, D), key and value (n, kv_heads, K, D) -> (n, Q, heads, D).

    mask: of `ragged_mask`; spans: (first row, end, width) of neighbours in length, which need not
    read the cache as far as the longest row.
    """
    # Heads that share a KV head become queries of it: no expanded copy of it, and any kernel will
    # do. (n, kv_heads, heads / kv_heads * Q, D)
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    single = query.shape[2] == 1 and query.device.type == "cpu" and query.dtype == torch.float32
    kernel, parts = _one_query if single else _many_queries, []
    for a, b, width in spans:
        rows = (folded[a:b], key[a:b, :, :width], value[a:b, :, :width], mask[a:b, ..., :width])
        parts.append(kernel(*rows, scale))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2)


def ragged_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    """Over the sampler's cache, where slot j of a row holds the token at position j."""
    check_layer(module, attention_mask, sliding_window, kwargs)
    positions, heads, width = kwargs["position_ids"], query.shape[1] // key.shape[1], key.shape[2]
    masks = positions.__dict__.setdefault("masks", {})  # shared by all layers of a forward pass
    seen = masks.get((width, sliding_window))
    if seen is None:
        seen = ragged_mask(positions, width, heads, sliding_window, query.dtype)
        masks[width, sliding_window] = seen
    return attend(query, key, value, seen, scaling, positions.spans), None


OURS["ragged"] = ragged_attention
