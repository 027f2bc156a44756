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
def _top_and_rest(most, total):
    """(top, rest): log of the sum of exp is top + rest; each lane has its most, total * exp(most).

    Apart, since their sum is rounded: the logits of a sure policy lie within that of it.
    """
    top = tl.max(most, 0)
    return top, tl.log(tl.sum(total * tl.exp(most - top), 0))


@triton.jit
def _seen(most, total, x):
    """(most, total, keep, e) with x beside what there is; keep: what sums are multiplied by."""
    higher = tl.maximum(most, x)
    keep, e = tl.exp(most - higher), tl.exp(x - higher)
    return higher, total * keep + e, keep, e


@triton.jit
def _put(out, row, count, first: tl.constexpr, a, b, c, d):
    at = out + first * count + row
    tl.store(at, a)
    tl.store(at + count, b)
    tl.store(at + 2 * count, c)
    tl.store(at + 3 * count, d)


@triton.jit
def _score_row(
    logits, ref_logits, tokens, out, count, temperature, V, REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row, in one pass, out (8, count): log-prob, the reference's, KL, entropy, both norms.

    Each lane has sums of its own, and they are added up at the end. With x and y the logits of
    policy and reference: KL = E[x - y] - (norm - ref_norm), entropy = rest - E[x - top].
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits, ref_logits = logits + row * V, ref_logits + row * V
    most, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    below, apart, ref_most, ref_total = total, total, most, total
    for start in range(0, V, BLOCK):
        i = start + lane
        x = tl.load(logits + i, mask=i < V, other=-float("inf")) / temperature
        before, had = most, total
        most, total, keep, e = _seen(most, total, x)
        below = (below + (before - most) * had) * keep + tl.where(i < V, e * (x - most), 0.0)
        if REFERENCE:
            y = tl.load(ref_logits + i, mask=i < V, other=-float("inf")) / temperature
            apart = apart * keep + tl.where(i < V, e * (x - y), 0.0)
            ref_most, ref_total, _, _ = _seen(ref_most, ref_total, y)
    top, rest = _top_and_rest(most, total)
    share = tl.exp(most - top - rest)
    entropy = rest - tl.sum((below + (most - top) * total) * share, 0)
    token = tl.load(tokens + row)
    logprob = tl.load(logits + token) / temperature - top - rest
    ref_top, ref_rest, ref_logprob, kl = top, rest, logprob, 0.0
    if REFERENCE:
        ref_top, ref_rest = _top_and_rest(ref_most, ref_total)
        ref_logprob = tl.load(ref_logits + token) / temperature - ref_top - ref_rest
        kl = tl.sum(apart * share, 0) - (top - ref_top) - (rest - ref_rest)
    _put(out, row, count, 0, logprob, ref_logprob, kl, entropy)
    _put(out, row, count, 4, top, rest, ref_top, ref_rest)


@triton.jit
def _gradient(
    logits, ref_logits, tokens, out, of_logprob, of_kl, grad, count, temperature, V,
    REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d/dx = (g_logprob * (1[token] - p) + g_kl * p * (log(p / q) - KL)) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, at, norms = word < V, row * V + word, out + 4 * count + row
    logp = tl.load(logits + at, mask=real, other=0.0) / temperature
    logp = logp - tl.load(norms) - tl.load(norms + count)
    p, g = tl.exp(logp), tl.load(of_logprob + row)
    slope = tl.where(word == tl.load(tokens + row), g, 0.0) - g * p
    if REFERENCE:
        logq = tl.load(ref_logits + at, mask=real, other=0.0) / temperature
        logq = logq - tl.load(norms + 2 * count) - tl.load(norms + 3 * count)
        slope += tl.load(of_kl + row) * p * (logp - logq - tl.load(out + 2 * count + row))
    tl.store(grad + at, slope / temperature, mask=real)


class Score(torch.autograd.Function):
    """`_score`, of which only its inputs are kept: logits are made again for the gradient."""

    @staticmethod
    def forward(ctx, head, ref_head, temperature, hidden, tokens, ref_hidden):
        x, y = _both_logits(head, ref_head, hidden, ref_hidden)
        count, V = x.shape
        out = x.new_empty(8, count, dtype=torch.float32)
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
