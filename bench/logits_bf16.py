"""What rounding logits to bfloat16 costs, beside the error of all the rest in bfloat16.

    python bench/logits_bf16.py --model DIR

The model in bfloat16 samples answers twice, with logits that are products in float32 (as sampler
and scorer compute them) and with such products rounded to bfloat16; both are scored in both ways.
The model in float32 says how far off each is. Errors are of sampled tokens' log-probs, in nats.
"""

import sys
from dataclasses import dataclass

import torch

from common import BenchConfig, finish, flag, load, parse_args, print_table
from loss import logits_of
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training.loop import RATIOS
from training.models import cast
from training.scorer import Scorer


@dataclass
class Config(BenchConfig):
    model: str = flag("models/tiny", "model directory or hub name")
    task: str = flag("countdown", "whose prompts are answered")
    prompts: int = flag(8, "prompts")
    new_tokens: int = flag(64, "tokens of an answer at most")


def rounded(hidden, head):
    return (hidden @ head.T).float()


WAYS = {"float32": logits_of, "rounded": rounded}


def compute_logits(way: str) -> None:
    """From now on, in sampler and scorer."""
    for module in ("loss", "sampler", "fast.fused"):
        sys.modules[module].logits_of = WAYS[way]


def gap(name: str, logprobs, others, kl=None) -> dict:
    """A row of the table: the sizes of differences, and the share of ratios outside RATIOS."""
    difference = logprobs - others
    outside = (difference.exp() < RATIOS[0]) | (difference.exp() > RATIOS[1])
    sizes = {"mean": difference.abs().mean(), "largest": difference.abs().max()}
    sizes |= {"ratio_outside": outside.double().mean()} | ({} if kl is None else {"KL": kl.mean()})
    return {"log-probs of": name} | {k: float(f"{float(v):.2g}") for k, v in sizes.items()}


@torch.no_grad()
def main(config: Config) -> None:
    exact, (model, tokenizer) = load(config.model, config)[0], load(config.model, config)
    env, rows, model = Env(TASKS[config.task], tokenizer), [], cast(model, torch.bfloat16)
    prompts = env.prompts(env.task.generate("train", config.seed)[: config.prompts])
    for drawn in WAYS:
        compute_logits(drawn)
        rollout = Sampler(model, tokenizer).generate(prompts, max_new_tokens=config.new_tokens)
        mask, scored = rollout.action_mask, {}
        for way in WAYS:
            compute_logits(way)
            scored[way] = [x[mask] for x in Scorer(model, exact)(rollout.ids, mask)]
            logprobs, ref, kl, entropy = scored[way]
            rows.append(gap(f"{way} scorer, {drawn} sampler", logprobs, rollout.logprobs[mask]))
            rows.append(gap(f"{way} scorer, the model in float32", logprobs, ref, kl))
        ways = [scored[way] for way in WAYS]
        rows.append(gap("rounded scorer, float32 scorer", ways[1][0], ways[0][0]))
    print_table(tuple(rows[1]), [tuple(row.get(key, "") for key in rows[1]) for row in rows])
    moved = float((ways[1][3] - ways[0][3]).abs().mean())
    about = {"tokens": len(ref), "entropy": float(entropy.mean()), "entropy_moved_by": moved}
    finish(config, **about, errors=rows)


if __name__ == "__main__":
    main(parse_args(Config))
