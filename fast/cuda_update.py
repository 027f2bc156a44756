"""What an update does on CUDA with fewer passes over memory: its loss's logits, norms and gates.

Each is what transformers and loss.py have, in one kernel where torch launches several; a norm
rounds once, as it does when we sample. On a CPU, and with --compile (which fuses by itself) blocks
are left as they are.
"""

from contextlib import contextmanager, nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

import loss
from fast import cuda_loss
from fast.fused import FAMILIES

BLOCK = 1024  # numbers that a program multiplies


@triton.jit
def _gate(gate, up, out, size, BLOCK: tl.constexpr):
    """out = silu(gate) * up"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, g * tl.sigmoid(g) * u, mask=i < size)


@triton.jit
def _gate_gradient(gate, up, grad, of_gate, of_up, size, BLOCK: tl.constexpr):
    """Of up: grad * gate * s, s = sigmoid(gate); of gate: grad * up * s * (1 + gate (1 - s))."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    d, s = tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32), tl.sigmoid(g)
    tl.store(of_gate + i, d * u * s * (1 + g * (1 - s)), mask=i < size)
    tl.store(of_up + i, d * g * s, mask=i < size)


class Gated(torch.autograd.Function):
    """silu(gate) * up, of which only these two are kept."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out, size = torch.empty_like(gate), gate.numel()
        _gate[(triton.cdiv(size, BLOCK),)](gate, up, out, size, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        of_gate, of_up, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        grid = (triton.cdiv(size, BLOCK),)
        _gate_gradient[grid](gate, up, grad.contiguous(), of_gate, of_up, size, BLOCK=BLOCK)
        return of_gate, of_up


def _mlp(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(Gated.apply(module.gate_proj(x), module.up_proj(x)))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


WAYS = {"MLP": _mlp, "RMSNorm": _norm}  # by the ends of the classes' names


@contextmanager
def blocks_fused(model):
    """Norms and gates are one kernel each, of a model of the families that fast/ knows."""
    ways = {family + part: way for family in FAMILIES for part, way in WAYS.items()}
    stock = [m for m in model.modules() if type(m).__module__.startswith("transformers.")]
    changed = [m for m in stock if type(m).__name__ in ways and "forward" not in vars(m)]
    if getattr(model.config, "hidden_act", None) != "silu":
        changed = []
    try:
        for module in changed:
            module.forward = partial(ways[type(module).__name__], module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


@cache
def why_no_score(device: torch.device) -> str | None:
    """What is wrong with cuda_loss.py on this GPU, if anything is: one chunk against loss.py."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            with torch.inference_mode(False), torch.enable_grad():  # whoever asks
                fine = _scores_alike(device)
    except Exception as reason:  # of Triton's many kinds, and all that is lost is speed
        return f"fast/cuda_loss.py fails: {type(reason).__name__}: {reason}"[:500]
    return None if fine else "fast/cuda_loss.py computes something else than loss.py"


def _scores_alike(device: torch.device) -> bool:
    """Whether scores and gradients of a chunk are those that loss.py has."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, device=device, generator=generator)
    hidden, head, other = random(5, 16), random(3000, 16), random(3000, 16)
    tokens, weight = torch.arange(5, device=device) * 700, random(4, 5, 1)

    def both_ways(score):
        mine = [x.clone().requires_grad_() for x in (hidden, head)]
        scores = score(mine[1], other, 0.7, mine[0], tokens, hidden)
        (scores[0] * weight[0] + scores[2] * weight[2]).sum().backward()
        return [*scores, *(x.grad for x in mine)]

    pairs = zip(both_ways(cuda_loss.score), both_ways(loss._score), strict=True)
    return all(torch.allclose(ours, right, rtol=1e-3, atol=1e-3) for ours, right in pairs)
