"""A decoding step on CUDA: the kernels of cuda_kernels.py, and one product where weights can join.

The fused forward pass of fused.py stays for all that is fed at once, and is the step's twin. What a
step reads keeps its place in memory, so that a CUDA graph of it can be replayed as long as that is
so: weights where the model has them, the little that is made of adapters, and where the cache is,
in a dict that the sampler keeps.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.cuda_draw import sample
from fast.cuda_kernels import add_norm, attend, fill, gated
from fast.fused import fuse, head_of, relative_error
from sampling.adapters import ALPHA
from sampling.attention import KVCache
from sampling.draws import sample as slowly


class Step(NamedTuple):
    """One token for each of n rows, with the weights of when it was made.

    run:    (token, position, idle), (n,) each -> logits (n, V); rows that are idle neither read the
            cache nor write to it, and their logits mean nothing
    aim:    (cache): rows 0, 1, ... of this one from now on
    reads:  the addresses of all it reads but its arguments
    sample: (logits, temperature, u) -> tokens (n,), log-probs (n,)
    """

    run: Callable
    aim: Callable
    reads: tuple
    sample: Callable


class Layer(NamedTuple):
    """One block: norms are (weight, eps), the others (n, in) -> (n, out), joined where several."""

    norm1: tuple
    qkv: Callable
    q_norm: tuple | None
    k_norm: tuple | None
    out: Callable
    norm2: tuple
    gate_up: Callable
    down: Callable


def neighbours(parameters: list[Tensor]) -> Tensor:
    """One tensor of all their rows, on the memory that they have.

    Where they don't lie one behind the other they are moved, once, with the same values: a copy of
    them would take memory, and would not see what an update changes.
    """
    first, *others = [parameter.data for parameter in parameters]
    sizes, end = [len(parameter) for parameter in parameters], first.data_ptr() + first.nbytes
    for other in others:
        same = other.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and other.data_ptr() == end):
            whole = torch.cat([first, *others])
            for parameter, part in zip(parameters, whole.split(sizes), strict=True):
                parameter.data = part
            return whole
        end += other.nbytes
    return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())


def _joined(kept: dict, adapters: dict, *layers: nn.Linear) -> Callable:
    """x (n, in) -> the outputs of several linear layers side by side, with their adapters' part."""
    weight = neighbours([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else neighbours([layer.bias for layer in layers])
    if not adapters:
        return lambda x: F.linear(x, weight, bias)
    own = [adapters[layer] for layer in layers]
    up = torch.block_diag(*(adapter.B * (ALPHA / len(adapter.A)) for adapter in own))
    A = _placed(kept, (layers[0], "A"), torch.cat([adapter.A for adapter in own]).to(weight.dtype))
    B = _placed(kept, (layers[0], "B"), up.T.to(weight.dtype))  # (r of all, out of all)
    return lambda x: F.linear(x, weight, bias).addmm_(F.linear(x, A), B)


def _placed(kept: dict, key, tensor: Tensor) -> Tensor:
    """The tensor, at the place in memory that the one before of this key and shape had."""
    if key in kept and kept[key].shape == tensor.shape:
        return kept[key].copy_(tensor)
    kept[key] = tensor.contiguous()
    return kept[key]


def _norm(module) -> tuple | None:
    return module and (module.weight, module.variance_epsilon)


def _layer(joined, block) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        norm1=_norm(block.input_layernorm),
        qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=_norm(getattr(attention, "q_norm", None)),  # Qwen3 has them
        k_norm=_norm(getattr(attention, "k_norm", None)),
        out=joined(attention.o_proj),
        norm2=_norm(block.post_attention_layernorm),
        gate_up=joined(mlp.gate_proj, mlp.up_proj),
        down=joined(mlp.down_proj),
    )


def _normed(x: Tensor, norm: tuple | None) -> Tensor:
    return x if norm is None else F.rms_norm(x, norm[0].shape, *norm)


@torch.no_grad()
def step_of(model, adapters, kept: dict) -> Step:
    """Of a model that fused.py knows (`why_not`). kept: the sampler's, for nothing else."""
    decoder, config = model.get_decoder(), model.config
    scale, size = decoder.layers[0].self_attn.scaling, decoder.layers[0].self_attn.head_dim
    own = {} if adapters is None else adapters.by_layer(model)
    layers = [_layer(partial(_joined, kept, own), block) for block in decoder.layers]
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    norms = [layer.norm1 for layer in layers[1:]] + [_norm(decoder.norm)]  # what follows a block
    head, like = head_of(None, model.lm_head), model.lm_head.weight.new_empty(1, heads[1], 1, size)
    if "table" not in kept:
        kept["table"] = torch.zeros(2 * len(layers) + 1, dtype=torch.int64, device=model.device)
    table = kept["table"]

    def aim(cache: KVCache) -> None:
        for layer in range(len(layers)):
            cache.stores(layer, like, like)  # there may be none yet
        fill(table, cache)

    def run(token: Tensor, position: Tensor, idle: Tensor) -> Tensor:
        x = decoder.embed_tokens(token)  # (n, H)
        cos, sin = (t[:, 0] for t in decoder.rotary_emb(x[:, None], position[:, None]))  # (n, D)
        h = _normed(x, layers[0].norm1)
        for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            qkv = layer.qkv(h).view(len(x), -1, size).split(heads, 1)
            q, k, v = map(_normed, qkv, (layer.q_norm, layer.k_norm, None))
            seen = attend(table, i, q, k, v, cos, sin, position, idle, scale)
            h = add_norm(x, layer.out(seen), *layer.norm2)
            h = add_norm(x, layer.down(gated(layer.gate_up(h))), *norm)
        return head(h)

    tensors = [*model.parameters(), *model.buffers(), *kept.values()]
    return Step(run, aim, (adapters is None, *(tensor.data_ptr() for tensor in tensors)), sample)


@torch.no_grad()
def error_of(model, ids: Tensor, logits: Tensor) -> float:
    """How far a step's logits are off, by the largest logit; whatever Triton raises.

    It feeds ids (1, Q) = 0, 1, ... at their own positions by the fused forward pass, and then the
    last one again, which should give the model's logits (1, V).
    """
    cache, last = KVCache(1, ids.shape[1], ids.device), ids[0, -1:]
    cache.aim(0, ids, [ids.shape[1]])
    fuse(model)(cache, ids, ids)
    step = step_of(model, None, {})
    step.aim(cache)
    own = step.run(last, last.clone(), torch.zeros_like(last, dtype=torch.bool))
    return float((own - logits).abs().max() / logits.abs().max())


def draws_alike(logits: Tensor) -> bool:
    """Whether the kernels draw from logits (1, V) what torch's operations do, and as likely."""
    u = (torch.arange(16, device=logits.device) + 0.5) / 16
    for temperature in (0, 0.7):
        (tokens, logprobs), right = (
            f(logits.repeat(16, 1), temperature, u) for f in (sample, slowly)
        )
        same = tokens == right[0]  # rounding may tip one
        if same.sum() < 15 or not ((logprobs - right[1]).abs()[same] < 1e-3).all():
            return False
    return True


def why_wrong(model, ids: Tensor, logits: Tensor) -> str | None:
    """What is wrong with a step of this model here, if anything is. ids, logits: of `error_of`."""
    try:
        if not error_of(model, ids, logits) < relative_error(model.dtype):  # a NaN is not
            return "fast/cuda_kernels.py computes something else than the model itself"
        if not draws_alike(logits):
            return "fast/cuda_draw.py draws something else than sampling/draws.py"
    except Exception as reason:  # of Triton's many kinds, and all that is lost is speed
        return f"a kernel of fast/ for CUDA fails: {type(reason).__name__}: {reason}"[:500]
    return None
