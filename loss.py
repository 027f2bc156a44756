"""The loss: pure tensor functions, no model, no I/O.

An algorithm hands over one advantage and one KL weight for every sampled token; everything else is
the same for all of them. Shapes: B rows, T positions, M sampled tokens of a micro-batch, H hidden
size, V vocabulary, N groups of G.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BASELINES = ("none", "leave_one_out", "group_mean")
KL_KINDS = ("exact", "token", "k1", "k2", "k3")
OVER_THE_VOCABULARY = ("exact", "token")  # the others are known from the sampled token alone


class Scores(NamedTuple):
    """What the scorer says of every sampled token; float32, 0 where nothing was sampled.

    logprobs:     (B, T) log pi(token), the only one but `kl` that carries a gradient
    ref_logprobs: (B, T) log pi_ref(token); without a reference the policy is its own
    kl:           (B, T) KL(pi || pi_ref) at this position, exact over the vocabulary, with gradient
    entropy:      (B, T) of pi at this position
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    entropy: Tensor


class _Float32Product(torch.autograd.Function):
    """What torch has no gradient for: x @ head.T of 16-bit floats, added up and kept in float32."""

    @staticmethod
    def forward(ctx, x, head):
        ctx.save_for_backward(x, head)
        if x.is_cuda:
            return torch.mm(x, head.T, out_dtype=torch.float32)
        out, x = torch.empty(len(x), len(head), device=x.device), x.float()
        # A float32 copy of the whole head would take new pages, which cost more than the product.
        copy = x.new_empty(max(1, 2**20 // head.shape[1]), head.shape[1])
        for rows, made in zip(head.split(len(copy)), out.split(len(copy), dim=1), strict=True):
            torch.mm(x, copy[: len(rows)].copy_(rows).T, out=made)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, head = ctx.saved_tensors
        grad = grad.to(head.dtype)  # rounded as every gradient is: only logits need more, to differ
        wanted = ctx.needs_input_grad  # a frozen head's is not
        return grad @ head if wanted[0] else None, grad.T @ x if wanted[1] else None


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """Hidden states (n, H) and the output weights (V, H) -> logits (n, V), float32 at least.

    In bfloat16 logits from 16 to 32 would be whole eighths, before any of them is compared.
    """
    return _Float32Product.apply(hidden, head) if head.dtype.itemsize == 2 else hidden @ head.T


def logits_at_once(device: torch.device) -> int:
    """How many logits `token_scores` makes at a time: 2^24, on a GPU up to 2^27, as it has memory.

    About 20 bytes of each are alive (with fast/'s kernels 12), for which this takes at most a 25th
    of a GPU's memory: 2^25 of 24 GB, 2^27 of 80. With 152,000 words 2^24 are 110 tokens, whose
    products would wait for the head's weights, and the head's gradient would be rounded, in
    bfloat16, once more every 110.
    """
    if device.type != "cuda":
        return 2**24  # more is no faster there
    fits = torch.cuda.get_device_properties(device).total_memory // (25 * 20)
    return min(2**27, max(2**24, 2 ** (fits.bit_length() - 1)))


@cache
def compiled(function):
    """By torch.compile, for any sizes; each function once."""
    return torch.compile(function, dynamic=True)


@contextmanager
def compiling():
    """Around what `compiled` gave: new kinds of input are compiled, and none is mistaken."""
    from torch._dynamo import config  # takes a second

    # eight kinds by default, then it would run uncompiled; and hooks (adapters) would not count
    with config.patch(recompile_limit=64, skip_nnmodule_hook_guards=False):
        yield


def token_scores(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    score: Callable | None = None,
) -> Scores:
    """Scores of M tokens from the hidden states that predict them, never holding (M, V) logits.

    hidden, ref_hidden (M, H); head, ref_head (V, H); tokens (M,) int64. `chunk` tokens at a time
    (by default what `logits_at_once` allows), and each chunk's logits are computed again in the
    backward pass: so memory grows with the chunk only. Both distributions are taken at the sampling
    `temperature`. Without a reference the policy is its own: ref_logprobs are its log-probs, held
    fixed, and kl is zero, so that every KL term is zero too, and so is its gradient. `score` may
    take the place of `scoring()`, for speed.
    """
    chunk = chunk or max(1, logits_at_once(hidden.device) // len(head))
    score, parts = partial(score or scoring(), head, ref_head, temperature), []
    for start in range(0, len(tokens), chunk):
        piece = slice(start, start + chunk)
        reference = None if ref_hidden is None else ref_hidden[piece]
        parts.append(score(hidden[piece], tokens[piece], reference))
    return Scores(*(torch.cat(columns)[:, 0] for columns in zip(*parts, strict=True)))


def scoring(compile: bool = False) -> Callable:
    """`_score`, run once more for the gradient, so that it keeps no logits."""
    return partial(checkpoint, compiled(_score) if compile else _score, use_reentrant=False)


def _score(head, ref_head, temperature: float, hidden, tokens, ref_hidden) -> tuple[Tensor, ...]:
    """Of a chunk of n tokens what `Scores` has, each (n, 1), by all logits (n, V) at once."""

    def log_softmax(hidden, head):  # (chunk, V)
        logits = logits_of(hidden, head)
        return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)

    logp = log_softmax(hidden, head)
    logprobs, p = logp.gather(-1, tokens[:, None]), logp.exp()
    with torch.no_grad():
        entropy = -(p * logp).sum(-1, keepdim=True)
        if ref_hidden is None:
            return logprobs, logprobs.detach(), torch.zeros_like(logprobs), entropy
        ref_logp = log_softmax(ref_hidden, ref_head)
    kl = (p * (logp - ref_logp)).sum(-1, keepdim=True)
    return logprobs, ref_logp.gather(-1, tokens[:, None]), kl, entropy


def subtract_baseline(
    rewards: Tensor, kind: str = "leave_one_out", present: Tensor | None = None
) -> Tensor:
    """Rewards (N, G) of N groups -> advantages (N, G).

    none:          the reward itself; unbiased.
    leave_one_out: minus the mean of the *other* G - 1; unbiased (RLOO, Ahmadian et al. 2024). It
                   needs G > 1.
    group_mean:    minus the mean of all G, its own included: the gradient shrinks by (G - 1) / G.

    present (N, G) of 0 and 1 marks groups of unequal size: what is absent counts nowhere and gets
    0, and so does a single member of a group, which has nothing to be compared with.
    """
    present = torch.ones_like(rewards) if present is None else present
    if kind == "none":
        return rewards * present
    count = present.sum(dim=1, keepdim=True)
    mean = (rewards * present).sum(dim=1, keepdim=True) / count.clamp_min(1)
    centred = (rewards - mean) * present
    if kind == "group_mean":
        return centred
    if rewards.shape[1] < 2:
        raise ValueError("the leave-one-out baseline needs groups of at least 2")
    return centred * count / (count - 1).clamp_min(1)


def deviation(values: Tensor, dim: int | None = None, present: Tensor | None = None) -> Tensor:
    """Their standard deviation over `dim` (default: all), which stays, with size 1.

    0 where there is none but rounding; what is absent (present 0) counts nowhere.
    """
    present = torch.ones_like(values) if present is None else present
    over = {"dim": tuple(range(values.ndim)) if dim is None else dim, "keepdim": True}
    count = present.sum(**over).clamp_min(1)
    mean = (values * present).sum(**over) / count
    std = (((values - mean) * present).square().sum(**over) / count).sqrt()
    return torch.where(std > 1e-6, std, 0)


def divide_by_std(
    advantages: Tensor, dim: int | None = None, present: Tensor | None = None
) -> Tensor:
    """Divided by their standard deviation over `dim` (default: all). No variance: 0, never NaN."""
    std = deviation(advantages, dim, present)
    return torch.where(std > 0, advantages / std, 0)


def spread(per_turn: Tensor, rollout) -> Tensor:
    """(B, turns) -> (B, T): every sampled token gets its turn's value, every other token 0."""
    turn = rollout.turn.clamp_min(0)  # padding is turn -1, and no action
    return per_turn.to(turn.device).gather(1, turn) * rollout.action_mask


def later_in_turn(values: Tensor, turn: Tensor) -> Tensor:
    """Of values (B, T), at each position the sum over the later ones of the same turn (B, T)."""
    total = torch.zeros_like(values)
    for t in range(int(turn.max()) + 1):
        mine = torch.where(turn == t, values, 0)
        total += torch.where(turn == t, mine.flip(1).cumsum(1).flip(1) - mine, 0)
    return total


def kl_terms(scores: Scores, kind: str) -> tuple[Tensor, Tensor]:
    """A KL penalty (B, T): a loss a token, and a cost a token charged to those that led there.

    With L = log pi - log pi_ref of the sampled token, and the gradient that each really has in
    expectation:
    exact: loss KL_t over the vocabulary, cost KL_t charged to *earlier* tokens. The gradient of the
           sequence's KL(pi || pi_ref), as in Eq. 2-4, with less variance than k1.
    token: loss KL_t only. The gradient of each position's KL with the prefixes held fixed: it
           ignores that the policy chooses which prefixes it visits.
    k1:    cost L, charged to the token itself and earlier ones. The sequence KL's gradient, from
           samples alone. (As a loss it would have zero expected gradient.)
    k2:    loss L^2 / 2. In expectation the gradient of `token`.
    k3:    loss exp(-L) - 1 + L. Its value estimates KL(pi || pi_ref), but its gradient is that of
           the *forward* KL(pi_ref || pi) at each position.
    """
    log_ratio = scores.logprobs - scores.ref_logprobs
    zero = torch.zeros_like(log_ratio)
    if kind == "exact":
        return scores.kl, scores.kl.detach()
    if kind == "token":
        return scores.kl, zero
    if kind == "k1":
        return log_ratio.detach() * scores.logprobs, log_ratio.detach()
    if kind == "k2":
        return log_ratio.square() / 2, zero
    if kind == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio, zero
    raise ValueError(f"unknown kl '{kind}': choose one of {', '.join(KL_KINDS)}")


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap) of every sampled token (B, T), without gradient.

    mu is what a token was really drawn from, pi_old the policy that is trained, at the update's
    start. They are one policy computed twice, by sampler and scorer: alike up to rounding, which in
    bfloat16 is a tenth and more now and then. A token's term of the policy gradient, times its
    weight, is on average over mu what it would be over pi_old, up to the cap; beyond that, where
    pi_old > cap * mu, it is cap * mu / pi_old of it. The cap bounds the variance of rare tokens.

    Not corrected: that what stands before a token, and what follows it, were drawn from mu too (a
    product of all their ratios, of unbounded variance). So the expected gradient is the one of
    pi_old's choice of each token, at prefixes as mu visits them, judged by how mu goes on.

    Tokens that were not sampled here have no mu, a log-prob of 0 (`rollout_of`), and a weight of 1.
    """
    weights = torch.exp(old_logprobs - sampler_logprobs).clamp_max(cap)
    return torch.where(sampler_logprobs < 0, weights, 1).detach()


def policy_loss(
    scores: Scores,
    advantages: Tensor,
    kl_coef: Tensor,
    action_mask: Tensor,
    turn: Tensor,
    denominator: float,
    kl_kind: str = "exact",
    old_logprobs: Tensor | None = None,
    clip: float = 0.2,
    sampler_logprobs: Tensor | None = None,
    is_cap: float | None = None,
) -> Tensor:
    """Eq. 1-2: the sum over sampled tokens of -advantage * log pi + kl_coef * KL, a scalar.

    All tensors (B, T); action_mask is also True where an algorithm holds tokens by a KL that were
    sampled long ago (their advantage is 0). It is divided by one `denominator`, counted over the
    whole batch (every micro-batch and rank), so the gradient does not depend on how the batch is
    cut. Written with the ratio pi / pi_old, which is 1 in an on-policy update (old_logprobs None),
    where its gradient is REINFORCE's; in later epochs it is clipped as in PPO.

    With an is_cap, `importance_weights` multiply a token's whole credit, its blame for later KL
    included: all of that is about this token's having been drawn. k1, k2 and k3 know a position's
    KL from its token alone, so there they multiply the KL's own terms too. A KL over the vocabulary
    has drawn nothing at its position, and no weight.
    """
    old = scores.logprobs.detach() if old_logprobs is None else old_logprobs
    penalty, cost = kl_terms(scores, kl_kind)
    weights = 1 if is_cap is None else importance_weights(old, sampler_logprobs, is_cap)
    if kl_kind not in OVER_THE_VOCABULARY:
        penalty, cost = weights * penalty, weights * cost
    # a token that leads to later KL is blamed for it, as for a smaller reward
    credit = weights * (advantages - later_in_turn(kl_coef * cost * action_mask, turn))
    ratio = torch.exp(scores.logprobs - old)
    surrogate = torch.minimum(ratio * credit, ratio.clamp(1 - clip, 1 + clip) * credit)
    return ((kl_coef * penalty - surrogate) * action_mask).sum() / denominator
