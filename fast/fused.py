"""The forward pass of Llama-like models over the sampler's cache, written out for speed.

Decoding is a sequence of small operations, and of transformers' modules each costs some time of its
own. `fuse(model)` does without them, and on CPU takes the C of cpu_kernels.py for the two that cost
most. The plain path, the model's own forward, is its test twin: `Sampler` takes this one only for
models that it knows (`why_not`) and where both agree (`why_wrong`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.cpu_kernels import compiled, linear, linear_in_place, one_query
from loss import logits_of
from sampling.adapters import ALPHA
from sampling.attention import KVCache, attend, ragged_mask

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LARGE = 2**32  # bytes of weights from which on there is no second copy, for speed, of them
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")


class Layer(NamedTuple):
    """One block: norms map x -> x, the others x -> one output for each linear layer in them."""

    norm1: Callable
    qkv: Callable
    q_norm: Callable
    k_norm: Callable
    out: Callable
    norm2: Callable
    gate_up: Callable
    down: Callable


def why_not(model) -> str | None:
    """What stands against fusing a model, if anything does.

    Nothing does for a known family with full attention, all of it as transformers builds it: no
    adapter, wrapper, patch or hook.
    """
    config, family = model.config, type(model).__name__.removesuffix("ForCausalLM")
    kinds = getattr(config, "layer_types", None) or ()
    window = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None))
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if family not in FAMILIES:
        return f"{family} is not one of the families that fast/ knows: {', '.join(FAMILIES)}"
    if window:
        return "it has a sliding window"
    if rope in ("dynamic", "longrope"):
        return f"its rope type is {rope}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    stock = {family + part for part in PARTS} | {"SiLUActivation"}
    for name, m in model.named_modules():
        known = type(m).__module__.startswith("transformers.") and type(m).__name__ in stock
        if not known and type(m) not in (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU):
            return f"{name or 'the model'} is not transformers' own but of class {type(m).__name__}"
        if m._forward_hooks or m._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        if "forward" in vars(m):
            return f"the forward method of {name or 'the model'} is patched"
    return None


def relative_error(dtype: torch.dtype) -> float:
    """Of logits, up to which two ways to compute them agree."""
    return 1e-4 if dtype.itemsize > 2 else 0.05


@torch.no_grad()
def why_wrong(model, ids: Tensor, logits: Tensor) -> str | None:
    """What computes something else than the model itself, if anything does.

    Nothing does if, fed ids (1, Q) = 0, 1, ... at their own positions, and then the last one again,
    the fused path gives the model's logits (1, V).
    """

    def agrees(forward) -> bool:
        cache, errors = KVCache(1, ids.shape[1], ids.device), []
        for positions in (ids, ids[:, -1:].clone()):
            cache.aim(0, positions, [ids.shape[1]])
            errors.append((forward(cache, positions, positions) - logits).abs().max())
        bound = relative_error(model.dtype) * logits.abs().max()
        return bool(torch.stack(errors).max() < bound)  # False for a NaN too

    if agrees(fuse(model)):
        return None
    if takes_c(model) and agrees(fuse(model, c=False)):
        return "the C of fast/cpu_kernels.c computes something else than torch on this machine"
    return "the fast path of fast/fused.py computes something else than the model itself"


def _adapted_linear(in_c, adapters: dict, *layers: nn.Linear) -> Callable:
    """`_linear`, and what the layers' adapters add, if they have any: two products for all."""
    plain, own = _linear(in_c, *layers), [adapters[layer] for layer in layers if adapters]
    if not own:
        return plain
    dtype = layers[0].weight.dtype
    A = torch.cat([adapter.A for adapter in own]).to(dtype)  # (r of all, in)
    B = torch.block_diag(*(adapter.B * (ALPHA / len(adapter.A)) for adapter in own)).to(dtype)
    sizes = [layer.out_features for layer in layers]

    def forward(x):
        added = F.linear(F.linear(x, A), B).split(sizes, -1)
        return [y.add_(more) for y, more in zip(plain(x), added, strict=True)]

    return forward


def _linear(in_c, *layers: nn.Linear) -> Callable:
    """x -> the outputs of several linear layers that have the same input. in_c: of `_in_c`."""
    if in_c:
        return in_c(layers)
    return lambda x: [F.linear(x, layer.weight, layer.bias) for layer in layers]


def _in_c(model, library) -> Callable:
    """What makes such a function of layers of this model by the C of cpu_kernels.py.

    Of small models it copies the weights, all layers of an input as one.
    """

    def joined(layers):
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        product = linear(library, torch.cat([layer.weight for layer in layers]), bias)
        sizes = [layer.out_features for layer in layers]
        return lambda x: product(x).split(sizes, -1)

    def in_place(layers):
        products = [linear_in_place(library, layer.weight, layer.bias) for layer in layers]
        return lambda x: [product(x) for product in products]

    size = sum(parameter.nbytes for parameter in model.parameters())
    return in_place if size > LARGE else joined


def head_of(in_c, layer: nn.Linear) -> Callable:
    """x (n, H) -> logits (n, V), float32."""
    if in_c:
        product = _linear(in_c, layer)
        return lambda x: product(x)[0]
    if layer.bias is None:
        return lambda x: logits_of(x, layer.weight)
    return lambda x: logits_of(x, layer.weight) + layer.bias


def _norm(module) -> Callable:
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _layer(in_c, adapters: dict, block) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    joined = partial(_adapted_linear, in_c, adapters)
    inner = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3 has them
    q_norm, k_norm = (_norm(m) if m else lambda x: x for m in inner)
    return Layer(
        norm1=_norm(block.input_layernorm),
        qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=q_norm,
        k_norm=k_norm,
        out=joined(attention.o_proj),
        norm2=_norm(block.post_attention_layernorm),
        gate_up=joined(mlp.gate_proj, mlp.up_proj),
        down=joined(mlp.down_proj),
    )


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Each half of x (..., D) turned against the other; the left half's sine comes negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _attention(cache, cos, sin, mask, scale, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (n, Q, heads, D), k and v (n, Q, kv_heads, D) -> (n, Q, heads * D).

    cos and sin of the angles (n, Q, 1, D), the sine as `_rotate` wants it.
    """
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    key, value = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    return attend(q.transpose(1, 2), key, value, mask, scale, cache.spans).flatten(2)


def takes_c(model) -> bool:
    """Whether the C of cpu_kernels.py, which is float32's alone, is for this model."""
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def fuse(model, adapters=None, c: bool = True) -> Callable:
    """forward(cache, ids (n, Q), positions (n, Q)) -> logits of the last position (n, V).

    With the weights of now, and with `adapters` (sampling/adapters.py); `c` allows the C of
    cpu_kernels.py, where it is for this model.
    """
    decoder, config = model.get_decoder(), model.config
    group = config.num_attention_heads // config.num_key_value_heads
    size, scale = decoder.layers[0].self_attn.head_dim, decoder.layers[0].self_attn.scaling
    library = compiled(group, size) if c and takes_c(model) else None
    in_c = _in_c(model, library) if library else None
    own = {} if adapters is None else adapters.by_layer(model)
    layers = [_layer(in_c, own, block) for block in decoder.layers]
    head, norm = head_of(in_c, model.lm_head), _norm(decoder.norm)

    def forward(cache, ids: Tensor, positions: Tensor) -> Tensor:
        n, Q = ids.shape
        x = decoder.embed_tokens(ids)  # (n, Q, H)
        cos, sin = decoder.rotary_emb(x, positions)  # (n, Q, D)
        if library and Q == 1:
            attention = partial(one_query, library, cache, cos, sin, positions, scale)
        else:
            left, right = sin[:, :, None].chunk(2, -1)
            signed = torch.cat((-left, right), -1)
            mask = ragged_mask(positions, cache.width, group, None, x.dtype)
            attention = partial(_attention, cache, cos[:, :, None], signed, mask, scale)
        for i, layer in enumerate(layers):
            q, k, v = (t.view(n, Q, -1, size) for t in layer.qkv(layer.norm1(x)))
            x = x + layer.out(attention(i, layer.q_norm(q), layer.k_norm(k), v))[0]
            gate, up = layer.gate_up(layer.norm2(x))
            x = x + layer.down(F.silu(gate) * up)[0]
        return head(norm(x[:, -1]))

    return forward
