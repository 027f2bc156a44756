"""Expected gradients, over every batch that a small policy can sample, against the equations'.

The latter by autograd. The policy is a table: a softmax over V tokens for every prefix of two turns
of two tokens. Each possible batch is one "problem" of a huge rollout, weighted with its probability
through the advantages and KL weights, in which the loss is linear. Everything is float64; the
functions under test are the ones that train.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

import score
from loss import policy_loss, spread, token_scores

TOLERANCE = 1e-6


def make_world(V: int):
    """Logits of policy and reference at each of four positions, rewards of each y1 and (y1, y2)."""
    g = torch.Generator().manual_seed(V)
    shapes = [(V ** (2 * turn + position), V) for turn in range(2) for position in range(2)]
    policy = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    reference = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    r1 = torch.randint(2, (V**2,), generator=g).double()
    r2 = torch.randint(2, (V**2, V**2), generator=g).double()
    return SimpleNamespace(V=V, policy=policy, reference=reference, r1=r1, r2=r2)


def turn_logprobs(tables, V):
    """log p(y1): (V^2,) and log p(y2 | y1): (V^2, V^2)."""
    logp = [t.log_softmax(-1) for t in tables]
    first = (logp[0].view(V, 1) + logp[1].view(V, V)).reshape(V**2)
    second = logp[2].view(V**2, V, 1) + logp[3].view(V**2, V, V)
    return first, second.reshape(V**2, V**2)


def sequence_kl(world):
    """KL(pi || pi_ref) of whole attempts: two scalars, the second over y1, which is held fixed."""
    (p1, p2), (q1, q2) = (turn_logprobs(t, world.V) for t in (world.policy, world.reference))
    kl2 = (p2.exp() * (p2 - q2)).sum(-1)
    return (p1.exp() * (p1 - q1)).sum(), (p1.exp().detach() * kl2).sum()


def gradient(objective, world):
    gradients = torch.autograd.grad(objective, world.policy, allow_unused=False)
    return torch.cat([g.flatten() for g in gradients])


def every_batch(V, G, K):
    """Index tensors of all batches: y1 (N, G) and y2 (N, G, K)."""
    outcomes = list(itertools.product(range(V**2), repeat=G + G * K))
    chosen = torch.tensor(outcomes)
    return chosen[:, :G], chosen[:, G:].view(-1, G, K)


def estimated_gradient(world, config, stage, G, K, kl_kind="exact"):
    """Of the implemented loss, in expectation over all batches; uphill, as the objective's is."""
    y1, y2 = every_batch(world.V, G, K)
    per_turn = score.turn_advantages(world.r1[y1], world.r2[y1[..., None], y2], stage, config)
    kl_coefs = score.turn_kl_coefs(stage, config.beta2, config)
    return expected_loss_gradient(world, y1, y2, per_turn, kl_coefs, kl_kind)


def expected_loss_gradient(world, y1, y2, per_turn, kl_coefs, kl_kind="exact"):
    """Of the shared loss, with advantages for each row's turns, weighted with its probability."""
    V, (G, K) = world.V, y2.shape[1:]
    p1, p2 = (p.detach() for p in turn_logprobs(world.policy, V))
    weight = (p1[y1].sum(1) + p2[y1[..., None], y2].sum((1, 2))).exp()  # (N,)

    rows1 = y1[..., None].expand_as(y2).reshape(-1)
    rows2 = y2.reshape(-1)
    a, b, c, d = rows1 // V, rows1 % V, rows2 // V, rows2 % V
    ids = torch.stack([a * 0, a, b, a * 0, c, d], dim=1)  # prompt, y1, y1, instruction, y2, y2
    mask = torch.tensor([0, 1, 1, 0, 1, 1]).bool().expand(len(ids), 6)
    turn = torch.tensor([0, 0, 0, 1, 1, 1]).expand(len(ids), 6)
    prefixes = [a * 0, a, rows1, rows1 * V + c]

    hidden = torch.stack([t[i] for t, i in zip(world.policy, prefixes)], dim=1).view(-1, V)
    ref_hidden = torch.stack([t[i] for t, i in zip(world.reference, prefixes)], dim=1).view(-1, V)
    eye = torch.eye(V, dtype=torch.float64)
    flat = token_scores(hidden, eye, ids[mask], ref_hidden, eye, chunk=100_000)
    scores = type(flat)(*(x.new_zeros(ids.shape).masked_scatter(mask, x) for x in flat))

    rollout = SimpleNamespace(ids=ids, turn=turn, action_mask=mask)
    row_weight = weight.repeat_interleave(G * K)[:, None]
    coefs = torch.tensor(kl_coefs, dtype=torch.float64).expand(len(ids), 2)
    advantages, kl_coef = (spread(x, rollout) * row_weight for x in (per_turn, coefs))
    return gradient(-policy_loss(scores, advantages, kl_coef, mask, turn, G * K, kl_kind), world)


def exact_gradient(world, config, stage):
    """Of Eq. 3, and of Eq. 4 with the bonus.

    gamma = 0: the second turn's prompt is held fixed, as in the paper.
    """
    p1, p2 = (p.exp() for p in turn_logprobs(world.policy, world.V))
    r1, r2 = world.r1, world.r2
    kl1, kl2 = sequence_kl(world)
    second = p1.detach()[:, None] * p2
    if stage == 1:
        objective = (second * r2).sum() - config.beta2 * kl1 - config.beta1 * kl2
    else:
        shaped = r2 + config.alpha * (r2 - r1[:, None])
        objective = (p1 * r1).sum() + (second * shaped).sum() - config.beta1 * (kl1 + kl2)
    return gradient(objective, world)


def make_config(**changes):
    plain = {"normalise": "none", "baseline": "leave_one_out"}
    weights = {"alpha": 3.0, "beta1": 0.3, "beta2": 0.7}
    return score.Config(**plain | weights | changes)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("baseline, V, G, K", [
    ("none", 4, 1, 1), ("none", 2, 2, 2), ("leave_one_out", 4, 2, 1), ("leave_one_out", 2, 2, 2),
])  # fmt: skip
def test_expected_gradient_is_that_of_equation_3_and_4(stage, baseline, V, G, K):
    world, config = make_world(V), make_config(baseline=baseline)
    estimate = estimated_gradient(world, config, stage, G, K)
    exact = exact_gradient(world, config, stage)
    torch.testing.assert_close(estimate, exact, atol=TOLERANCE, rtol=0)


def test_group_mean_baseline_shrinks_the_reward_gradient_by_its_stated_factor():
    world, config = make_world(4), make_config(baseline="group_mean", beta1=0.0, beta2=0.0)
    estimate = estimated_gradient(world, config, 2, 2, 1)
    exact = exact_gradient(world, config, 2)
    torch.testing.assert_close(estimate, exact / 2, atol=TOLERANCE, rtol=0)


def test_gamma_1_gives_the_first_attempt_the_gradient_through_the_second():
    world, config = make_world(4), make_config(gamma=1.0, beta1=0.0)
    p1, p2 = (p.exp() for p in turn_logprobs(world.policy, 4))
    r1 = world.r1[:, None]
    total = (p1[:, None] * p2 * (r1 + world.r2 + config.alpha * (world.r2 - r1))).sum()
    estimate = estimated_gradient(world, config, 2, 2, 1)
    torch.testing.assert_close(estimate, gradient(total, world), atol=TOLERANCE, rtol=0)


def position_kl(world, forward: bool):
    """The KL of each position, summed, with the distribution over prefixes held fixed."""
    V, total = world.V, 0.0
    p1, p2 = (p.exp().detach() for p in turn_logprobs(world.policy, V))
    joint = (p1[:, None] * p2).view(V, V, V, V)
    weights = [joint.sum(), joint.sum((1, 2, 3)), joint.sum((2, 3)), joint.sum(3)]
    for policy, reference, weight in zip(world.policy, world.reference, weights):
        p, q = policy.log_softmax(-1), reference.log_softmax(-1)
        kl = (q.exp() * (q - p)).sum(-1) if forward else (p.exp() * (p - q)).sum(-1)
        total = total + (weight.flatten() * kl).sum()
    return total


@pytest.mark.parametrize("kind", ["exact", "token", "k1", "k2", "k3"])
def test_each_kl_option_has_the_gradient_it_is_documented_with(kind):
    world, config = make_world(4), make_config(baseline="none", beta1=1.0, alpha=0.0)
    world.r1.zero_(), world.r2.zero_()
    estimate = estimated_gradient(world, config, 2, 1, 1, kind)
    claimed = position_kl(world, forward=kind == "k3")
    if kind in ("exact", "k1"):
        claimed = sum(sequence_kl(world))
    torch.testing.assert_close(estimate, -gradient(claimed, world), atol=TOLERANCE, rtol=0)


def test_the_kl_options_differ_so_that_the_test_above_can_fail():
    world = make_world(4)
    kls = sum(sequence_kl(world)), position_kl(world, False), position_kl(world, True)
    gradients = [gradient(kl, world) for kl in kls]
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).abs().max() > 1e-2
