"""Steps with nothing to learn from: neither weights nor optimiser change, on any rank."""

import copy

import pytest
import torch

import score
from loss import Scores, spread
from test_policy import made_up_rollout, small_llama
from training import distributed, policy
from training.scorer import Scorer


def batch_of(advantage: float, kl_coef: float):
    """Of one advantage (of alternating sign over the rows) and KL weight for all tokens."""
    rollout = made_up_rollout()
    signs = torch.tensor([1.0, -1.0]).repeat(4)[: len(rollout.ids), None].expand(-1, 2)
    advantages = spread(advantage * signs, rollout)
    coefs = spread(torch.full(signs.shape, kl_coef), rollout)
    return policy.Batch(rollout, advantages, coefs, len(signs), {})


@pytest.fixture
def learner():
    """A policy, which is its reference, and an update of it by a batch."""
    scorer = Scorer(small_llama(), small_llama())
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=1e-3, weight_decay=0.0)

    def update(batch, **flags):
        return policy.update(scorer, optimizer, batch, score.Config(**flags))

    return scorer, optimizer, update


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_without_an_advantage_from_the_start_the_policy_stays_its_reference(learner):
    scorer, optimizer, update = learner
    before = weights(scorer.model)
    for _ in range(2):
        done = update(batch_of(0.0, 1.0))
        assert done.idle and not done.wrong and done.norm > 0  # rounding, of any size to AdamW
    assert torch.equal(weights(scorer.model), before) and not optimizer.state
    assert torch.equal(weights(scorer.reference), before)


def test_momentum_makes_no_step_where_there_is_neither_advantage_nor_kl(learner):
    scorer, optimizer, update = learner
    assert not update(batch_of(1.0, 0.0)).idle
    before, memory = weights(scorer.model), copy.deepcopy(optimizer.state_dict())
    done = update(batch_of(0.0, 0.0))
    assert done.idle and torch.equal(weights(scorer.model), before)
    assert done.scores.kl.max() > 1e-3  # one without weight, which acts on nothing
    after = optimizer.state_dict()["state"]
    for key, kept in memory["state"].items():
        assert all(torch.equal(kept[name], after[key][name]) for name in kept)


def test_a_kl_above_the_floor_acts_alone(learner):
    scorer, _, update = learner
    update(batch_of(1.0, 0.0))
    before = weights(scorer.model)
    dones = [update(batch_of(0.0, 1.0)) for _ in range(20)]
    assert not any(done.idle for done in dones)
    assert not torch.equal(weights(scorer.model), before)
    assert dones[-1].scores.kl.sum() < dones[0].scores.kl.sum()  # back towards the reference


def test_an_idle_step_has_one_epoch_and_a_step_that_learns_all(learner, monkeypatch):
    _, _, update = learner
    scored, accumulate = [], policy.accumulate_gradients
    spy = lambda *a: scored.append(0) or accumulate(*a)  # noqa: E731
    monkeypatch.setattr(policy, "accumulate_gradients", spy)
    for advantage, count in ((0.0, 1), (1.0, 3)):
        scored.clear()
        update(batch_of(advantage, 1.0), epochs=3)
        assert len(scored) == count


@pytest.mark.parametrize("nats, acts", [(0.6, False), (1.4, True)])
def test_the_floor_is_of_the_mean_over_the_tokens_that_the_kl_weighs(nats, acts):
    batch = batch_of(0.0, 0.0)
    mask, turn = batch.rollout.action_mask, batch.rollout.turn
    batch.kl_coef[mask & (turn == 0)] = 0.1
    kl = torch.where(mask & (turn == 1), 1.0, 0.0)  # much, but without weight
    row, place = batch.kl_coef.nonzero()[0]
    kl[row, place] = nats * policy.KL_FLOOR * batch.kl_coef.count_nonzero()  # all of it on one
    assert policy.teaches(batch, Scores(kl, kl, kl, kl)) == acts


def test_one_advantage_on_one_rank_makes_the_step_of_all(monkeypatch):
    batch = batch_of(0.0, 0.0)
    zero = torch.zeros_like(batch.advantages)
    scores = Scores(zero, zero, zero, zero)
    assert not policy.teaches(batch, scores)
    for other, learns in (((True, 0.0, 0), True), ((False, 1.0, 10), True), ((False, 0, 9), False)):
        monkeypatch.setattr(distributed, "exchange", lambda mine, other=other: [mine, other])
        assert policy.teaches(batch, scores) == learns
    monkeypatch.undo()
    row, place = batch.rollout.action_mask.nonzero()[0].tolist()
    batch.advantages[row, place] = 1e-3
    assert policy.teaches(batch, scores)
