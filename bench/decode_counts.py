"""What decoding on CUDA launches, captures and reads, counted without one.

    python bench/decode_counts.py

Kernels a step: the operations of a step of Qwen2.5-1.5B's shape in bfloat16, 64 rows at context
450, on tensors without values; a view is none, a norm and an attention are one each, as on CUDA.
Captures and reads: a ragged workload, 32 prompts of 64 to 256 tokens by 8, log-normal answers, is
sampled three times with the capture replaced and the model left out; slots of the cache that are
read against those that rows need.
"""

import random
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from common import BenchConfig, draw_ids, draw_lengths, finish, parse_args
from sampler import Sampler, fast
from sampling import steps
from sampling.attention import KVCache
from sampling.draws import sample

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
def patched(owner, **attributes):
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def counted_as_one(count: Counter):
    """Norms and attention are one kernel each on CUDA, whatever they are made of here."""

    def one(name):
        function = getattr(F, name)

        def counted(*args, **kwargs):
            count[name] += 1
            with _disable_current_modes():
                return function(*args, **kwargs)

        return counted

    names = ("rms_norm", "scaled_dot_product_attention")
    return patched(F, **{name: one(name) for name in names})


def kernels_counted(count: Counter):
    """Those of fast/, which need values, left out."""
    parts_of = import_module("fast.cuda_kernels").parts_of

    def attend(table, layer, query, key, *rest):
        count["attend"] += 1
        count["join"] += parts_of(len(query) * key.shape[1]) > 1
        return query.new_empty(len(query), query.shape[1] * query.shape[2])

    def add_norm(x, y, weight, eps):
        count["add_norm"] += 1
        return x.new_empty(x.shape)

    def gated(gate_up):
        count["gated"] += 1
        return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

    def sample(logits, temperature, u):
        count.update(("weigh", "pick"))
        return u.new_empty(len(u), dtype=torch.int64), u.new_empty(len(u))

    module = import_module("fast.cuda_step")
    return patched(module, attend=attend, add_norm=add_norm, gated=gated, sample=sample)


def launches(kernels: bool, rows: int = 64, context: int = 450) -> dict:
    """Of one step with or without the kernels of fast/, and of what each block of them begins with.

    by_name: of a step, most first
    """
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    with patched(Sampler, _try_out=lambda self: (True, kernels)):  # there are no values to try
        sampler = Sampler(model, tokenizer)
    cache = KVCache(rows, 512, "meta")
    like = torch.empty(1, 2, 1, 128, dtype=torch.bfloat16, device="meta")
    for layer in range(config.num_hidden_layers):
        cache.stores(layer, like, like)
    ids = torch.zeros(rows, context, dtype=torch.int64, device="meta")
    rollout = SimpleNamespace(ids=ids, logprobs=ids.float(), lengths=ids[:, 0], seeds=ids[:, 0])
    mode, index = Launches(), torch.arange(rows, device="meta")
    with torch.no_grad(), counted_as_one(mode.count), kernels_counted(mode.count):
        sampler.fast_forward = fast.forward_of(model, None)
        sampler.fast_step = fast.step_of(model, None, {}) if kernels else None
        with mode:
            state = steps.state_of(rollout, index, index + 999, sampler.block + 1)
            before = mode.count.total()
            mode.count.clear()
            sampler._step(cache, [context], 1.0, state)
    names = dict(mode.count.most_common())
    return {"a_step": mode.count.total(), "a_block": before, "by_name": names}


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
    sampler.is_stop[:], sampler.kernels, sampler.graphs = False, True, True
    prompts, lengths = workload(longest)
    count = Counter()

    def run(token, position, idle):
        count["read"] += int(((position + 1) * ~idle).sum())  # no slot but of its own row is read
        return torch.zeros(len(token), small["vocab_size"])

    def capture(self, step):
        count["captures"] += 1
        return step

    def step(self, cache, widths, temperature, state):
        count["needed"] += int(((state.position + 1) * ~state.done).sum())
        taken(self, cache, widths, temperature, state)

    model_step = SimpleNamespace(run=run, aim=lambda cache: None, reads=(), sample=sample)
    taken, found = Sampler._step, []
    with (
        patched(fast, step_of=lambda *_: model_step),
        patched(Sampler, _step=step),
        patched(steps.Graphs, capture=capture),
    ):
        for _ in range(calls):
            count.clear()
            sampler.generate(prompts, 8, max_new_tokens=lengths)
            read = round(count["read"] / count["needed"], 3)
            found.append({"captures": count["captures"], "read_by_needed": read})
    return {"calls": found}


def main(config: BenchConfig) -> None:
    figures = {"plain": launches(False), "kernels": launches(True)}
    figures |= {f"256_rows_{longest}_tokens": ragged(longest) for longest in (256, 1024)}
    finish(config, **figures)


if __name__ == "__main__":
    main(parse_args(BenchConfig))
