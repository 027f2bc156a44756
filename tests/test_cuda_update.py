"""What an update does with kernels on CUDA against what it does without, in Triton's interpreter.

Skipped without Triton.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

pytest.importorskip("triton")
pytest.importorskip("fast.fused")
import loss  # noqa: E402
from conftest import VOCAB, build  # noqa: E402
from fast import cuda_loss, cuda_update, paths  # noqa: E402
from training import lora  # noqa: E402
from training import scorer as scorer_module  # noqa: E402
from training.scorer import Scorer  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="written for the interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, of -inf * 0
]
CPU = torch.device("cpu")


def scored(score, dtype=torch.float32, words=2100, reference=True, temperature=0.7, frozen=False):
    """(log-probs, the reference's, KL, entropy, gradients of hidden states and head) of a chunk."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(words))
    hidden, ref_hidden = (random(6, 16).to(dtype) for _ in range(2))
    head = (random(words, 16) + 4 * (torch.arange(words) == words - 1)[:, None]).to(dtype)
    ref_head = head + random(words, 16).to(dtype) / 4
    inputs = [x.clone().requires_grad_(not frozen or x is hidden) for x in (hidden, head)]
    tokens = torch.arange(6) * (words // 6)
    other = (ref_head, ref_hidden) if reference else (None, None)
    scores = score(inputs[1], other[0], temperature, inputs[0], tokens, other[1])
    weight = random(4, 6, 1)
    (scores[0] * weight[0] + scores[2] * weight[2]).sum().backward()
    return [*(x.detach() for x in scores), *(x.grad for x in inputs)]


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("words", [7, 2100])
@pytest.mark.parametrize("reference", [True, False])
def test_scores_of_the_kernels_and_their_gradients_are_the_losses_own(
    reference, words, dtype, error
):
    how = {"dtype": dtype, "words": words, "reference": reference}
    ours, right = (scored(score, **how) for score in (cuda_loss.score, loss._score))
    for number, (mine, its) in enumerate(zip(ours, right, strict=True)):
        bound = error if number > 3 else 1e-5  # scores are float32 in either
        torch.testing.assert_close(mine, its, atol=bound * float(its.abs().max()), rtol=bound)
        assert mine.dtype == its.dtype
    assert torch.equal(ours[2] == 0, right[2] == 0)  # all of them without a reference


def test_a_reference_that_is_the_policy_is_zero_nats_away_to_the_last_bit():
    hidden, head = torch.randn(5, 8), torch.randn(3000, 8)
    inputs = [x.requires_grad_() for x in (hidden.clone(), head.clone())]
    _, _, kl, _ = cuda_loss.score(inputs[1], head, 1.0, inputs[0], torch.arange(5), hidden)
    kl.sum().backward()
    assert not kl.any() and not any(x.grad.any() for x in inputs)


def test_a_policy_that_is_sure_has_its_entropy_and_gradient():
    """1 - p is 1e-5: a tenth of it is lost where a norm of 20 is rounded before it is taken off."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, 700], found = 20.0, []
    for score, dtype in ((cuda_loss.score, torch.float32), (loss._score, torch.float64)):
        head = logits.T.to(dtype).requires_grad_()
        scores = score(head, head.detach() * 1.001, 1.0, torch.eye(4, dtype=dtype),
                       torch.full((4,), 700), torch.eye(4, dtype=dtype))  # fmt: skip
        scores[0].sum().backward()
        found.append([*(x.detach() for x in scores), head.grad])
    for mine, its in zip(*found, strict=True):
        close = its.abs().max() < 1e-8 or (mine - its).norm() < 0.02 * its.norm()
        assert close and (mine - its).abs().max() < 1e-6


def test_a_head_that_is_frozen_gets_no_gradient_and_the_reference_never_one():
    *scores, of_hidden, of_head = scored(cuda_loss.score, frozen=True)
    assert of_head is None and torch.equal(of_hidden, scored(cuda_loss.score)[4])
    hidden = torch.randn(3, 8, requires_grad=True)
    _, ref, _, entropy = cuda_loss.score(
        torch.randn(20, 8), None, 1.0, hidden, torch.arange(3), None
    )
    assert not ref.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_a_gate_has_torchs_value_and_gradients(dtype, error):
    ours, right = ([(3 * torch.randn(2, 900)).to(dtype) for _ in "gu"] for _ in "or")
    right = [x.double().requires_grad_() for x in ours]
    ours = [x.requires_grad_() for x in ours]
    made = cuda_update.Gated.apply(*ours), F.silu(right[0]) * right[1]
    for out in made:
        (out * torch.arange(900) / 900).sum().backward()
    pairs = [made, *zip((x.grad for x in ours), (x.grad for x in right), strict=True)]
    for mine, its in pairs:
        torch.testing.assert_close(mine.double(), its, atol=error, rtol=error)
        assert mine.dtype == dtype


def updated(scorer):
    """(scores, gradient) of rows that share prompts."""
    ids = torch.randint(2, VOCAB, (5, 12), generator=torch.Generator().manual_seed(1))
    ids[:, :5], mask = ids[0, :5], torch.arange(12).expand(5, 12) > 4
    scores = scorer(ids, mask, 0.8)
    (scores.logprobs.sum() + 0.5 * scores.kl.sum()).backward()
    return scores, torch.cat([p.grad.flatten() for p in scorer.trained.parameters()])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if all were on one: the scorer takes the kernels; says how many blocks' norms it took."""
    used, own = [], cuda_update._norm
    monkeypatch.setattr(paths, "score_of", lambda device: cuda_loss.score)
    ways = cuda_update.WAYS | {"RMSNorm": lambda *inputs: used.append(1) or own(*inputs)}
    monkeypatch.setattr(cuda_update, "WAYS", ways)
    return used


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [tf.LlamaConfig, tf.Qwen3Config])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_update_with_kernels_has_the_scores_and_the_gradient_of_one_without(
    adapted, config, checkpointing, monkeypatch, on_a_gpu
):
    models = build(config), build(config, initializer_range=0.15)
    if adapted:
        adapters = lora.make(models[0], 2, seed=0)
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.1)
        models = models[0], models[0], adapters
    scorer = Scorer(*models, checkpointing=checkpointing)
    ours = updated(scorer)
    norms = [m for m in models[0].modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(on_a_gpu) >= 2 * len(norms)  # the reference's, too
    scorer.zero_grad()
    taken = len(on_a_gpu)
    monkeypatch.setattr(paths, "score_of", lambda device: None)
    right = updated(scorer)
    assert len(on_a_gpu) == taken  # nothing stays behind
    for mine, its in zip(ours[0], right[0], strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    assert (ours[1] - right[1]).norm() < 1e-5 * right[1].norm()


def test_blocks_of_a_model_that_fast_does_not_know_are_left_alone(on_a_gpu):
    for model in (build(tf.Gemma3TextConfig), build(tf.LlamaConfig, hidden_act="gelu")):
        with cuda_update.blocks_fused(model):
            assert not [m for m in model.modules() if "forward" in vars(m)]
    model = build(tf.LlamaConfig)
    with pytest.raises(KeyError), cuda_update.blocks_fused(model):
        assert len([m for m in model.modules() if "forward" in vars(m)]) == 2 * 3 + 1
        raise KeyError
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_what_is_compiled_has_the_kernels_of_the_loss_and_no_others(on_a_gpu, monkeypatch):
    monkeypatch.setattr(scorer_module, "_compiled", lambda forward: forward)
    model = build(tf.LlamaConfig)
    monkeypatch.setattr(loss, "_score", None)  # which is not called
    updated(Scorer(model, build(tf.LlamaConfig, initializer_range=0.1), compiled=True))
    assert not on_a_gpu


def test_kernels_of_the_loss_that_are_wrong_or_fail_are_not_taken_and_it_says_why(monkeypatch):
    why = cuda_update.why_no_score.__wrapped__
    assert why(CPU) is None and paths.score_of.__wrapped__(CPU) is None  # right, but not for CPUs
    with torch.no_grad():  # an evaluation may be the first to ask
        assert why(CPU) is None
    own = cuda_loss.score
    for change in (lambda s: (s[0] * 1.01, *s[1:]), lambda s: (*s[:2], s[2].detach() * s[2], s[3])):
        monkeypatch.setattr(cuda_loss, "score", lambda *inputs, f=change: f(own(*inputs)))
        assert why(CPU) == "fast/cuda_loss.py computes something else than loss.py"
    monkeypatch.setattr(cuda_loss, "score", lambda *inputs: 1 / 0)
    said = "fast/cuda_loss.py fails: ZeroDivisionError: division by zero"
    assert why(CPU) == said
    monkeypatch.setattr(cuda_update, "why_no_score", lambda device: said)
    with pytest.warns(UserWarning, match="updates are slower, without kernels for the loss: fast"):
        assert paths.score_of.__wrapped__(torch.device("cuda", 0)) is None
