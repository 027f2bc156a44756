"""The forward pass of Llama-like models over the sampler's cache, written out for speed.

Decoding is a sequence of small operations, and of transformers' modules each costs some time of its own. `fuse(model)`
does without them, and on CPU with a copy of the weights that is packed once a turn, not once a step. The general path,
the model's own forward, is its test twin: `Sampler` takes this one only for models that it knows and where both agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend, ragged_mask

PACK_FROM = 2**17  # weights: oneDNN takes 50 us a call, however small
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")


class Layer(NamedTuple):
    """One block: norms map x -> x; the others are linear, x -> one output for each of the weights joined in them."""

    norm1: Callable
    qkv: Callable
    q_norm: Callable
    k_norm: Callable
    out: Callable
    norm2: Callable
    gate_up: Callable
    down: Callable


def fusable(model) -> bool:
    """A known model with full attention, all of it as transformers builds it: no adapter, wrapper, patch or hook."""
    config, family = model.config, type(model).__name__.removesuffix("ForCausalLM")
    kinds = getattr(config, "layer_types", None) or ()
    windowed = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None))
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if family not in FAMILIES or windowed or rope in ("dynamic", "longrope") or config.hidden_act != "silu":
        return False
    names = {family + part for part in PARTS} | {"SiLUActivation"}
    for m in model.modules():
        stock = type(m).__module__.startswith("transformers.") and type(m).__name__ in names
        touched = m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
        if touched or not (stock or type(m) in (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)):
            return False
    return True


def _packs(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or weight.numel() < PACK_FROM:
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or half


def _linear(*layers: nn.Linear) -> Callable:
    """x -> the outputs of several linear layers that have the same input."""
    if layers[0].weight.device.type != "cpu":  # no copy of the weights there: a captured graph has no overhead to save
        return lambda x: [F.linear(x, layer.weight, layer.bias) for layer in layers]
    weight, sizes = torch.cat([layer.weight for layer in layers]), [layer.out_features for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    if not _packs(weight):
        return lambda x: F.linear(x, weight, bias).split(sizes, -1)
    # oneDNN's packed layout: 1.5 to 2.3 times faster for 1 to 128 rows of SmolLM2-135M.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)  # laid out for many rows, it is no worse for few
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "").split(sizes, -1)


def _norm(module) -> Callable:
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _layer(block) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    q_norm, k_norm = (_norm(m) if (m := getattr(attention, n, None)) else lambda x: x for n in ("q_norm", "k_norm"))
    return Layer(
        _norm(block.input_layernorm),
        _linear(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm,
        k_norm,
        _linear(attention.o_proj),
        _norm(block.post_attention_layernorm),
        _linear(mlp.gate_proj, mlp.up_proj),
        _linear(mlp.down_proj),
    )


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Each half of x (..., D) turned against the other; the sine of the left half comes negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


@torch.no_grad()
def fuse(model) -> Callable:
    """forward(cache, ids (n, Q), positions (n, Q)) -> logits of the last position (n, V), with the weights of now."""
    decoder, config = model.get_decoder(), model.config
    layers, head, norm = [_layer(b) for b in decoder.layers], _linear(model.lm_head), _norm(decoder.norm)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scale = decoder.layers[0].self_attn.scaling

    def forward(cache, ids: Tensor, positions: Tensor) -> Tensor:
        n, Q = ids.shape
        x = decoder.embed_tokens(ids)  # (n, Q, H)
        cos, sin = (t[:, :, None] for t in decoder.rotary_emb(x, positions))  # (n, Q, 1, D)
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), -1)
        mask = ragged_mask(positions, cache.width, heads // kv_heads, None, x.dtype)
        for i, layer in enumerate(layers):
            q, k, v = (t.view(n, Q, -1, cos.shape[-1]) for t in layer.qkv(layer.norm1(x)))  # (n, Q, heads, D)
            q, k = _rotate(layer.q_norm(q), cos, sin), _rotate(layer.k_norm(k), cos, sin)
            key, value = cache.update(k.transpose(1, 2), v.transpose(1, 2), i)
            out = attend(q.transpose(1, 2), key, value, mask, scale, cache.spans).flatten(2)  # (n, Q, heads * D)
            x = x + layer.out(out)[0]
            gate, up = layer.gate_up(layer.norm2(x))
            x = x + layer.down(F.silu(gate) * up)[0]
        return head(norm(x[:, -1]))[0]

    return forward
