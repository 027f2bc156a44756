"""Logits of bfloat16 models: products in float32, in loss, scorer and both paths of the sampler."""

import copy

import pytest
import torch
from transformers import LlamaConfig, PhiConfig

from conftest import build
from loss import Scores, logits_of, token_scores
from sampler import Sampler
from sampling.attention import head_is
from test_policy import made_up_rollout, small_llama
from training.scorer import Scorer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).bfloat16().requires_grad_()


@pytest.mark.parametrize("V, H", [(29, 16), (5000, 4096)])  # the latter in more than one slice
def test_logits_of_bfloat16_are_products_in_float32_whose_rounding_would_be_seen(V, H):
    hidden, head = drawn(6, H), drawn(V, H, scale=8 / H**0.5)
    exact = hidden.double() @ head.double().T
    assert exact.abs().max() > 16  # where bfloat16 has steps of an eighth
    logits = logits_of(hidden, head)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-3, rtol=0)
    assert ((hidden @ head.T).double() - exact).abs().max() > 0.05


def test_gradients_through_them_are_those_of_the_product():
    hidden, head, weight = drawn(6, 16), drawn(29, 16), torch.randn(6, 29)
    inputs = hidden, head
    found = torch.autograd.grad((logits_of(*inputs) * weight).sum(), inputs)
    exact = torch.autograd.grad(((hidden.double() @ head.double().T) * weight).sum(), inputs)
    for one, other in zip(found, exact):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other.float(), atol=0.05, rtol=0.02)


def test_float32_and_float64_logits_are_the_plain_product_bit_for_bit():
    for dtype in (torch.float32, torch.float64):
        hidden, head = torch.randn(6, 16, dtype=dtype), torch.randn(29, 16, dtype=dtype)
        assert torch.equal(logits_of(hidden, head), hidden @ head.T)


def test_scores_of_bfloat16_states_are_those_of_a_full_softmax_in_float64():
    hidden, ref, head, other = drawn(6, 16), drawn(6, 16), drawn(29, 16, scale=2), drawn(29, 16)
    tokens = torch.arange(6)
    scores = token_scores(hidden, head, tokens, ref, other, temperature=0.7, chunk=4)
    pairs = (hidden, head), (ref, other)
    p, q = ((h.double() @ w.double().T / 0.7).log_softmax(1) for h, w in pairs)
    index = tokens[:, None]
    kl, entropy = (p.exp() * (p - q)).sum(1), -(p.exp() * p).sum(1)
    expected = Scores(p.gather(1, index)[:, 0], q.gather(1, index)[:, 0], kl, entropy)
    for one, exact in zip(scores, expected):
        torch.testing.assert_close(one.double(), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_sampler_rounds_no_logits_on_either_path(tokenizer, fused):
    model = build(LlamaConfig, initializer_range=0.3).bfloat16()
    sampler, seen = Sampler(model, tokenizer), []
    sampler.fused &= fused
    assert sampler.fused == fused
    forward = sampler._forward
    sampler._forward = lambda *inputs: seen.append(forward(*inputs)) or seen[-1]
    sampler.generate([[5, 6, 7]], max_new_tokens=4)
    logits = torch.cat(seen)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert "forward" not in vars(model.lm_head)


def test_a_head_that_is_not_the_fused_paths_keeps_its_bias_and_its_own_forward():
    model = build(PhiConfig).bfloat16()
    head = model.lm_head
    hidden = drawn(2, 3, head.in_features)
    torch.nn.init.normal_(head.bias)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    with head_is(model, logits_of):
        torch.testing.assert_close(head(hidden).double(), exact, atol=1e-3, rtol=0)
    assert head(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_policy_that_is_its_reference_has_a_kl_of_exactly_0(checkpointing):
    model, rollout = small_llama().bfloat16(), made_up_rollout()
    scorer = Scorer(model, copy.deepcopy(model), checkpointing=checkpointing)
    scores = scorer(rollout.ids, rollout.action_mask, 0.9)
    assert scores.logprobs[rollout.action_mask].abs().min() > 0
    assert torch.equal(scores.logprobs, scores.ref_logprobs) and not scores.kl.any()
