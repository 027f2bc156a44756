"""A step of RRR's paper size within --cache_tokens: the cache's peak against the bound.

    python bench/cache_bound.py                                  # 256 failures x 8, minutes
    python bench/cache_bound.py --failures 32 --cache_tokens 32768

A small random model with a long context: prompts of 100 to 299 tokens, failed attempts of up to 99,
reflections and retries of up to 200. Sampled at once and in parts; prints bytes of the cache that
are alive at the peak, seconds, and how many rows differ (a draw at the very edge of two words may
fall to either side, as log-probs differ by rounding).
"""

import random
import time
import weakref
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common import BenchConfig, finish, flag, parse_args
from rrr import Config as RunConfig
from rrr import roll_out
from sampler import Sampler
from sampling.attention import KVCache
from tasks import TASKS
from tasks.env import Env
from tiny import build_tokenizer
from training import batches, parts

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
ALIVE = {"now": 0, "peak": 0}


def count(change: int) -> None:
    ALIVE["now"] += change
    ALIVE["peak"] = max(ALIVE.values())


def watch_the_cache() -> None:
    make = KVCache._empty

    def made(*arguments):
        store = make(*arguments)
        count(store.nbytes)
        weakref.finalize(store, count, -store.nbytes)
        return store

    KVCache._empty = staticmethod(made)


def small_sampler() -> Sampler:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **SHAPE, **ends)
    return Sampler(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def made_up_failures(number: int) -> list[dict]:
    rng, problems = random.Random(0), TASKS["tiny"].generate("train", 0)[:number]
    return [
        {
            "problem": problem,
            "prompt_ids": [rng.randrange(5, 100) for _ in range(rng.randrange(100, 300))],
            "answer_ids": [7] * rng.randrange(10, 100),
        }
        for problem in problems
    ]


@dataclass
class Config(BenchConfig):
    failures: int = flag(256, "failures of the step, with 8 reflections each")
    cache_tokens: int = flag(2**18, "the bound")


def main(config) -> None:
    watch_the_cache()
    sampler, failures = small_sampler(), made_up_failures(config.failures)
    env, mine = Env(TASKS["tiny"], sampler.tokenizer), batches.share_of(failures, 0, 0)
    run = RunConfig(max_reflection_tokens=200, max_new_tokens=200)
    found, figures = [], {"rows": config.failures * run.group_size}
    for name, run.cache_tokens in (("at_once", 2**40), ("in_parts", config.cache_tokens)):
        ALIVE["peak"], started = ALIVE["now"], time.perf_counter()
        found.append(parts.in_parts(roll_out, env, sampler, mine, run).rollout)
        figures[name] = {"mb": ALIVE["peak"] / 1e6, "seconds": time.perf_counter() - started}
    figures["bound_mb"] = config.cache_tokens * sampler.token_bytes / 1e6
    differ = (found[0].ids != found[1].ids).any(1)
    figures["rows_that_differ"] = int(differ.sum())
    errors = (found[0].logprobs - found[1].logprobs)[~differ].abs()
    finish(config, **figures, logprob_error_of_others=float(errors.max()))


if __name__ == "__main__":
    main(parse_args(Config))
