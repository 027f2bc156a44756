"""What the loss needs of all logits on CUDA, as two Triton kernels: the twin of loss.py's `_score`.

Logits are as many as tokens times words, and what is done to them between two products is bound by
memory: torch's operations read and write them some seventy times an update, a fifth of its time for
a model of 1.5B. Here they are read once each way, and their gradient is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loss import logits_of

BLOCK = 1024  # words at a time


@triton.jit
def _summed(most, total):
    """log of the sum of exp over all lanes, of which each has (most, total * exp(most))."""
    top = tl.max(most, 0)
    return top + tl.log(tl.sum(total * tl.exp(most - top), 0))


@triton.jit
def _score_row(
    logits, ref_logits, tokens, out, count, temperature, V, REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row, in one pass, out (6, count): log-prob, the reference's, KL, entropy, both norms.

    Each lane has sums of its own, multiplied by exp(most - higher) when its most grows to higher,
    and they are added up at the end. With x and y the logits of policy and reference, and norms
    log sum exp: KL = E[x - y] - (norm - ref_norm), entropy = norm - E[x].
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    means, apart, ref_most, ref_total = total, total, most, total
    for start in range(0, V, BLOCK):
        real = start + lane < V
        at = row * V + start + lane
        x = tl.load(logits + at, mask=real, other=-float("inf")) / temperature
        higher = tl.maximum(most, x)
        keep, e = tl.exp(most - higher), tl.exp(x - higher)
        total, most = total * keep + e, higher
        means = means * keep + tl.where(real, e * x, 0.0)
        if REFERENCE:
            y = tl.load(ref_logits + at, mask=real, other=-float("inf")) / temperature
            apart = apart * keep + tl.where(real, e * (x - y), 0.0)
            higher = tl.maximum(ref_most, y)
            ref_total = ref_total * tl.exp(ref_most - higher) + tl.exp(y - higher)
            ref_most = higher
    norm = _summed(most, total)
    share = tl.exp(most - norm)
    entropy = norm - tl.sum(means * share, 0)
    token = tl.load(tokens + row)
    logprob = tl.load(logits + row * V + token) / temperature - norm
    ref_norm, ref_logprob, kl = norm, logprob, 0.0
    if REFERENCE:
        ref_norm = _summed(ref_most, ref_total)
        ref_logprob = tl.load(ref_logits + row * V + token) / temperature - ref_norm
        kl = tl.sum(apart * share, 0) - (norm - ref_norm)
    tl.store(out + row, logprob)
    tl.store(out + count + row, ref_logprob)
    tl.store(out + 2 * count + row, kl)
    tl.store(out + 3 * count + row, entropy)
    tl.store(out + 4 * count + row, norm)
    tl.store(out + 5 * count + row, ref_norm)


@triton.jit
def _gradient(
    logits, ref_logits, tokens, out, of_logprob, of_kl, grad, count, temperature, V,
    REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d/dx = (g_logprob * (1[token] - p) + g_kl * p * (log(p / q) - KL)) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, at = word < V, row * V + word
    logp = tl.load(logits + at, mask=real, other=0.0) / temperature - tl.load(out + 4 * count + row)
    p, g = tl.exp(logp), tl.load(of_logprob + row)
    slope = tl.where(word == tl.load(tokens + row), g, 0.0) - g * p
    if REFERENCE:
        logq = tl.load(ref_logits + at, mask=real, other=0.0) / temperature
        apart = logp - (logq - tl.load(out + 5 * count + row)) - tl.load(out + 2 * count + row)
        slope += tl.load(of_kl + row) * p * apart
    tl.store(grad + at, slope / temperature, mask=real)


class Score(torch.autograd.Function):
    """`_score`, of which only its inputs are kept: logits are made again for the gradient."""

    @staticmethod
    def forward(ctx, head, ref_head, temperature, hidden, tokens, ref_hidden):
        x, y = _both_logits(head, ref_head, hidden, ref_hidden)
        count, V = x.shape
        out = x.new_empty(6, count, dtype=torch.float32)
        sizes = {"REFERENCE": ref_hidden is not None, "BLOCK": BLOCK}
        _score_row[(count,)](x, y, tokens, out, count, temperature, V, **sizes)
        ctx.save_for_backward(head, ref_head, hidden, tokens, ref_hidden, out)
        ctx.temperature = temperature
        scores = [row[:, None].clone() for row in out[:4]]
        ctx.mark_non_differentiable(scores[1], scores[3])
        return tuple(scores)

    @staticmethod
    def backward(ctx, of_logprob, _, of_kl, __):
        head, ref_head, hidden, tokens, ref_hidden, out = ctx.saved_tensors
        x, y = _both_logits(head, ref_head, hidden, ref_hidden)
        count, V = x.shape
        grad = torch.empty_like(x, dtype=head.dtype)  # rounded as every gradient is
        grid, sizes = (count, triton.cdiv(V, BLOCK)), {"REFERENCE": y is not x, "BLOCK": BLOCK}
        slopes = (of_logprob.contiguous(), of_kl.contiguous())
        _gradient[grid](x, y, tokens, out, *slopes, grad, count, ctx.temperature, V, **sizes)
        of_head = grad.T @ hidden if ctx.needs_input_grad[0] else None
        of_hidden = grad @ head if ctx.needs_input_grad[3] else None
        return of_head, None, None, of_hidden, None, None


def _both_logits(head, ref_head, hidden, ref_hidden) -> tuple[Tensor, Tensor]:
    """Of policy and reference; without one twice the same."""
    with torch.no_grad():
        x = logits_of(hidden, head)
        return x, x if ref_hidden is None else logits_of(ref_hidden, ref_head)


def score(head, ref_head, temperature: float, hidden, tokens, ref_hidden) -> tuple[Tensor, ...]:
    """As loss._score has it: hidden (n, H), head (V, H), tokens (n,) -> four of (n, 1)."""
    return Score.apply(head, ref_head, float(temperature), hidden, tokens, ref_hidden)
