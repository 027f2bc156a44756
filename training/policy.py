"""Scoring and updating the policy, be it in one place or spread over many processes.

Letters of shapes: B rows of this rank, T their longest; b rows of a micro-batch, t their longest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loss import Scores, policy_loss
from training import distributed
from training.scorer import Scorer

# Nats a token under which a KL moves nothing by itself. AdamW divides by the gradient's own size,
# so its steps are whole ones, of size lr, of rounding noise and of old momentum too; a KL that is
# less than what such a step makes can only grow by it. Measured: 0 while policy and reference are
# the same, up to 2e-8 in float32 where they differ in a last bit; one real step makes 7e-4
# (models/tiny, lr 1.5e-4), or 1e-3 (SmolLM2-135M, lr 5e-6).
KL_FLOOR = 1e-4
IS_CAP = 2.0  # of importance weights where sampler and scorer compute in bfloat16


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row indices (b,), cut so that b * t stays within the budget; each row is in exactly one.

    lengths: (B,), tokens of each row; one that is longer than the budget is alone. In order, not by
    length, since neighbours are siblings that share their prefix; padding costs attention only.
    """
    batches, start, longest = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > token_budget:
            batches.append(torch.arange(start, row))
            start, longest = row, length
    return [*batches, torch.arange(start, len(lengths))] if len(lengths) else []


class Batch(NamedTuple):
    """What an algorithm makes of one step's rollout: all that the update needs of this rank's rows.

    advantages, kl_coef: (B, T) float32, one for every sampled token, 0 elsewhere
    denominator:         what the loss is divided by, counted over the whole batch, of all ranks
    figures:             the step's own metrics, each a number that joins its line of metrics.jsonl;
                         `reward` among them decides which model is kept
    held:                (B, T) bool or None: tokens of the prompt that get a KL and nothing else
    rewards:             (B, turns) for the page of rollouts, which marks by it what is right (1);
                         NaN: nobody judges this turn. None: nobody judges any
    """

    rollout: object
    advantages: Tensor
    kl_coef: Tensor
    denominator: float
    figures: dict
    held: Tensor | None = None
    rewards: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """(B, T) bool: the tokens that the loss is about, those sampled and those held."""
        mask = self.rollout.action_mask
        return mask if self.held is None else mask | self.held


def is_cap(config) -> float | None:
    """Where importance weights are cut off (`loss.importance_weights`); None: there are none."""
    if config.is_cap is None:
        return None if distributed.compute_dtype(config) == torch.float32 else IS_CAP
    return config.is_cap or None


def accumulate_gradients(
    scorer: Scorer, batch: Batch, config, old_logprobs: Tensor | None = None
) -> tuple[Scores, float]:
    """Adds the gradient of `policy_loss` over all rows of a batch: (detached scores, the loss).

    old_logprobs: (B, T) of the policy that the ratio is clipped against; None: of this very one.
    Scores are (B, T) each; of the one sum that is the loss this is the rank's part.
    """
    rollout, loss = batch.rollout, 0.0
    kept = [torch.zeros_like(rollout.logprobs) for _ in Scores._fields]  # (B, T) each
    per_token = (batch.scored, rollout.turn, batch.advantages, batch.kl_coef, rollout.logprobs)
    cap = is_cap(config)
    pieces = micro_batches(rollout.lengths, config.token_budget)
    idle = max(distributed.exchange(len(pieces))) - len(pieces)
    for rows in pieces:
        cut = int(rollout.lengths[rows].max())
        ids = rollout.ids[rows, :cut]
        mask, turn, advantages, kl_coef, mu = (x[rows, :cut] for x in per_token)  # (b, t) each
        old = None if old_logprobs is None else old_logprobs[rows, :cut]
        how = {"kl_kind": config.kl, "old_logprobs": old, "clip": config.clip}
        how |= {"sampler_logprobs": mu, "is_cap": cap}
        scores = scorer(ids, mask, config.temperature)  # (b, t) each, with their graph
        part = policy_loss(scores, advantages, kl_coef, mask, turn, batch.denominator, **how)
        part.backward()  # frees the graph: of one micro-batch at a time
        loss += part.detach()
        for all_rows, some in zip(kept, scores, strict=True):
            all_rows[rows, :cut] = some.detach().to(all_rows)
    for _ in range(idle):  # another rank has more, and weights are gathered by all ranks or none
        token = torch.tensor([[False, True]], device=rollout.ids.device)
        (0 * scorer(token.long(), token).logprobs.sum()).backward()
    return Scores(*kept), float(loss)


class Update(NamedTuple):
    """What `update` did.

    scores: before the first step, (B, T) each
    norm:   of the last gradient, before it was clipped
    wrong:  what was not finite, by name; then that step was not made, and no other after it
    idle:   nothing was there to learn from, so no step was made, not of the momentum either
    """

    scores: Scores
    norm: float
    wrong: list[str]
    idle: bool


def update(scorer: Scorer, optimizer, batch: Batch, config) -> Update:
    """One on-policy step on the batch, or `config.epochs` of them, or none."""
    before = None
    for _ in range(config.epochs):
        old_logprobs = None if before is None else before.logprobs  # (B, T)
        scores, loss = accumulate_gradients(scorer, batch, config, old_logprobs)
        if before is None:
            before, idle = scores, not teaches(batch, scores)
        wrong = not_finite(batch, loss)
        wanted = not (wrong or idle)
        norm = apply_gradients(scorer.trained, optimizer, config.max_grad_norm, wanted)
        wrong += [] if math.isfinite(norm) else ["gradient"]
        if wrong or idle:
            break
    return Update(before, norm, wrong, idle and not wrong)


def teaches(batch: Batch, scores: Scores) -> bool:
    """Whether there is an advantage, or a KL that moves by itself, on any rank."""
    kl = scores.kl[batch.scored & (batch.kl_coef > 0)].double()
    mine = bool(batch.advantages[batch.scored].any()), float(kl.sum()), len(kl)
    advantage, nats, tokens = zip(*distributed.exchange(mine), strict=True)
    return any(advantage) or sum(nats) > KL_FLOOR * sum(tokens)


def not_finite(batch: Batch, loss: float) -> list[str]:
    """What is NaN or infinite on any rank; the same list on all of them."""
    parts = {
        "reward": [x for x in batch.figures.values() if isinstance(x, float)],
        "log-probs of the sampler": batch.rollout.logprobs,
        "advantages": batch.advantages,
        "loss": [loss],
    }
    local = [name for name, values in parts.items() if not torch.as_tensor(values).isfinite().all()]
    found = {name for names in distributed.exchange(local) for name in names}
    return [name for name in parts if name in found]


def finite_weights(model) -> bool:
    """Of all ranks."""
    parts = (p.to_local() if distributed.is_sharded(p) else p for p in model.parameters())
    return all(distributed.exchange(all(bool(part.isfinite().all()) for part in parts)))


def apply_gradients(model, optimizer, max_norm: float, wanted: bool = True) -> float:
    """Clips, steps if `wanted`, clears. Returns the gradient's norm before it was clipped.

    Where that is not finite, no step is made either.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(norm.full_tensor() if distributed.is_sharded(norm) else norm)
    if wanted and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_lr(optimizer, peak: float, step: int, steps: int, warmup: int, schedule: str) -> None:
    """Linear warm-up over `warmup` steps, then `constant`, or `cosine` to zero at `steps`."""
    scale = min(1.0, (step + 1) / max(1, warmup))
    if schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    for group in optimizer.param_groups:
        group["lr"] = peak * scale
