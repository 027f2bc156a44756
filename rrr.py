"""Reflect, Retry, Reward (arXiv 2505.24726): teaches a language model to write reflections that
help it.

    python rrr.py                                     # the tiny model, a few minutes on two cores
    python rrr.py --collect --failures FILE.jsonl     # only gathers failures, for later runs

A failed attempt stands in context; the model is told that it was wrong, reflects, and tries again.
If the retry is right, GRPO rewards the reflection's tokens and no others: the model learns to
reflect, not to answer. Each step reads
like the paper: roll out reflections and retries, verify the retries, give every reflection its
    advantage; the shared
loss in loss.py does the rest.

Notation: F failures a step, G reflections of each, R retries after each of those; B = F * G * R
    rows. With several
processes each has its share of the F failures and of the rows; verdicts are gathered from all of
them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from evaluate import (
    before_and_after,
    compare_after_failure,
    evaluate_both,
    first_attempts,
    grade,
    load_sampler,
    prepare,
    probe,
    side_by_side,
)
from loss import BASELINES, KL_KINDS, divide_by_std, spread, subtract_baseline
from sampling.turns import first_turn_ids, follow_up_ids, seam_ids
from tasks.sources import naming, read_rows, take
from training import distributed
from training.checkpoint import write_text
from training.distributed import exchange, gather, on_first, own, rank, share
from training.flags import KL_HELP, TrainConfig, check_counts, exit_on_bad_input, flag, parse_args
from training.loop import check_run, contents_of, open_run, report, train, watcher
from training.policy import Batch, fingerprint, make_scorer, pick_problems, row_seeds, unzip

PIECE = 1024  # answers sampled in one go while failures are collected
COLUMNS = ("acc_t1", "retry_given_failure", "acc_t2", "well_formed_retry")
WATCHED = ("acc_t1", "acc_t2", "retry_given_failure", "reflection_tokens")
PAPER = {
    "beta": 0.001,
    "anchor": 0.001,
    "kl_on": "both",
    "lr": 5e-7,
    "failures_per_step": 256,
    "steps": 1750,
    "tries": 64,
}


@dataclass
class Config(TrainConfig):
    output_dir: str = flag("runs/rrr", "the run's directory: new, or to be resumed")
    preset: str | None = flag(
        None, f"paper: {PAPER} in place of these flags' defaults", choices=("paper",)
    )
    steps: int = flag(250, "training steps")
    lr: float = flag(5e-4, "peak learning rate of AdamW")
    schedule: str = flag("cosine", "after the warm-up", choices=("constant", "cosine"))

    failures: str | None = flag(
        None, "JSONL file of failures; default: collected first, into the run's directory"
    )
    collect: bool = flag(False, "only collect failures, into the --failures file")
    tries: int = flag(8, "answers sampled of a query at most, until one fails (the paper: 64)")
    queries: int = flag(2048, "training problems that failures are collected from")

    group: str = flag(
        "failure",
        "GRPO's group: G reflections on one failure, or G whole episodes of one query, of which those with "
        "a right first attempt end there and take no part",
        choices=("failure", "episode"),
    )
    failures_per_step: int = flag(16, "F, failures (or queries, with --group episode) a step")
    group_size: int = flag(8, "G, reflections of a failure")
    retries: int = flag(1, "R, retries after a reflection; its reward is their mean")
    max_reflection_tokens: int = flag(72, "token limit of a reflection")

    reward_on: str = flag(
        "reflection",
        "which tokens the retry's verdict rewards",
        choices=("reflection", "retry", "both"),
    )
    baseline: str = flag(
        "group_mean",
        "group_mean is GRPO's; none and leave_one_out are unbiased, without --normalise",
        choices=BASELINES,
    )
    normalise: bool = flag(
        True, "divide advantages by their group's standard deviation, as GRPO does"
    )
    kl: str = flag("token", KL_HELP, choices=KL_KINDS)
    beta: float = flag(0.005, "KL weight of the reflection (the paper: 0.001)")
    anchor: float = flag(4.0, "KL weight of the other tokens that --kl_on covers")
    kl_on: str = flag(
        "all",
        "which tokens are held near the base model: reflection; both, with the retry; all, with the first attempt. "
        "Rewarding reflections moves the weights that write the answers too: holding those keeps them as good as they "
        "were, and the gain in the reflection, where it can be credited",
        choices=("reflection", "both", "all"),
    )


def collect(sampler, tokenizer, task, split, config) -> tuple[list[dict], float]:
    """(failures, success rate): the first wrong answer to each query, of up to `tries`, if there is
    one.

    The rate is that of the first answers; later ones are asked of the queries that are still
    unfailed.
    """
    waiting, failures, success = list(split), [], None
    for attempt in trange(config.tries, desc="collecting failures", disable=rank() > 0):
        right = []
        for start in range(0, len(waiting), PIECE):
            piece = waiting[start : start + PIECE]
            mine = share(len(piece))
            problems, prompts = unzip(piece, mine)
            seeds = row_seeds(mine, "collect", config.seed, attempt, start)
            rollout = first_attempts(
                sampler, tokenizer, task, problems, prompts, 1, seeds, answer_limits(config)
            )
            texts, verdicts = grade(tokenizer, task, rollout, 0, problems)
            rows = zip(texts, verdicts.tolist(), rollout.row_ids(), strict=True)
            rows = [row for rows in exchange(list(rows)) for row in rows]
            for (problem, prompt), (text, verdict, ids) in zip(piece, rows, strict=True):
                if verdict:
                    right.append((problem, prompt))
                else:
                    answer = ids[len(prompt) :]
                    failures.append(
                        {
                            "problem": problem,
                            "answer": text,
                            "prompt_ids": prompt,
                            "answer_ids": answer,
                        }
                    )
        success = len(right) / len(split) if success is None else success
        waiting = right
        if not waiting:
            break
    if not failures:
        raise ValueError(
            f"no failure in {config.tries} answers to each of {len(split)} queries: take a harder task"
        )
    return failures, success


def write_failures(path: Path, failures: list[dict], success: float, model, config) -> None:
    """A new file, complete or not at all; its first line says where the failures came from."""
    origin = {
        "model": config.model,
        "fingerprint": fingerprint(model),
        "task": config.task,
        "seed": config.seed,
    }
    lines = [{"origin": origin | {"success_rate": success}}, *failures]
    on_first(write_text, path, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(failures)} failures, success rate {success:.3f}: {path}")


def read_failures(path: str, sampler, tokenizer, task, config) -> list[dict]:
    """The failures of a file, which must be of this model and task. Anything else is a ValueError
    naming the line."""
    (where, head), *rows = read_rows(path)
    with naming(where):
        (origin,) = take(head, origin=dict)
    expected = {"task": config.task, "fingerprint": fingerprint(sampler.model)}
    if any(origin.get(key) != value for key, value in expected.items()):
        was = f"of model {origin.get('model')} on task {origin.get('task')}"
        raise ValueError(
            f"{path} has failures {was}, not of --model and --task: collect their own with --collect"
        )
    if not rows:
        raise ValueError(f"{path} has no failures: collect some with --collect")
    after = len(seam_ids(tokenizer, task.reflect) + seam_ids(tokenizer, task.retry))
    after += config.max_reflection_tokens + config.max_new_tokens
    for where, failure in rows:
        with naming(where):
            problem, prompt, answer = take(failure, problem=dict, prompt_ids=list, answer_ids=list)
        try:
            known = prompt == first_turn_ids(tokenizer, task.prompt(problem), task.shots)
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(
                f"{where}: field 'prompt_ids' is not this tokenizer's prompt of 'problem'"
            )
        if not all(type(i) is int and 0 <= i < len(sampler.is_stop) for i in answer):
            raise ValueError(
                f"{where}: field 'answer_ids' must be ids below {len(sampler.is_stop)}"
            )
        if len(prompt) + len(answer) + after > sampler.limit:
            raise ValueError(
                f"{where}: with {after} tokens after it, it exceeds {sampler.limit} positions"
            )
    return [failure for _, failure in rows]


def roll_out(sampler, tokenizer, task, chosen, step, config):
    """G reflections on each of this rank's failures, R retries after each: (rollout, rewards (F, G,
    R), held (B, T)).

    Turns are 0 for the failed attempt, 1 for the reflection, 2 for the retry, which goes on from
    the cache of the exact ids of all that stands before it. `held` marks the attempt's tokens,
    which were sampled long ago.
    """
    G, R, mine = config.group_size, config.retries, share(len(chosen))
    failures = chosen[mine.start : mine.stop]
    before = [failure["prompt_ids"] + failure["answer_ids"] for failure in failures]
    seams = follow_up_ids(tokenizer, task.reflect, [ids[-1] for ids in before])
    contexts = [ids + seam for ids, seam in zip(before, seams, strict=True)]
    seeds = row_seeds(mine, "reflect", config.seed, step, each=G)
    reflected = sampler.generate(contexts, G, seeds=seeds, **reflection_limits(config))
    rollout = retry(sampler, tokenizer, task, reflected, config)
    problems = [failure["problem"] for failure in failures for _ in range(G * R)]
    # turns are renumbered below
    rewards = grade(tokenizer, task, rollout, 1, problems)[1].view(len(failures), G, R)

    lengths = torch.tensor([[len(f["prompt_ids"]), len(f["answer_ids"])] for f in failures]).view(
        -1, 2
    )
    # (B, 1) each
    prompt, answer = lengths.repeat_interleave(G * R, dim=0).to(rollout.ids.device).split(1, dim=1)
    position = torch.arange(rollout.ids.shape[1], device=rollout.ids.device)
    failed = position < prompt + answer  # (B, T)
    rollout.turn = torch.where(failed, 0, rollout.turn + (rollout.turn >= 0))
    return rollout, rewards, failed & (position >= prompt)


def roll_out_episodes(sampler, tokenizer, task, chosen, step, config):
    """G whole episodes of each of this rank's queries: (rollout, rewards (N, G, R), present (N,
    G)).

    Only episodes whose first attempt failed are present and have rows.
    """
    mine = share(len(chosen))
    problems, prompts = unzip(chosen, mine)
    N, G, R = len(prompts), config.group_size, config.retries
    seeds = row_seeds(mine, "episode", config.seed, step, each=G)
    first = sampler.generate(prompts, G, seeds=seeds, **answer_limits(config))
    problems = [problem for problem in problems for _ in range(G)]
    rows = (grade(tokenizer, task, first, 0, problems)[1] == 0).nonzero().flatten().tolist()
    last = first.last_ids()
    seams = follow_up_ids(tokenizer, task.reflect, [last[row] for row in rows])
    reflected = sampler.extend(first, seams, rows=rows, **reflection_limits(config))
    rollout = retry(sampler, tokenizer, task, reflected, config)
    verdicts = grade(
        tokenizer, task, rollout, 2, [problems[row] for row in rows for _ in range(R)]
    )[1]
    rewards, present = torch.zeros(N * G, R), torch.zeros(N * G)
    rewards[rows], present[rows] = verdicts.view(len(rows), R), 1.0
    return rollout, rewards.view(N, G, R), present.view(N, G)


def answer_limits(config) -> dict:
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}


def reflection_limits(config) -> dict:
    return {"max_new_tokens": config.max_reflection_tokens, "temperature": config.temperature}


def retry(sampler, tokenizer, task, reflected, config):
    seams = follow_up_ids(tokenizer, task.retry, reflected.last_ids())
    return sampler.extend(reflected, seams, config.retries, **answer_limits(config))


def turn_advantages(rewards: Tensor, present: Tensor, config) -> Tensor:
    """GRPO over each group: (B, 2), the advantages of every row's reflection and of its retry.

    A reflection is worth the mean reward of its R retries, against the other reflections of its
    group. The retry's own tokens are rewarded in the ablations alone.
    """
    N, G, R = rewards.shape
    everyone = present[..., None].expand(N, G, R).reshape(N, G * R)
    reflection = group_advantages(rewards.mean(-1), present, config)[..., None].expand(N, G, R)
    retry = group_advantages(rewards.reshape(N, G * R), everyone, config).view(N, G, R)
    rewarded = {"reflection": (1, 0), "retry": (0, 1), "both": (1, 1)}[config.reward_on]
    both = torch.stack([reflection * rewarded[0], retry * rewarded[1]], dim=-1)  # (N, G, R, 2)
    return both[present.bool()].view(-1, 2)


def group_advantages(rewards: Tensor, present: Tensor, config) -> Tensor:
    """Rewards (N, G) against their group's mean, over its standard deviation. No variance: no
    gradient, no NaN."""
    advantages = subtract_baseline(rewards, config.baseline, present)
    return divide_by_std(advantages, 1, present) if config.normalise else advantages


def make_batch(rollout, rewards, present, held, config) -> Batch:
    """Verdicts -> an advantage and a KL weight for every token; the failed attempt, turn 0, has no
    advantage."""
    rewards, present = gather(rewards), gather(present)
    advantages = F.pad(turn_advantages(rewards, present, config), (1, 0))  # (B, 3)
    weights = [
        config.anchor * (config.kl_on == "all"),
        config.beta,
        config.anchor * (config.kl_on != "reflection"),
    ]
    per_turn = (advantages, torch.tensor(weights).expand_as(advantages))
    advantages, kl_coef = (spread(own(x, len(rollout.ids)), rollout) for x in per_turn)
    if held is not None:
        kl_coef = kl_coef + weights[0] * held
    figures = {"stage": 1} | (
        {"reward": float(rewards[present.bool()].mean())} if present.any() else {}
    )
    return Batch(rollout, advantages, kl_coef, len(per_turn[0]), figures, held)


def check(config) -> None:
    check_counts(config)
    if config.temperature <= 0:
        raise ValueError(
            "--temperature must be above 0 in training: greedy reflections have no policy gradient"
        )
    if config.group_size < 2 and (config.baseline != "none" or config.normalise):
        raise ValueError(
            "--group_size 1 has nothing to compare with: take 2, or --baseline none --normalise False"
        )
    if config.kl != "token" and config.kl_on == "all" and config.group == "failure":
        raise ValueError(
            "--kl_on all holds attempts that were sampled long ago, where only --kl token means anything"
        )
    path = Path(config.failures or "")
    if config.collect and (not config.failures or path.exists() or not path.parent.is_dir()):
        raise ValueError(
            "--collect writes a new file: name it with --failures, one that does not exist yet"
        )


def known_source(split, sampler, tokenizer, task, config) -> list | None:
    """What steps draw from: whole episodes the problems themselves, else failures. None: they are
    to be collected."""
    if config.group == "episode":
        return split
    collected = Path(config.output_dir) / "failures.jsonl"  # if a run to be resumed came so far
    path = config.failures or (str(collected) if config.resume and collected.exists() else None)
    return read_failures(path, sampler, tokenizer, task, config) if path else None


def with_preset(config):
    """The paper's numbers in place of all flags that are at their defaults."""
    paper = PAPER if config.preset == "paper" else {}
    return replace(
        config, **{k: v for k, v in paper.items() if getattr(config, k) == getattr(Config, k)}
    )


def main(config: Config) -> None:
    distributed.start()
    config = with_preset(config)
    with exit_on_bad_input():
        check(config)
        limits = {"train": config.queries, "validation": config.final_problems}
        task, sampler, tokenizer, splits = prepare(config, limits)
        if task.given and config.group == "episode":
            raise ValueError(
                f"--group episode: the first attempts of task '{task.name}' are not the model's own"
            )
        if config.collect:
            failures, success = collect(sampler, tokenizer, task, splits["train"], config)
            write_failures(Path(config.failures), failures, success, sampler.model, config)
            return distributed.finish()
        check_run(config)
        source, success = known_source(splits["train"], sampler, tokenizer, task, config), None
        if not config.resume:
            probe(
                sampler,
                tokenizer,
                task,
                splits["train"],
                config,
                "reflect_retry",
                ["retry_given_failure"],
            )
        if source is None:
            source, success = collect(sampler, tokenizer, task, splits["train"], config)
        run = open_run(config, contents_of(sampler.model, tokenizer, **splits, failures=source))
        if success is not None:
            write_failures(run / "failures.jsonl", source, success, sampler.model, config)
        scorer = make_scorer(sampler.model, config)
    shared = (tokenizer, task, *zip(*splits["validation"], strict=True), config)

    def step_batch(step: int, state: dict) -> Batch:
        chosen, held = pick_problems(source, config.seed, step, config.failures_per_step), None
        if config.group == "failure":
            rollout, rewards, held = roll_out(sampler, tokenizer, task, chosen, step, config)
            present = torch.ones(rewards.shape[:2])
        else:
            rollout, rewards, present = roll_out_episodes(
                sampler, tokenizer, task, chosen, step, config
            )
        rollout.cache = None  # its memory is wanted for the update
        return make_batch(rollout, rewards, present, held, config)

    evaluate_now = watcher(sampler, *shared, "reflect_retry", WATCHED)
    train(config, run, scorer, sampler, tokenizer, config.steps, step_batch, evaluate_now, {})
    models = {
        name: load_sampler(path, tokenizer, config)
        for name, path in before_and_after(run, config).items()
    }
    results = {
        name: evaluate_both(model, *shared, method="reflect_retry")
        for name, model in models.items()
    }
    results["controls"] = compare_after_failure(models["base"], models["trained"], *shared)
    on_first(
        write_text,
        run / "reflections.txt",
        side_by_side(models["base"], models["trained"], *shared),
    )
    report(run, results, len(splits["validation"]), COLUMNS)
    distributed.finish()


if __name__ == "__main__":
    main(parse_args(Config))
