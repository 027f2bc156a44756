"""--compile: the same scores and gradients, nothing compiled twice, and nothing left behind."""

import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn
from torch._dynamo.utils import counters

import helpers
import loss
import score
from conftest import VOCAB, build
from training import lora
from training import scorer as scorer_module
from training.scorer import Scorer

SIZES = [(4, 20, 0), (6, 31, 0), (3, 9, 0)]  # rows, tokens, those that all rows begin with
STEMS = [(5, 90, 70), (7, 100, 80)]


def without_inductor(function):
    """As `loss.compiled`, but what is traced runs as it is: all but the code that is generated."""
    return torch.compile(function, dynamic=True, backend="aot_eager")


@pytest.fixture
def traced(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    for module in (loss, scorer_module):
        monkeypatch.setattr(module, "compiled", without_inductor)
    return lambda: counters["stats"]["unique_graphs"]


def rows_of(B: int, T: int, stem: int):
    g = torch.Generator().manual_seed(B)
    ids = torch.randint(VOCAB, (B, T), generator=g)
    ids[:, :stem] = ids[0, :stem]
    return ids, (torch.rand(B, T, generator=g) > 0.4) & (torch.arange(T) > stem)


def passed(scorer, ids, mask, temperature=0.8):
    """(scores, the gradient of all that is trained)"""
    scorer.trained.zero_grad()
    scores = scorer(ids, mask, temperature)
    (scores.logprobs.sum() + 0.5 * scores.kl.sum()).backward()
    return scores, torch.cat([weight.grad.flatten() for weight in scorer.trained.parameters()])


def alike(plain, other) -> None:
    for a, b in zip(plain[0], other[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert (plain[1] - other[1]).abs().max() < 1e-4 * plain[1].abs().max()


def models_of(kind: str):
    """What a Scorer takes: model, reference, and with LoRA adapters of both."""
    model = build(tf.LlamaConfig)
    if kind == "whole":
        return model, build(tf.LlamaConfig, initializer_range=0.1)
    adapters = lora.make(model, 2, seed=0)
    for adapter in adapters.values():
        nn.init.normal_(adapter.B, std=0.1)  # that add something
    return model, model, adapters, lora.make(model, 2, seed=1) if kind == "own" else None


@pytest.mark.parametrize("kind, checkpointing, kinds", [
    pytest.param("whole", False, 2, marks=pytest.mark.slow),
    ("lora", True, 3),
    pytest.param("own", False, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_is_as_plain_and_compiled_once_for_all_sizes(kind, checkpointing, kinds, traced):
    models = models_of(kind)
    plain, scorer = Scorer(*models), Scorer(*models, checkpointing=checkpointing, compiled=True)
    for sizes in SIZES:
        alike(*(passed(each, *rows_of(*sizes)) for each in (plain, scorer)))
        # a block, one more where the reference has no adapters, and the head
        assert traced() == kinds
    assert "forward" not in vars(models[0].model.layers[0])  # or the sampler would refuse it
    assert models[1] is models[0] or all(w.grad is None for w in models[1].parameters())
    if kind == "whole":  # blocks in which all rows begin alike are of another kind
        for sizes in STEMS:
            alike(*(passed(each, *rows_of(*sizes)) for each in (plain, scorer)))
        assert traced() == kinds + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "lora", "own"])
def test_by_inductor_it_is_as_plain_within_rounding_and_no_kl_before_the_first_step(kind):
    torch._dynamo.reset()
    models, sizes = models_of(kind), rows_of(*SIZES[0])
    alike(*(passed(Scorer(*models, compiled=c), *sizes) for c in (False, True)))
    model, adapters = build(tf.LlamaConfig), ()
    if kind != "whole":
        adapters = [lora.make(model, 2, seed=0) for _ in range(1 + (kind == "own"))]
    reference = model if adapters else build(tf.LlamaConfig)
    for c in (False, True):
        scores = Scorer(model, reference, *adapters, compiled=c)(*sizes)
        assert torch.equal(scores.logprobs, scores.ref_logprobs) and not scores.kl.any()


def trace_alone() -> None:
    """Harm: no Inductor, in a process of its own."""
    for module in (loss, scorer_module):
        module.compiled = without_inductor


@pytest.mark.slow
@pytest.mark.parametrize("flags, world", [
    ("", 2), ("--dtype bfloat16", 0), ("--dtype bfloat16 --lora_rank 2 --checkpointing True", 2),
])  # fmt: skip
def test_a_run_over_ranks_compiled_is_the_run_it_would_be_plain(flags, world, tmp_path):
    model = helpers.save_random_model(tmp_path / "model")
    for name, more in (("plain", ()), ("compiled", ("--compile", "True"))):
        given = (*flags.split(), *more)
        out = tmp_path / name
        codes = helpers.run("score", model, out, *given, world=world, harm=trace_alone)
        assert not any(codes)
    assert helpers.metrics(tmp_path / "compiled") == helpers.metrics(tmp_path / "plain")


def test_without_a_compiler_the_flag_is_refused_in_one_line(tmp_path):
    home = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    flags = ["--compile", "True", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, score.__file__, *flags]
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    last = done.stderr.splitlines()[-1]
    assert "error: --compile: torch.compile does not work here; leave the flag out, or" in last
