"""What decoding on CUDA launches, captures and reads, counted without one.

    python bench/decode_counts.py

Kernels a step: the operations of a step of Qwen2.5-1.5B's shape in bfloat16, 64 rows at context
450, on tensors without values; a view is none, a norm and an attention are one each, as on CUDA.
Captures and reads: a ragged workload, 32 prompts of 64 to 256 tokens by 8, log-normal answers, sampled
three times with the capture replaced and the model left out; slots of the cache that are read
against those that rows need.
"""

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from common import BenchConfig, draw_ids, draw_lengths, finish, flag, parse_args
from fast.fused import fuse
from sampler import Sampler
from sampling.attention import KVCache
from sampling.draws import sample, uniform
from sampling.steps import Graphs

SHAPE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
SHAPE |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
FREE = ("empty", "_reshape_alias", "_unsafe_view", "detach", "lift_fresh")  # launch nothing


class Launches(TorchDispatchMode):
    """Counts operations that are no views, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if not function.is_view and not any(free in name for free in FREE):
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_as_one(count: Counter):
    """Norms and attention are one kernel each on CUDA, whatever they are made of here."""

    def one(name, function):
        def counted(*args, **kwargs):
            count[name] += 1
            with _disable_current_modes():
                return function(*args, **kwargs)

        return counted

    whole = {name: getattr(F, name) for name in ("rms_norm", "scaled_dot_product_attention")}
    try:
        for name, function in whole.items():
            setattr(F, name, one(name, function))
        yield
    finally:
        for name, function in whole.items():
            setattr(F, name, function)


def launches(rows: int = 64, context: int = 450) -> dict[str, int]:
    """{part of a step: kernels}"""
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    forward, cache = fuse(model), KVCache(rows, 512, "meta")
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
    seeds, mode, positions = ids[:, 0].clone(), Launches(), ids + context
    cache.aim(0, positions, [context])
    with torch.no_grad():
        forward(cache, ids, positions)  # once before, which makes the cache
    with counted_as_one(mode.count), torch.no_grad(), mode:
        cache.aim(0, positions, [context])
        logits = forward(cache, ids, positions)
        model_alone = mode.count.total()
        u = uniform(seeds, positions[:, 0] + 1)
        hashed = mode.count.total() - model_alone
        sample(logits, 1.0, u)
    return {"kernels": mode.count.total(), "of_the_hash": hashed, "by_name": {**mode.count}}


def workload(longest: int) -> tuple[list, list]:
    """Prompts of 64 to 256 tokens, each for 8 rows, and how much each row says."""
    rng = random.Random(0)
    prompts = [draw_ids(rng, rng.randint(64, 256), 100) for _ in range(32)]
    return prompts, draw_lengths(rng, 8 * len(prompts), longest / 4, longest)


def ragged(longest: int, calls: int = 3) -> dict:
    """Of each call: captures, and slots of the cache read by slots needed."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "vocab_size": 128, "max_position_embeddings": 2048}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small)).eval()
    sampler = Sampler(model, SimpleNamespace(eos_token_id=1, pad_token_id=0), block=16)
    sampler.is_stop[:], sampler.graphs = False, True
    prompts, lengths = workload(longest)
    count = Counter()

    def forward(self, cache, first, ids, positions, widths):
        if ids.shape[1] == 1:
            count["read"] += len(ids) * -(-widths[0] // 8) * 8
        return torch.zeros(len(ids), small["vocab_size"])

    def step(self, rollout, widths, temperature, state):
        count["needed"] += int(((state.position + 1) * ~state.done).sum())
        taken(self, rollout, widths, temperature, state)

    def capture(self, step):
        count["captures"] += 1
        return step

    taken, kept, found = Sampler._step, (Sampler._forward, Sampler._step, Graphs.capture), []
    Sampler._forward, Sampler._step, Graphs.capture = forward, step, capture
    try:
        for _ in range(calls):
            count.clear()
            sampler.generate(prompts, 8, max_new_tokens=lengths)
            read = round(count["read"] / count["needed"], 3)
            found.append({"captures": count["captures"], "read_by_needed": read})
    finally:
        Sampler._forward, Sampler._step, Graphs.capture = kept
    return {"calls": found}


@dataclass
class Config(BenchConfig):
    pass


def main(config: Config) -> None:
    figures = {"launches": launches()}
    figures |= {f"256_rows_{longest}_tokens": ragged(longest) for longest in (256, 1024)}
    finish(config, **figures)


if __name__ == "__main__":
    main(parse_args(Config))
