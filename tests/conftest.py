"""Tiny randomly initialised models, one for every kind of attention that the project supports."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

logging.disable(logging.DEBUG)  # of which torch.distributed.checkpoint writes much
torch.set_num_threads(1)  # such small matrices gain nothing from more

VOCAB, EOS = 24, 1
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
