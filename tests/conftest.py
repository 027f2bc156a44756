"""Tiny randomly initialised models, one for every kind of attention that the project supports, and
what holds for every rollout of them."""

import logging
import os
import weakref
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, if it is there at all
    os.environ["TRITON_INTERPRET"] = "1"

import transformers as tf  # noqa: E402

import helpers  # noqa: E402, F401, whose embedded task every test has, whichever are run
from sampling.attention import KVCache  # noqa: E402

logging.disable(logging.DEBUG)  # of which torch.distributed.checkpoint writes much
torch.set_num_threads(1)  # such small matrices gain nothing from more

VOCAB, EOS = 24, 1
PROMPTS = [[5], [7, 3, 9, 2, 11, 4, 8], [6, 2], [3, 3, 3, 3], [9, 8, 7, 6, 5, 4, 3, 2, 10, 11, 12]]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,  # far from uniform, so that a wrong position or mask shows
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
QWEN2 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LAYERS = ["sliding_attention", "full_attention"]
GEMMA = {"sliding_window": 5, "layer_types": LAYERS, "final_logit_softcapping": 9.0}
TINY = {  # windows are smaller than the sequences of the tests
    "llama": (tf.LlamaConfig, {}),
    "llama_mha": (tf.LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen2_window": (tf.Qwen2Config, QWEN2),
    "qwen3": (tf.Qwen3Config, {}),
    "gemma3": (tf.Gemma3TextConfig, GEMMA),
    "phi3": (tf.Phi3Config, {}),
    "phi3_window": (tf.Phi3Config, {"sliding_window": 6}),
    "mistral_window": (tf.MistralConfig, {"sliding_window": 7}),
}


def build(config_class, **options):
    """A randomly initialised model, always the same, with dropout wherever it has some."""
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **options})
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def pytest_configure(config):
    # many of these models have no fast path; test_fast.py has the tests that this is said
    config.addinivalue_line("filterwarnings", "ignore:sampling from")


@pytest.fixture(scope="session")
def tiny():
    """name -> model, built once; a test that changes a model makes its own with `build`."""
    models = {}

    def get(name):
        if name not in models:
            config_class, options = TINY[name]
            models[name] = build(config_class, **options)
        return models[name]

    return get


@pytest.fixture
def tokenizer():
    """All that the sampler asks of a tokenizer; here pad == eos."""
    return SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS)


@pytest.fixture
def cache_bytes(monkeypatch):
    """Of the keys and values of all caches: those there are `now`, and the most at one time."""
    count, empty = SimpleNamespace(now=0, peak=0), KVCache._empty

    def add(size):
        count.now += size
        count.peak = max(count.peak, count.now)

    def counted(*sizes):
        store = empty(*sizes)
        add(store.nbytes)
        weakref.finalize(store, add, -store.nbytes)
        return store

    monkeypatch.setattr(KVCache, "_empty", staticmethod(counted))
    return count


def plain_logits(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def check(model, rollout, temperature=1.0):
    """Recorded log-probs are those of a plain forward pass, row by row; the masks agree."""
    error = 0.0
    for r, length in enumerate(rollout.lengths.tolist()):
        logprobs = (plain_logits(model, rollout.ids[r, :length]) / temperature).log_softmax(-1)
        expected = logprobs[:-1].gather(1, rollout.ids[r, 1:length, None])[:, 0]
        sampled = rollout.action_mask[r, 1:length]
        error = max(error, (expected - rollout.logprobs[r, 1:length])[sampled].abs().max().item())
    assert error < 1e-5
    real = torch.arange(rollout.ids.shape[1]) < rollout.lengths[:, None]
    assert rollout.lengths.max() == rollout.ids.shape[1]
    assert torch.equal(rollout.turn >= 0, real) and not (rollout.action_mask & ~real).any()
    assert not rollout.logprobs[~rollout.action_mask].any()
    assert (rollout.turn.where(real, 99).diff() >= 0).all()
    for turn in range(rollout.stopped.shape[1]):
        sampled = rollout.action_mask & (rollout.turn == turn)
        stops = (rollout.ids == EOS) & sampled
        assert torch.equal(stops.any(1), rollout.stopped[:, turn]) and (stops.sum(1) <= 1).all()
        last = torch.where(sampled, torch.arange(real.shape[1]), -1).amax(1, keepdim=True)
        assert torch.equal(rollout.ids.gather(1, last)[:, 0] == EOS, rollout.stopped[:, turn])


def three_turns(sampler, temperature=1.0, max_new_tokens=9, seeds=None):
    """Unequal prompts, branched at every turn, not all rows go on, row order changed."""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    first = sampler.generate(PROMPTS, 2, seeds=seeds, **options)
    rows = [8, 0, 3, 4, 9, 3]
    more = [[4, 5, 6, 2 + i][: i + 1] for i in range(6)]
    second = sampler.extend(first, more, 2, rows=rows, **options)
    third = sampler.extend(second, [[6, 10]] * 12, **options)
    return first, second, third


def equal(a, b):
    """Whether two rollouts are the same but for the last bits of their log-probs."""
    names = [f.name for f in fields(a) if f.name not in ("logprobs", "cache")]
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)
    return same and torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
