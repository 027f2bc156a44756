"""Importance weights: expected gradients by enumeration, in float64, and how the flag gets there.

Tokens are drawn from tables mu, and trained are tables pi: a softmax over V tokens for every prefix
of a turn of up to two tokens. All outcomes are one batch, each with its probability under mu as its
share of the loss, which is linear in advantages and KL weights.
"""

from types import SimpleNamespace

import pytest
import torch

import helpers
import loss
import score
from test_policy import made_up_rollout, small_llama
from training import loop, models, policy
from training.flags import parse_args
from training.scorer import Scorer

V = 4
EXACT = {"atol": 1e-12, "rtol": 0}


def make_world(length):
    """Log-probs of pi (which learns), mu, a reference: (V^t, V) each; rewards (V^length,)."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    tables = [[draw(V**t, V) for t in range(length)] for _ in range(3)]
    leaves = [table.requires_grad_() for table in tables[0]]
    pi, mu, ref = ([table.log_softmax(-1) for table in some] for some in tables)
    ratio = (pi[-1] - mu[-1]).exp()
    assert ratio.max() > 2 and ratio.min() < 0.5  # so that weights matter, and caps bind
    return SimpleNamespace(leaves=leaves, pi=pi, mu=mu, ref=ref, r=draw(V**length), length=length)


def spread_out(tables, length):
    """Tables (V^t, V) -> of every outcome, at each of its positions: (V^length, length)."""
    columns = [t.reshape(-1, 1).expand(-1, V ** (length - i - 1)) for i, t in enumerate(tables)]
    return torch.stack([column.flatten() for column in columns], 1)


def kl_tables(world):
    """The exact KL to the reference at every prefix, once for each token there: (V^t, V) each."""
    pairs = zip(world.pi, world.ref)
    return [(p.exp() * (p - q)).sum(-1, keepdim=True).expand_as(p) for p, q in pairs]


def gradient(world, value):
    grads = torch.autograd.grad(value, world.leaves, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def estimated(world, cap, beta=0.0, kind="exact", rewards=1.0):
    """The expectation over mu of the shared loss's gradient, uphill."""
    n = world.length
    logprobs, mu, ref, kl = (
        spread_out(tables, n) for tables in (world.pi, world.mu, world.ref, kl_tables(world))
    )
    share = mu.sum(1, keepdim=True).exp()  # (V^n, 1), the probability of each outcome
    scores = loss.Scores(logprobs, ref, kl, torch.zeros_like(kl))
    advantages = (rewards * world.r[:, None] * share).expand_as(mu)
    everywhere = torch.ones_like(mu, dtype=torch.bool), torch.zeros_like(mu, dtype=torch.long)
    # its old log-probs given: as in later epochs, where pi has moved by nothing yet
    how = kind, logprobs.detach(), 0.2, mu, cap
    value = loss.policy_loss(scores, advantages, beta * share.expand_as(mu), *everywhere, 1, *how)
    return gradient(world, -value)


def chosen(world, cap, value):
    """What the docstring promises: pi's choice of each token, at mu's prefixes, worth `value`.

    value: (V^length, length), what a token of each outcome is credited with.
    """
    n = world.length
    pi, mu = spread_out(world.pi, n), spread_out(world.mu, n)
    before, after = mu.cumsum(1) - mu, mu.flip(1).cumsum(1).flip(1) - mu  # log-probs of the rest
    up_to = torch.minimum(pi.detach().exp(), cap * mu.exp())  # of the token itself
    return gradient(world, ((before + after).exp() * up_to * value.detach() * pi).sum())


def test_with_one_token_and_a_large_cap_the_gradient_is_that_of_the_policy_itself():
    world = make_world(1)
    exact = gradient(world, (world.pi[0][0].exp() * world.r).sum())
    torch.testing.assert_close(estimated(world, 1e6), exact, **EXACT)
    assert (estimated(world, None) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("cap", [0.7, 1.5])
def test_with_one_token_the_cap_leaves_a_token_cap_times_mu_of_its_term(cap):
    world = make_world(1)
    pi, mu = world.pi[0][0], world.mu[0][0]
    kept = torch.minimum((pi - mu).exp(), torch.tensor(cap, dtype=torch.float64)).detach()
    exact = gradient(world, (mu.exp() * kept * world.r * pi).sum())
    torch.testing.assert_close(estimated(world, cap), exact, **EXACT)


@pytest.mark.parametrize("cap", [1.0, 1e6])
def test_with_two_tokens_it_is_pis_choice_of_each_at_mus_prefixes_judged_by_how_mu_goes_on(cap):
    world = make_world(2)
    value = world.r[:, None].expand(-1, 2)
    torch.testing.assert_close(estimated(world, cap), chosen(world, cap, value), **EXACT)
    if cap > 1e3:  # then it is the gradient of one objective, with mu's part held fixed
        (p1, p2), (m1, m2) = ([t.exp() for t in tables] for tables in (world.pi, world.mu))
        r = world.r.view(V, V)
        first, second = (p1[0] * (m2 * r).sum(1)).sum(), (m1[0] * (p2 * r).sum(1)).sum()
        torch.testing.assert_close(estimated(world, cap), gradient(world, first + second), **EXACT)


@pytest.mark.parametrize("kind", loss.KL_KINDS)
def test_the_kl_at_mus_prefixes_is_that_of_pi_and_blame_for_it_goes_by_pis_choice(kind):
    """With a large cap: each estimator as `kl_terms` documents it, at mu's prefixes."""
    world = make_world(2)
    estimate = estimated(world, 1e6, beta=1.0, kind=kind, rewards=0.0)
    visited = [torch.ones((), dtype=torch.float64), world.mu[0].exp().view(V, 1)]
    own = [table[:, :1] for table in kl_tables(world)]
    if kind == "k3":  # forward
        own = [(q.exp() * (q - p)).sum(-1, keepdim=True) for p, q in zip(world.pi, world.ref)]
    claimed = gradient(world, sum((v * kl).sum() for v, kl in zip(visited, own)))
    if kind in ("exact", "k1"):  # the first token leads to the second one's KL
        claimed += gradient(world, (world.pi[0][0].exp() * own[1][:, 0].detach()).sum())
    torch.testing.assert_close(estimate, -claimed, **EXACT)
    assert (estimated(world, None, 1.0, "k1", 0.0) + claimed).abs().max() > 1e-2


@pytest.mark.parametrize("kind", loss.OVER_THE_VOCABULARY)
def test_a_cap_takes_nothing_of_a_kl_over_the_vocabulary_but_of_the_blame_for_it(kind):
    world = make_world(2)
    own = [table[:, :1] for table in kl_tables(world)]
    visited = [torch.ones((), dtype=torch.float64), world.mu[0].exp().view(V, 1)]
    claimed = gradient(world, sum((v * kl).sum() for v, kl in zip(visited, own)))
    if kind == "exact":
        later = spread_out(kl_tables(world), 2)[:, 1:]
        claimed += chosen(world, 0.7, torch.cat([later, 0 * later], 1))
    torch.testing.assert_close(estimated(world, 0.7, 1.0, kind, 0.0), -claimed, **EXACT)


def test_where_pi_is_mu_weights_are_1_and_change_no_bit_and_what_was_not_sampled_has_none():
    logprobs = torch.tensor([[-0.3, -2.0, -4.0]], requires_grad=True)
    weigh = loss.importance_weights
    assert weigh(logprobs, logprobs.detach(), 2.0).tolist() == [[1, 1, 1]]
    assert weigh(logprobs, torch.zeros(1, 3), 2.0).tolist() == [[1, 1, 1]]
    assert not weigh(logprobs, logprobs.detach(), 2.0).requires_grad


def step(flags, shift=0.5, old_is_mu=False, token_budget=10_000):
    """Gradient of one batch, of flags as a command line has them; mu is below pi at each token."""
    rollout = made_up_rollout()
    scorer = Scorer(small_llama().double(), small_llama(1).double())
    with torch.no_grad():
        pi = scorer(rollout.ids, rollout.action_mask).logprobs
    noise = torch.randn(pi.shape, generator=torch.Generator().manual_seed(1)).double()
    if shift is not None:  # else as of rows that were not sampled here
        rollout.logprobs = (pi - shift * noise.abs()) * rollout.action_mask
    ones = rollout.action_mask.double()
    config = parse_args(score.Config, [*flags.split(), "--token_budget", str(token_budget)])
    old = rollout.logprobs if old_is_mu else None
    policy.accumulate_gradients(scorer, policy.Batch(rollout, ones, ones, 7, {}), config, old)
    return torch.cat([p.grad.flatten() for p in scorer.model.parameters()])


def test_the_flag_reaches_the_loss_and_0_or_float32_change_no_bit(monkeypatch):
    off = step("")
    assert torch.equal(step("--is_cap 2", shift=None), off)
    assert torch.equal(step("--is_cap 0"), off) and torch.equal(step("", shift=3.0), off)
    assert not torch.allclose(step("--is_cap 1.2"), off, rtol=1e-2)
    assert not torch.allclose(step("--is_cap 1.2"), step("--is_cap 9"), rtol=1e-2)
    monkeypatch.setattr(models.distributed, "together", lambda: True)
    monkeypatch.setattr(models.distributed, "exchange", lambda mine: [mine])
    bfloat16 = step("--dtype bfloat16")
    assert torch.equal(bfloat16, step("--is_cap 2 --dtype bfloat16"))
    assert torch.equal(step("--is_cap 0 --dtype bfloat16"), off)
    assert torch.equal(step("--dtype float32"), off) and not torch.equal(bfloat16, off)


def test_weights_are_the_same_in_any_micro_batches_and_of_the_updates_start_in_later_epochs():
    whole = step("--is_cap 1.5")
    for budget in (1, 20):
        torch.testing.assert_close(step("--is_cap 1.5", token_budget=budget), whole, **EXACT)
    later = step("", old_is_mu=True)
    assert torch.equal(step("--is_cap 1.5", old_is_mu=True), later)  # whatever pi is by now
    assert not torch.allclose(later, step(""), rtol=1e-2)


def test_the_share_of_capped_tokens_is_of_sampled_ones_and_logged_only_where_there_is_a_cap():
    rollout, zero = made_up_rollout(), torch.zeros(7, made_up_rollout().ids.shape[1])
    rollout.stopped = torch.ones(7, 2, dtype=torch.bool)
    first, second, third = rollout.action_mask.nonzero()[:3].tolist()
    rollout.logprobs[rollout.action_mask] = -1.0
    rollout.logprobs[~rollout.action_mask] = -9.0
    rollout.logprobs[tuple(third)] = 0.0  # not sampled here
    logprobs = zero - 1.0
    logprobs[tuple(first)], logprobs[tuple(second)], logprobs[tuple(third)] = -0.2, -0.4, 5.0
    scores, batch = (
        loss.Scores(logprobs, zero, zero, zero),
        policy.Batch(rollout, zero, zero, 7, {}),
    )
    row = loop.token_metrics(batch, scores, False, 2.0)  # e^0.8 is above, e^0.6 is below
    assert row["is_capped"] == 1 / int(rollout.action_mask.sum())
    assert "is_capped" not in loop.token_metrics(batch, scores, False)


def test_runs_in_bfloat16_log_the_share_unless_they_imitate(tmp_path):
    model_dir, flags = helpers.save_random_model(tmp_path / "model"), ["--dtype", "bfloat16"]
    runs = {
        script: helpers.start_run(script, model_dir, tmp_path / script, *flags, world=1)
        for script in ("score", "baselines")
    }
    assert {name: helpers.finish(run) for name, run in runs.items()} == {name: [0] for name in runs}
    logged = {
        name: ["is_capped" in row for row in helpers.metrics(tmp_path / name)] for name in runs
    }
    assert logged == {"score": [True] * 4, "baselines": [False] * 4}
