"""Scorer, micro-batches, optimiser, run directory; on random models of a few thousand weights."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import loss
import score
import tiny
from loss import divide_by_std, later_in_turn, subtract_baseline, token_scores
from training import batches, checkpoint, loop, models, policy, run
from training.scorer import Scorer


def small_llama(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.4, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()
    for module in list(model.modules()):  # transformers' own norm rounds float64 to float32
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                setattr(module, name, norm)
    return model


def made_up_rollout(rows=7, pad=0, seed=0):
    """Two turns of unequal lengths; padding is `pad`, which also stands among the real tokens."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.randint(1, 5, (rows, 4), generator=g)  # prompt, y1, instruction, y2
    lengths = parts.sum(1)
    T = int(lengths.max())
    ids = torch.randint(29, (rows, T), generator=g)
    ids[:, 1] = pad
    turn = torch.full((rows, T), -1)
    mask = torch.zeros(rows, T, dtype=torch.bool)
    for row, (x1, y1, x2, y2) in enumerate(parts.tolist()):
        turn[row, : x1 + y1], turn[row, x1 + y1 : x1 + y1 + x2 + y2] = 0, 1
        mask[row, x1 : x1 + y1] = mask[row, x1 + y1 + x2 : x1 + y1 + x2 + y2] = True
    ids[turn < 0] = pad
    sampled = {"action_mask": mask, "logprobs": torch.zeros(rows, T)}
    return SimpleNamespace(ids=ids, turn=turn, lengths=lengths, **sampled)


def gradient_of(rollout, budget, seed=0):
    scorer = Scorer(small_llama().double(), small_llama(1).double(), chunk=5)
    g = torch.Generator().manual_seed(seed)
    per_turn = torch.randn(len(rollout.ids), 2, generator=g, dtype=torch.float64)
    adv = loss.spread(per_turn, rollout)
    coef = loss.spread(torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(len(adv), 2), rollout)
    batch = policy.Batch(rollout, adv, coef, len(adv), {})
    policy.accumulate_gradients(scorer, batch, score.Config(token_budget=budget))
    return torch.cat([p.grad.flatten() for p in scorer.model.parameters()])


def test_the_gradient_does_not_depend_on_how_rows_fall_into_micro_batches():
    rollout = made_up_rollout()
    whole = gradient_of(rollout, 10_000)
    assert whole.abs().max() > 1e-3
    for budget in (1, 20, 45):
        torch.testing.assert_close(gradient_of(rollout, budget), whole, atol=1e-10, rtol=0)


def test_the_gradient_does_not_depend_on_padding_or_on_its_token():
    rollout = made_up_rollout()
    wider = copy.deepcopy(rollout)
    for name, fill in (("ids", 11), ("turn", -1), ("action_mask", False), ("logprobs", 0.0)):
        setattr(wider, name, torch.nn.functional.pad(getattr(rollout, name), (0, 9), value=fill))
    wider.ids[wider.turn < 0] = 11
    wider.lengths = wider.lengths + 9  # so that the padding is really encoded
    padded, plain = (gradient_of(x, 10_000) for x in (wider, rollout))
    torch.testing.assert_close(padded, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pad", [0, 3])
def test_scores_equal_a_plain_forward_and_a_full_softmax(pad):
    model, reference = small_llama().double(), small_llama(1).double()
    rollout, T = made_up_rollout(pad=pad), 0.7
    scores = Scorer(model, reference, chunk=4)(rollout.ids, rollout.action_mask, T)
    for row, length in enumerate(rollout.lengths.tolist()):
        ids = rollout.ids[row : row + 1, :length]
        logp, ref = ((m(input_ids=ids).logits[0] / T).log_softmax(-1) for m in (model, reference))
        for t in range(1, length):
            if not rollout.action_mask[row, t]:
                assert scores.logprobs[row, t] == scores.kl[row, t] == scores.entropy[row, t] == 0
                continue
            p, q = logp[t - 1], ref[t - 1]
            expected = (p[ids[0, t]], q[ids[0, t]], (p.exp() * (p - q)).sum(), -(p.exp() * p).sum())
            found = torch.stack([s[row, t] for s in scores])
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", loss.KL_KINDS)
def test_without_a_reference_no_kl_has_a_value_or_a_gradient_however_rare_a_token(kind):
    ones, turn = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long)
    results = []
    for kl_coef in (0.0, 0.7):
        hidden = torch.tensor([[100.0, 0.0], [0.0, 300.0]], requires_grad=True)
        scores = token_scores(hidden, torch.eye(2), torch.tensor([1, 0]))
        assert scores.logprobs.tolist() == [-100, -300]  # exp(100) is infinite
        assert not scores.ref_logprobs.requires_grad
        scores = loss.Scores(*(x[None] for x in scores))
        value = policy.policy_loss(scores, ones, kl_coef * ones, ones.bool(), turn, 1, kind)
        value.backward()
        results.append(torch.cat([value.detach()[None], hidden.grad.flatten()]))
    assert results[0].isfinite().all() and torch.equal(*results)


def test_no_logits_are_kept_for_the_backward_pass():
    M, H, V, kept = 40, 8, 1000, []
    hidden, head = torch.randn(M, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    pack = lambda x: kept.append(x.numel()) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_scores(hidden, head, torch.arange(M), torch.randn(M, H), torch.randn(V, H), chunk=10)
    assert kept and max(kept) <= V * H < 10 * V


def test_no_kl_and_no_credit_reach_prompt_instruction_or_padding():
    rollout = made_up_rollout()
    outside = ~rollout.action_mask
    assert (loss.spread(torch.ones(7, 2), rollout)[outside] == 0).all()
    grads = []
    for fill in (0.0, 100.0):
        adv, coef = (torch.where(outside, fill, 1.0).double() for _ in range(2))
        scorer = Scorer(small_llama().double(), small_llama(1).double())
        policy.accumulate_gradients(scorer, policy.Batch(rollout, adv, coef, 7, {}), score.Config())
        grads.append(torch.cat([p.grad.flatten() for p in scorer.model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_the_reference_gets_no_gradient():
    scorer = Scorer(small_llama(), small_llama(1))
    rollout = made_up_rollout()
    ones = rollout.action_mask.float()
    policy.accumulate_gradients(scorer, policy.Batch(rollout, ones, ones, 7, {}), score.Config())
    assert all(p.grad is None for p in scorer.reference.parameters())
    assert all(p.grad is not None for p in scorer.model.parameters())


def test_every_row_is_in_exactly_one_micro_batch_within_the_budget():
    lengths = torch.tensor([5, 9, 2, 7, 7, 1])
    pieces = policy.micro_batches(lengths, 15)
    assert sorted(torch.cat(pieces).tolist()) == list(range(6))
    assert all(len(b) == 1 or len(b) * int(lengths[b].max()) <= 15 for b in pieces)


def test_clipping_binds_in_later_epochs_and_never_in_the_first():
    scores = SimpleNamespace(**{k: torch.zeros(1, 2) for k in ("ref_logprobs", "kl", "entropy")})
    scores.logprobs = torch.tensor([[0.5, -0.5]], requires_grad=True)
    ones, turn = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long)

    def grad(old, advantage):
        advantages, masks = ones * advantage, (ones * 0, ones.bool(), turn)
        loss = policy.policy_loss(scores, advantages, *masks, 1, "token", old)
        return torch.autograd.grad(loss, scores.logprobs)[0]

    torch.testing.assert_close(grad(None, 2.0), -2 * ones)
    clipped = grad(torch.zeros(1, 2), 2.0)  # ratios e^0.5 and e^-0.5
    assert clipped[0, 0] == 0 and clipped[0, 1] == pytest.approx(-2 * 2.718281828**-0.5)
    clipped = grad(torch.zeros(1, 2), -2.0)
    assert clipped[0, 1] == 0 and clipped[0, 0] == pytest.approx(2 * 2.718281828**0.5)


def test_leave_one_out_leaves_out_its_own_reward():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0]]
    torch.testing.assert_close(subtract_baseline(rewards), torch.tensor(expected))
    with pytest.raises(ValueError, match="at least 2"):
        subtract_baseline(rewards[:, :1])


def test_the_deviation_logged_is_the_one_that_advantages_are_divided_by():
    values = torch.tensor([[1.0, 5.0], [-1.0, 9.0], [7.0, 5.0]])
    for dim in (None, 0):
        torch.testing.assert_close(divide_by_std(values, dim) * loss.deviation(values, dim), values)
    present = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert loss.deviation(values, 0, present).tolist() == [[1.0, 0.0]]


def test_advantages_without_variance_become_zeros_not_nan():
    assert (divide_by_std(torch.full((4, 2), 3.0)) == 0).all()
    columns = divide_by_std(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]), dim=0)
    torch.testing.assert_close(columns, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_later_in_turn_counts_neither_this_position_nor_other_turns():
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    turn = torch.tensor([[0, 0, 0, 1, 1]])
    later = torch.tensor([[6.0, 4.0, 0.0, 16.0, 0.0]])
    torch.testing.assert_close(later_in_turn(values, turn), later)


def test_chunking_changes_neither_values_nor_gradients():
    torch.manual_seed(0)
    hidden, head, ref = (torch.randn(n, 8, dtype=torch.float64) for n in (11, 13, 11))
    results = []
    for chunk in (3, 11, 100):
        h = hidden.clone().requires_grad_()
        s = token_scores(h, head, torch.arange(11), ref, head * 1.1, 0.9, chunk)
        (s.logprobs.sum() + s.kl.square().sum()).backward()
        results.append(torch.cat([h.grad.flatten(), s.kl.detach()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(results[2], results[1], atol=1e-12, rtol=0)


def test_a_ratio_is_outside_beyond_a_tenth_either_way_and_of_sampled_tokens_alone():
    rollout, zero = made_up_rollout(), torch.zeros(7, made_up_rollout().ids.shape[1])
    rollout.stopped = torch.ones(7, 2, dtype=torch.bool)
    places = rollout.action_mask.nonzero()[:4]
    ratios = torch.tensor([0.89, 0.91, 1.09, 1.11])
    rollout.logprobs[tuple(places.T)] = -ratios.log()
    rollout.logprobs[~rollout.action_mask] = 5.0
    batch = policy.Batch(rollout, zero, zero, 7, {})
    row = loop.token_metrics(batch, loss.Scores(zero, zero, zero, zero), with_kl=False)
    assert row["ratio_outside"] == 2 / int(rollout.action_mask.sum())
    assert row["ratio_error"] == pytest.approx(-math.log(0.89))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    policy.apply_gradients(model, optimizer, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_every_problem_comes_once_an_epoch_in_an_order_of_its_own():
    problems = list(range(10))
    seen = [batches.pick_things(problems, 0, step, 4) for step in range(5)]
    flat = [p for batch in seen for p in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == problems and flat[:10] != flat[10:]


def test_warm_up_and_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)

    def lr(step, schedule):
        policy.set_lr(optimizer, 2.0, step, 100, 4, schedule)
        return optimizer.param_groups[0]["lr"]

    assert [lr(s, "constant") for s in (0, 1, 3, 99)] == [0.5, 1.0, 2.0, 2.0]
    assert lr(50, "cosine") == pytest.approx(1.0) and lr(99, "cosine") < 0.01


def test_the_gradient_is_clipped_to_its_norm():
    model = small_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = policy.apply_gradients(model, optimizer, 0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm == pytest.approx(len(before) ** 0.5)
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_second_epoch_is_clipped_against_the_first_ones_policy(monkeypatch):
    rollout = made_up_rollout()
    ones = rollout.action_mask.float()
    scorer = Scorer(small_llama(), small_llama())
    seen = []

    def spy(scorer, batch, config, old_logprobs=None):
        seen.append(old_logprobs)
        return accumulate(scorer, batch, config, old_logprobs)

    accumulate = policy.accumulate_gradients
    monkeypatch.setattr(policy, "accumulate_gradients", spy)
    optimizer = torch.optim.SGD(scorer.model.parameters(), lr=0.1)
    batch = policy.Batch(rollout, ones, ones, 7, {})
    scores, *_ = policy.update(scorer, optimizer, batch, score.Config(epochs=3))
    assert seen[0] is None and seen[1] is scores.logprobs and seen[2] is scores.logprobs


def test_a_head_that_scales_its_logits_is_refused():
    model = small_llama()
    forward = model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="not hidden @ head.T"):
        models.check_head(model, "odd")


def test_a_saved_model_is_replaced_whole(tmp_path):
    tokenizer = tiny.build_tokenizer()
    for seed in (0, 1):
        checkpoint.save_model(small_llama(seed), tokenizer, tmp_path / "checkpoint")
    loaded, _ = models.load_model(str(tmp_path / "checkpoint"))
    for a, b in zip(loaded.parameters(), small_llama(1).parameters()):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_the_embedded_model_is_found_from_any_directory_unless_one_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = models.load_model("models/tiny")
    assert 340_000 < model.num_parameters() < 350_000
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(ValueError, match="--model models/tiny: no config.json there"):
        models.load_model("models/tiny")


def test_a_run_directory_in_use_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="in use"):
        run.open_run(score.Config(output_dir=str(tmp_path)), {}, "")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_loss_ignores_whatever_stands_outside_the_action_mask():
    rollout = made_up_rollout()
    mask, outside = rollout.action_mask, ~rollout.action_mask
    values = torch.randn(5, *mask.shape, dtype=torch.float64)
    turn = torch.zeros_like(rollout.turn)  # one turn, so that garbage also follows sampled tokens
    losses = []
    for garbage in (0.0, 3.0):
        logprobs, ref_logprobs, kl, advantages, coef = torch.where(outside, garbage, values)
        scores = loss.Scores(logprobs, ref_logprobs, kl, kl)
        of = partial(loss.policy_loss, scores, advantages, coef, mask, turn, 7)
        losses += [of(kind) for kind in ("exact", "k1", "k3")]
    torch.testing.assert_close(losses[:3], losses[3:], atol=1e-12, rtol=0)
