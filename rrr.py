"""Reflect, Retry, Reward (arXiv 2505.24726): teaches a language model to write helpful reflections.

    python rrr.py                                     # the tiny model, three minutes on two cores
    python rrr.py --collect --failures FILE.jsonl     # only gathers failures, for later runs

A failed attempt stands in context; the model is told that it was wrong, reflects, and tries again.
If the retry is right, GRPO rewards the reflection's tokens and no others: the model learns to
reflect, not to answer. Each step reads like the paper: roll out reflections and retries, verify the
retries, give every reflection its advantage; the shared loss in loss.py does the rest.

Notation: N failures a step, G reflections of each, R retries after each of those; B = N * G * R
rows. With several processes each has its share of the N failures and of the rows; verdicts are
gathered from all of them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluate import Exam, conclude
from loss import BASELINES, KL_KINDS, deviation, divide_by_std, spread, subtract_baseline
from sampling.rollout import Rollout, rollout_of
from tasks.env import Verdicts
from training import distributed
from training.announce import announce, announce_time
from training.batches import pick, share_of
from training.controls import with_controls
from training.distributed import exchange, gather, own
from training.failures import check_day, read_failures, write_failures
from training.fitting import papers, tasks_own
from training.flags import KL_HELP, LR_HELP, RUN, TrainConfig, exit_on_bad_input, flag, run_script
from training.loop import train
from training.models import make_scorer
from training.parts import in_parts
from training.policy import Batch
from training.progress import over
from training.run import contents_of, has_state, open_run, saving
from training.setup import prepare, probe, sampler_of

PIECE = 1024  # answers sampled in one go while failures are collected
COLUMNS = ("acc_t1", "retry_given_failure", "acc_t2", "well_formed_retry")
WATCHED = ("acc_t1", "acc_t2", "retry_given_failure", "reflection_tokens")


@dataclass
class Config(TrainConfig):
    output_dir: str = flag("runs/rrr", "the run's directory: new, or to be resumed", group=RUN)
    steps: int = flag(250, "training steps", grows=True, paper=papers(1750))
    lr: float = flag(5e-4, LR_HELP, other=papers(5e-7))
    schedule: str = flag("cosine", "after the warm-up", choices=("constant", "cosine"))

    failures: str | None = flag(
        None, "JSONL file of failures; default: collected first, into the run's directory"
    )
    collect: bool = flag(False, "only collect failures, into the --failures file")
    tries: int = flag(8, "answers sampled of a query at most, until one fails", paper=papers(64))
    queries: int = flag(2048, "training problems that failures are collected from")

    group: str = flag(
        "failure",
        "GRPO's group: G reflections on one failure, or G whole episodes of one query, of which "
        "those with a right first attempt end there and take no part",
        choices=("failure", "episode"),
    )
    failures_per_step: int = flag(
        16, "N, failures (or queries, with --group episode) a step", paper=papers(256)
    )
    group_size: int = flag(8, "G, reflections of a failure")
    retries: int = flag(1, "R, retries after a reflection; its reward is their mean")
    max_reflection_tokens: int = flag(
        72, "token limit of a reflection", other=tasks_own("max_reflection_tokens")
    )

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
    beta: float = flag(0.005, "KL weight of the reflection", other=papers(0.001))
    anchor: float = flag(
        4.0, "KL weight of the other tokens that --kl_on covers", other=papers(0.001)
    )
    kl_on: str = flag(
        "all",
        "which tokens are held near the base model: reflection; both, with the retry; all, with "
        "the first attempt. Rewarding reflections moves the weights that write the answers too: "
        "holding those keeps them as good as they were, and the gain in the reflection, where it "
        "can be credited",
        choices=("reflection", "both", "all"),
        other=papers("both"),
    )
    controls: bool = flag(
        True,
        "False leaves out the table after the base model's failures, most of the time at the end",
    )

    @property
    def rows(self) -> int:
        return self.failures_per_step * self.group_size * self.retries

    @property
    def rows_each(self) -> int:
        return self.group_size * self.retries

    @property
    def passes(self) -> int:
        return 22 if self.controls else 5  # see controls.with_controls

    shown = {"retry": "reward", "kl_reflection": "kl_t2"}


class Episodes(NamedTuple):
    """What a step samples on this rank: N failures (or queries), G reflections, R retries each.

    Turns are 0 for the failed attempt, 1 for the reflection, 2 for the retry.
    """

    rollout: Rollout  # B rows, those that are present
    retries: Verdicts  # (B,)
    present: Tensor  # (N, G) of 0 and 1: an episode whose first attempt is right has no rows
    held: Tensor | None = None  # (B, T) bool: the stored attempt's tokens, sampled long ago


def roll_out(env, sampler, mine, config) -> Episodes:
    """G reflections on each of this rank's failures, R retries after each of those."""
    failures, G = mine.items, config.group_size
    parts = [[failure["prompt_ids"], failure["answer_ids"]] for failure in failures]
    failed = rollout_of(parts, 1, sampler)
    seeds = mine.seeds("reflect", G)
    more = env.follow_up(failed, "reflect")
    reflected = sampler.extend(failed, more, G, seeds=seeds, **reflection_limits(config))
    rollout = retry(env, sampler, reflected, config)
    retries = env.verdicts(rollout, 2, [failure["problem"] for failure in failures])
    later = rollout.ids.shape[1] - failed.ids.shape[1]
    held = F.pad(failed.action_mask, (0, later))[rollout.prompt_index]  # (B, T)
    return Episodes(rollout, retries, torch.ones(len(failures), G), held)


def roll_out_episodes(env, sampler, mine, config) -> Episodes:
    """G whole episodes of each of this rank's queries; a right first attempt ends its episode."""
    queries, G = mine.items, config.group_size
    seeds = mine.seeds("episode", G)
    first = sampler.generate(env.prompts(queries), G, seeds=seeds, **answer_limits(config))
    wrong = env.verdicts(first, 0, queries).right == 0
    rows = wrong.nonzero().flatten().tolist()
    more = env.follow_up(first, "reflect", rows)
    reflected = sampler.extend(first, more, rows=rows, free=True, **reflection_limits(config))
    rollout = retry(env, sampler, reflected, config)
    retries = env.verdicts(rollout, 2, queries)
    return Episodes(rollout, retries, wrong.float().view(-1, G))


def retry(env, sampler, reflected, config) -> Rollout:
    """R retries after each reflection, from the cache of the exact ids of all that was said."""
    more = env.follow_up(reflected, "retry")
    return sampler.extend(reflected, more, config.retries, free=True, **answer_limits(config))


def answer_limits(config) -> dict:
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}


def reflection_limits(config) -> dict:
    return {"max_new_tokens": config.max_reflection_tokens, "temperature": config.temperature}


def turn_advantages(rewards: Tensor, present: Tensor, config) -> Tensor:
    """GRPO over each group: (B, 2), the advantages of every row's reflection and of its retry.

    A reflection is worth the mean reward of its R retries, against the other reflections of its
    group. The retry's own tokens are rewarded in the ablations alone.
    """
    N, G, R = rewards.shape
    everyone = present[..., None].expand(N, G, R).reshape(N, G * R)
    reflection = group_advantages(rewards.mean(-1), present, config)[..., None].expand(N, G, R)
    retried = group_advantages(rewards.reshape(N, G * R), everyone, config).view(N, G, R)
    # the paper's mask: the verdict on the retry reaches the reflection's tokens, and no others
    rewarded = {"reflection": (1, 0), "retry": (0, 1), "both": (1, 1)}[config.reward_on]
    both = torch.stack([reflection * rewarded[0], retried * rewarded[1]], dim=-1)  # (N, G, R, 2)
    return both[present.bool()].view(-1, 2)


def group_advantages(rewards: Tensor, present: Tensor, config) -> Tensor:
    """Rewards (N, G) against their group's mean, over its deviation; without any: 0, no NaN."""
    advantages = subtract_baseline(rewards, config.baseline, present)
    return divide_by_std(advantages, 1, present) if config.normalise else advantages


def make_batch(episodes: Episodes, config) -> Batch:
    """Verdicts -> an advantage and a KL weight for every token; turn 0 has no advantage."""
    rollout, held = episodes.rollout, episodes.held
    present = gather(episodes.present)  # (N, G), of all ranks
    rewards = torch.zeros(*present.shape, config.retries)
    rewards[present.bool()] = gather(episodes.retries.rewards).view(-1, config.retries)
    advantages = F.pad(turn_advantages(rewards, present, config), (1, 0))  # (B, 3)
    holds_first, holds_retry = config.kl_on == "all", config.kl_on != "reflection"
    weights = [config.anchor * holds_first, config.beta, config.anchor * holds_retry]
    kl_coef = torch.tensor(weights).expand_as(advantages)
    per_token = [spread(own(x, len(rollout.ids)), rollout) for x in (advantages, kl_coef)]
    if held is not None:
        per_token[1] += weights[0] * held  # not sampled here, so that `spread` gave it 0
    std = deviation(subtract_baseline(rewards.mean(-1), config.baseline, present), 1, present)
    figures = {"stage": 1, "advantage_std": float(std.sum() / (std > 0).sum().clamp_min(1))}
    if present.any():
        figures["reward"] = float(rewards[present.bool()].mean())
    retried = own(rewards[present.bool()].view(-1, 1), len(rollout.ids))  # (B, 1)
    judged = F.pad(F.pad(retried, (1, 0), value=torch.nan), (1, 0))  # wrong, not judged, the retry
    return Batch(rollout, *per_token, len(advantages), figures, held, judged)


def collect(env, sampler, queries: list[dict], config) -> tuple[list[dict], float]:
    """(failures, success rate): the first wrong answer to each query, of up to `tries`, if any.

    The rate is that of the first answers; later ones are asked of the queries still unfailed.
    """
    waiting, failures, success = list(queries), [], None
    for attempt in over(range(config.tries), "collecting failures", sampler):
        right = []
        for start in range(0, len(waiting), PIECE):
            piece = waiting[start : start + PIECE]
            mine = share_of(piece, config.seed, attempt, start)
            answers = exchange(in_parts(answer_all, env, sampler, mine, config, each=1))
            answers = [answer for part in answers for answer in part]
            for problem, prompt, (text, verdict, ids) in zip(
                piece, env.prompts(piece), answers, strict=True
            ):
                if verdict:
                    right.append(problem)
                    continue
                failure = {"problem": problem, "answer": text, "prompt_ids": prompt}
                failures.append(failure | {"answer_ids": ids[len(prompt) :]})
        success = len(right) / len(queries) if success is None else success
        waiting = right
        if not waiting:
            break
    if not failures:
        raise ValueError(
            f"no failure in {config.tries} answers to each of {len(queries)} queries: "
            "take a harder task"
        )
    return failures, success


def answer_all(env, sampler, mine, config) -> list[tuple[str, float, list[int]]]:
    """(text, verdict, ids of the whole row) of one answer to each of this rank's queries."""
    seeds = mine.seeds("collect")
    rollout = env.first_attempts(sampler, mine.items, 1, seeds, **answer_limits(config))
    said = env.verdicts(rollout, 0, mine.items)
    return [*zip(said.texts, said.right.tolist(), rollout.row_ids(), strict=True)]


def known_pool(queries: list[dict], env, sampler, config) -> list | None:
    """What steps draw from: whole episodes the queries, else failures. None: to be collected."""
    if config.group == "episode":
        return queries
    collected = Path(config.output_dir) / "failures.jsonl"  # if a run to be resumed came so far
    found = str(collected) if config.resume and collected.exists() else None
    path = config.failures or found
    return read_failures(path, env, sampler, config) if path else None


def check(config) -> None:
    if config.temperature <= 0:
        raise ValueError(
            "--temperature must be above 0 in training: greedy reflections have no policy gradient"
        )
    if config.group_size < 2 and (config.baseline != "none" or config.normalise):
        raise ValueError(
            "--group_size 1 has nothing to compare with: take 2, or "
            "--baseline none --normalise False"
        )
    if config.kl != "token" and config.kl_on == "all" and config.group == "failure":
        raise ValueError(
            "--kl_on all holds attempts that were sampled long ago, "
            "where only --kl token means anything"
        )
    path = Path(config.failures or "")
    if config.collect and (not config.failures or path.exists() or not path.parent.is_dir()):
        raise ValueError(
            "--collect writes a new file: name it with --failures, one that does not exist yet"
        )


def main(config: Config) -> None:
    distributed.start(config)
    with exit_on_bad_input():
        check(config)
        limits = {"train": config.queries, "validation": config.final_problems}
        env, sampler, splits = prepare(config, limits, day=check_day(config))
        queries, validation = splits["train"], splits["validation"]
        if env.task.given and config.group == "episode":
            raise ValueError(
                f"--group episode: the first attempts of task '{env.task.name}' are not the "
                "model's own"
            )
        if config.collect:
            found = collect(env, sampler, queries, config)
            write_failures(Path(config.failures), found, sampler.model, config, env.day)
            return distributed.finish()
        announce(config, env, sampler, splits)
        pool, success = known_pool(queries, env, sampler, config), None
        exam = Exam(env, config, "reflect_retry")
        if not has_state(config):
            probe(partial(exam, sampler), queries, config, ["retry_given_failure"])
        if pool is None:
            pool, success = collect(env, sampler, queries, config)
        failures = pool if config.group == "failure" else None
        run = open_run(config, contents_of(env, sampler.model, splits, failures), env.day)
        if success is not None:
            path = run / "failures.jsonl"
            with saving(run):
                write_failures(path, (pool, success), sampler.model, config, env.day)
        scorer = make_scorer(sampler.model, config)

    def step_batch(step: int, state: dict) -> Batch:
        mine = pick(pool, config.failures_per_step, config.seed, step)
        sample = roll_out if config.group == "failure" else roll_out_episodes
        return make_batch(in_parts(sample, env, sampler, mine, config), config)

    announce_time(config, exam.pace(), len(validation))
    hooks = exam.hooks(step_batch, sampler, validation, WATCHED)
    train(config, run, scorer, sampler, hooks, {})
    find = partial(sampler_of, scorer, sampler, env, config)
    results = with_controls(exam, run, validation, find)
    conclude(config, results, len(validation), COLUMNS)
    distributed.finish()


if __name__ == "__main__":
    run_script(main, Config)
