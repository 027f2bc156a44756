"""Random models of real sizes, on the GPU or for a rehearsal small; prompts, and samplers."""

from types import SimpleNamespace

import torch
import transformers as tf

from gpu_parts.lines import device, gpu
from sampler import Sampler

NAMES = ("1.5B", "0.5B")  # the larger one first: the other can be guessed from it
SHAPES = {  # of Qwen2.5: hidden size, feed-forward, layers, heads
    "0.5B": (896, 4864, 24, 14),
    "1.5B": (1536, 8960, 28, 12),
    "small": (64, 96, 2, 4),
}
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)


def random_model(part, name: str, dtype=None, layers=None, vocabulary=151936, spread=0.02):
    """Of a size by `name`, in `dtype` (default: bfloat16 on a GPU), with `layers` of its layers.

    spread: deviation of its weights; large ones are far from uniform, so that errors show.
    """
    hidden, inner, count, heads = SHAPES["small" if part.small else name]
    config = tf.Qwen2Config(
        vocab_size=1000 if part.small else vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or count,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        dtype = dtype or (torch.bfloat16 if gpu() else torch.float32)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = tf.GenerationConfig()  # no stop tokens
    return model


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Distinct ones: no two begin alike."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 900, (count, length), generator=generator).tolist()


def make_sampler(model, **switches) -> Sampler:
    """One that never stops by itself. switches: of `fused`, `kernels`, `graphs` what is wanted."""
    sampler = Sampler(model, TOKENIZER)
    sampler.is_stop[:] = False
    for name, wanted in switches.items():
        setattr(sampler, name, wanted and getattr(sampler, name))
    return sampler


def path_of(sampler: Sampler) -> dict:
    """Which path it takes, for a line."""
    return {name: getattr(sampler, name) for name in ("fused", "kernels", "graphs")}


PATHS = {  # ways to decode, each with one thing less than the one before
    "as it is": {},
    "no graphs": {"graphs": False},
    "no kernels": {"graphs": False, "kernels": False},
    "plain": {"graphs": False, "kernels": False, "fused": False},
}


def paths(model) -> dict[str, Sampler]:
    """{name: a sampler} of those of PATHS that differ from the one before."""
    made, before = {}, None
    for name, switches in PATHS.items():
        sampler = make_sampler(model, **switches)
        if path_of(sampler) != before:
            made[name], before = sampler, path_of(sampler)
    return made
