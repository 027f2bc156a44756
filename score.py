"""SCoRe (arXiv 2409.12917): teaches a language model to correct itself, from its own attempts.

    python score.py                        # the tiny model, 90 seconds on two cores
    python score.py --model DIR --task countdown

Stage I trains the second attempt while a strong KL holds the first one at the base model; Stage II
trains both, with a bonus on the second attempt for being better than the first. Each step reads
like the paper: roll out two attempts, verify them, turn verdicts into one advantage a token; the
shared loss in loss.py does the rest.

Notation: P problems a step, G first attempts of each, K second attempts of each of those;
B = P * G * K rows. With several processes each has its share of the P problems and of the rows;
verdicts are gathered from all of them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from evaluate import Exam, conclude
from loss import BASELINES, deviation, divide_by_std, spread, subtract_baseline
from sampling.rollout import Rollout
from tasks.env import Verdicts
from training import distributed
from training.announce import announce, announce_time
from training.batches import pick
from training.distributed import gather, own
from training.fitting import papers
from training.flags import RUN, TrainConfig, exit_on_bad_input, flag, run_script
from training.loop import train
from training.models import make_scorer
from training.parts import in_parts
from training.policy import Batch
from training.run import check_run, contents_of, has_state, open_run
from training.setup import prepare, probe, sampler_of

CALM = 10  # steps in a row with little KL, before --kl_target lets go
BETA2_RANGE = 100  # how far from --beta2 it may move, as a factor either way


@dataclass
class Config(TrainConfig):
    output_dir: str = flag("runs/score", "the run's directory: new, or to be resumed", group=RUN)
    stage1_steps: int = flag(
        60, "steps of Stage I (Eq. 3); 0 leaves it out", least=0, paper=papers(600, code=300)
    )
    stage2_steps: int = flag(
        260, "steps of Stage II (Eq. 4)", least=0, grows=True, paper=papers(2400, code=1200)
    )
    single_turn: bool = flag(
        False, "train first attempts alone, in all steps: the paper's 'w/o multi-turn training'"
    )
    problems: int = flag(16, "P, problems a step", paper=papers(32, code=8))
    group_size: int = flag(4, "G, first attempts a problem")
    second_attempts: int = flag(
        4, "K, second attempts of each first one; 1 compares across the problem's G instead"
    )
    alpha: float = flag(
        10.0, "weight of the bonus alpha * (r2 - r1) on the second attempt in Stage II; 0: no bonus"
    )
    gamma: float = flag(
        0.0, "share of the second attempt's reward credited to the first; the paper uses 0", most=1
    )
    beta1: float = flag(
        0.05, "KL weight of every attempt, but of the first in Stage I", other=papers(0.01)
    )
    beta2: float = flag(
        1.0, "KL weight of the first attempt in Stage I", other=papers(0.1, code=0.25)
    )
    kl_target: float | None = flag(
        None,
        "adapt beta2 to keep the first attempt's KL in Stage I near this many nats: it rises by "
        f"half beyond 1.5 of them, and falls by a third after {CALM} steps below 1 / 1.5",
        above=0,
    )
    reference: str = flag(
        "base",
        "what Stage II's KL refers to: base, or stage1, its result",
        choices=("base", "stage1"),
    )
    baseline: str = flag(
        "leave_one_out",
        "none or leave_one_out (both unbiased), or group_mean. A baseline over the second attempts "
        "of one first attempt removes -alpha * r1, which is constant there: the bonus becomes a "
        "weight of 1 + alpha on turn 2",
        choices=BASELINES,
    )
    normalise: str = flag(
        "joint",
        "divide advantages by their standard deviation: none; joint, one for both turns, keeps the "
        "turns' ratio, but not the scale against the KL; per_turn cancels alpha altogether, where "
        "a baseline has made it a weight",
        choices=("none", "joint", "per_turn"),
    )
    offline_ratio: float = flag(
        0.0, "share of steps in which the base model writes the first attempts", most=1
    )

    @property
    def steps(self) -> int:
        return self.stage1_steps + self.stage2_steps

    @property
    def rows(self) -> int:
        each = 1 if self.single_turn else self.second_attempts
        return self.problems * self.group_size * each

    @property
    def last_stage(self) -> int:
        return 2 if self.stage2_steps or self.single_turn else 1


def is_offline(step: int, config) -> bool:
    """Spreads the offline steps evenly over the run."""
    return int((step + 1) * config.offline_ratio) > int(step * config.offline_ratio)


def stage_of(step: int, config) -> int:
    return 1 if step < config.stage1_steps and not config.single_turn else 2


class Attempts(NamedTuple):
    """What a step samples on this rank: P problems, G first attempts of each, K second of those."""

    rollout: Rollout  # B = P * G * K rows of two turns; single-turn: P * G rows of one
    v1: Verdicts  # (P * G,) on first attempts
    v2: Verdicts | None  # (B,) on second ones; None: single-turn
    offline: bool  # the first attempts are not the policy's own


def roll_out(env, sampler, mine, config, base=None) -> Attempts:
    """Two attempts at each of this rank's problems.

    The second attempt stands on the very ids of the first, and goes on from their cache. Offline, a
    `base` (a sampler of the base model) or the data has written the first attempts: they are not
    sampled from the policy, and get no gradient.
    """
    G, K = config.group_size, config.second_attempts
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    y1 = env.first_attempts(base or sampler, mine.items, G, mine.seeds("first", G), **limits)
    v1 = env.verdicts(y1, 0, mine.items)
    if config.single_turn:
        return Attempts(y1, v1, None, offline=False)
    offline = base is not None or env.task.given is not None
    seeds = mine.seeds("second", G * K) if offline else None  # else they derive from those of y1
    y2 = sampler.extend(y1, env.follow_up(y1, "correct"), K, seeds=seeds, free=True, **limits)
    v2 = env.verdicts(y2, 1, mine.items)
    return Attempts(y2, v1, v2, offline)


def returns(r1: Tensor, r2: Tensor | None, stage: int, config) -> tuple[Tensor, Tensor | None]:
    """What each attempt is rewarded for: (P, G) and (P, G, K).

    Stage I, Eq. 3:  the second attempt gets r2, the first nothing.
    Stage II, Eq. 4: the first gets r1, the second r2 plus the bonus alpha * (r2 - r1).
    gamma > 0 also credits the first attempt with what the second gets (appendix A.2 argues for 0).
    """
    if r2 is None:
        return r1, None
    if stage == 1:
        first, second = torch.zeros_like(r1), r2  # Eq. 3: its KL alone moves the first attempt
    else:
        first, second = r1, r2 + config.alpha * (r2 - r1[..., None])  # Eq. 4 and the bonus
    return first + config.gamma * second.mean(-1), second


def raw_advantages(r1: Tensor, r2: Tensor | None, stage: int, config, offline=False) -> Tensor:
    """What each attempt got more than those that it is compared with: (B, turns).

    A second attempt is compared with the K after the same first one, or where there is just one
    with those of its problem. Offline, the first attempt has no advantage.
    """
    first, second = returns(r1, r2, stage, config)
    a1 = subtract_baseline(first, config.baseline)
    if second is None:
        return a1.reshape(-1, 1)
    P, G, K = second.shape
    siblings = second.view(P * G, K) if K > 1 else second.view(P, G)
    a2 = subtract_baseline(siblings, config.baseline)
    a1 = a1[..., None].expand(P, G, K) * (not offline)
    return torch.stack([a1.reshape(-1), a2.reshape(-1)], dim=1)


def turn_advantages(r1: Tensor, r2: Tensor | None, stage: int, config, offline=False) -> Tensor:
    """The advantage of every token of each turn: (B, turns)."""
    raw = raw_advantages(r1, r2, stage, config, offline)
    return raw if config.normalise == "none" else divide_by_std(raw, *spread_over(raw, config))


def spread_over(raw: Tensor, config) -> tuple[int | None, Tensor]:
    """What is to have one deviation: (dimension of `raw`, or None: all of it; what counts there).

    A turn that is not trained doesn't count in the joint deviation.
    """
    trained = raw.ne(0).any(dim=0).expand_as(raw).to(raw)
    return 0 if config.normalise == "per_turn" else None, trained


def deviations(raw: Tensor, config) -> dict[str, float]:
    """What `turn_advantages` divides by; with --normalise none: what joint would."""
    stds = deviation(raw, *spread_over(raw, config)).flatten().tolist()
    if config.normalise == "per_turn":
        return {f"advantage_std_t{turn}": std for turn, std in enumerate(stds, 1)}
    return {"advantage_std": stds[0]}


def turn_kl_coefs(stage: int, beta2: float, config) -> list[float]:
    """Stage I holds the first attempt with beta2 (Eq. 3); all else has the ordinary beta1."""
    return [beta2 if stage == 1 else config.beta1, config.beta1]  # Eq. 2 and 4


def adapt_beta2(state: dict, config) -> None:
    """--kl_target: moves state["beta2"] by the first attempt's KL in the last step, if it had any.

    KL starts at 0, whatever beta2 is: so beta2 rises at once, but falls only after CALM steps in a
    row with too little KL, none of them of the warm-up.
    """
    last, target = state["last"], config.kl_target
    if target is None or "kl_t1" not in last:
        return
    calm = last["kl_t1"] < target / 1.5 and last["step"] >= config.warmup
    state["calm"] = state["calm"] + 1 if calm else 0
    if last["kl_t1"] > 1.5 * target:
        state["beta2"] = min(state["beta2"] * 1.5, config.beta2 * BETA2_RANGE)
    elif state["calm"] == CALM:
        state["beta2"] = max(state["beta2"] / 1.5, config.beta2 / BETA2_RANGE)
        state["calm"] = 0


def make_batch(attempts: Attempts, stage: int, beta2: float, config) -> Batch:
    """Verdicts -> an advantage and a KL weight for every sampled token."""
    rollout, v1, v2, offline = attempts
    r1, r2 = gather(v1.rewards).view(-1, config.group_size), None  # (P, G), of all ranks
    if v2 is not None:
        r2 = gather(v2.rewards).view(*r1.shape, config.second_attempts)  # (P, G, K)
    advantages = turn_advantages(r1, r2, stage, config, offline)  # (B, turns)
    kl_coef = torch.tensor(turn_kl_coefs(stage, beta2, config)).expand(len(advantages), 2)
    figures = {"stage": stage, "beta2": beta2}
    figures |= deviations(raw_advantages(r1, r2, stage, config, offline), config)
    if r2 is not None:
        figures["acc_t2"] = float((r2 == 1).float().mean())  # a part of a reward is not right
    if not offline:  # another model's first attempts are no measure of this one
        figures["acc_t1"] = float((r1 == 1).float().mean())
        figures["reward"] = float(r1.mean()) + (0.0 if r2 is None else float(r2.mean()))
    elif config.offline_ratio == 1:
        figures["reward"] = float(r2.mean())
    per_token = (spread(own(x, len(rollout.ids)), rollout) for x in (advantages, kl_coef))
    rewards = [r1] if r2 is None else [r1[..., None].expand_as(r2), r2]
    rewards = own(torch.stack([r.flatten() for r in rewards], 1), len(rollout.ids))  # (B, turns)
    return Batch(rollout, *per_token, len(advantages), figures, rewards=rewards)


def check(config) -> None:
    if config.stage1_steps + config.stage2_steps == 0:
        raise ValueError("--stage1_steps and --stage2_steps are both 0: nothing to train")
    check_groups(config)
    if config.temperature <= 0:
        raise ValueError(
            "--temperature must be above 0 in training: greedy attempts have no policy gradient"
        )
    if config.reference == "stage1" and (config.single_turn or not config.stage1_steps):
        raise ValueError(
            "--reference stage1: there is no Stage I; give --stage1_steps, and no --single_turn"
        )
    if config.single_turn and config.offline_ratio:
        raise ValueError(
            "--offline_ratio is about second attempts: leave it out with --single_turn"
        )
    check_kl_target(config)


def check_groups(config) -> None:
    """What would be compared with itself alone, and so never trained."""
    if config.baseline != "none" and config.group_size < 2:
        raise ValueError(
            "--group_size 1 has nothing to compare with: use --baseline none, or groups of 2 and up"
        )
    if config.normalise != "none" and config.rows == 1:
        raise ValueError(
            "--problems 1 --group_size 1: one attempt has no deviation to be divided by: use "
            "--normalise none, or more problems"
        )


def check_kl_target(config) -> None:
    if config.kl_target is None:
        return
    if config.single_turn or not config.stage1_steps:
        raise ValueError(
            "--kl_target adapts Stage I: there is none; give --stage1_steps, and no --single_turn"
        )
    if config.beta2 == 0:
        raise ValueError("--kl_target multiplies --beta2, and 0 stays 0: give --beta2 above 0")
    if config.offline_ratio == 1:
        raise ValueError("--kl_target is about own first attempts: there are none, leave it out")


def probed_figures(task, config) -> list[str]:
    """The attempts that training would reward, whose rates tell whether there is a signal."""
    return ["acc_t1"] * (task.given is None) + ["acc_t2"] * (not config.single_turn)


def main(config: Config) -> None:
    distributed.start(config)
    with exit_on_bad_input():
        check(config)
        counts = {"train": None, "validation": config.final_problems}
        env, sampler, splits = prepare(config, counts, day=check_run(config))
        offline = replace(config, offline_ratio=1.0) if env.task.given else config
        check(offline)  # where the data gives first attempts, it does so in every step
        announce(config, env, sampler, splits)
        exam = Exam(env, config, "self_correct")
        if not has_state(config):
            keys = probed_figures(env.task, config)
            probe(partial(exam, sampler), splits["train"], config, keys)
        run = open_run(config, contents_of(env, sampler.model, splits), env.day)
        config = offline  # config.json has what was given, which --resume is compared with
        scorer = make_scorer(sampler.model, config)  # trains the very model that is sampled from
    find = partial(sampler_of, scorer, sampler, env, config)
    base = None  # where the data gives first attempts, nobody writes them
    if config.offline_ratio and not env.task.given:
        base = find(config.model)

    def step_batch(step: int, state: dict) -> Batch:
        stage = stage_of(step, config)
        if step == config.stage1_steps and config.reference == "stage1":
            scorer.hold()
            state["own_reference"] = True  # saved with the run, since no file has it
        if stage == 1 and "last" in state:
            adapt_beta2(state, config)
        mine = pick(splits["train"], config.problems, config.seed, step)
        writer = base if is_offline(step, config) else None
        attempts = in_parts(roll_out, env, sampler, mine, config, writer)
        return make_batch(attempts, stage, state["beta2"], config)

    announce_time(config, exam.pace(), len(splits["validation"]))
    hooks = exam.hooks(step_batch, sampler, splits["validation"])
    train(config, run, scorer, sampler, hooks, {"beta2": config.beta2, "calm": 0})
    results = exam.before_and_after(run, splits["validation"], find)
    conclude(config, results, len(splits["validation"]))
    distributed.finish()


if __name__ == "__main__":
    run_script(main, Config)
