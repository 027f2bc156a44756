"""Pair-SFT and multi-turn STaR, what SCoRe is compared with: both imitate own samples.

    python baselines.py --method star             # the tiny model, three minutes on two cores
    python baselines.py --method pair_sft --plus  # also second attempts that leave an answer right

arXiv 2409.12917, section 4. A round: sample two attempts at training problems, keep what the
verdicts choose, train on it. Pair-SFT has one round, and imitates the second attempt of (wrong,
right) pairs; STaR has three, each with the model that the last one left, and imitates what is right
in traces that went from wrong to right. `--plus` adds those that went from right to right (D+).

Imitation is policy gradient with other advantages: 1 on every token to imitate, 0 elsewhere, no
baseline and no KL, so no reference either. So the shared loss has the gradient of cross-entropy,
and all else is shared with score.py too, which samples as many attempts from as many problems, and
trains on as many rows in as many steps.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evaluate import Exam, conclude
from loss import spread
from sampling.rollout import Rollout, rollout_of
from training import distributed
from training.announce import announce, announce_time
from training.batches import pick, pick_things, share_of
from training.checkpoint import write_text
from training.distributed import exchange, on_first
from training.fitting import papers
from training.flags import RUN, TrainConfig, exit_on_bad_input, flag, run_script
from training.loop import train
from training.models import make_scorer
from training.parts import in_parts
from training.policy import Batch
from training.progress import over
from training.run import check_run, contents_of, has_state, open_run, saving, stop
from training.setup import prepare, probe, sampler_of

ROUNDS = {"pair_sft": 1, "star": 3}


@dataclass
class Config(TrainConfig):
    output_dir: str = flag(
        "runs/baselines", "the run's directory: new, or to be resumed", group=RUN
    )
    method: str = flag(
        "star", "pair_sft or star: see the head of baselines.py", choices=tuple(ROUNDS)
    )
    plus: bool = flag(False, "D+: keep also the traces in which both attempts are right")
    rounds: int | None = flag(
        None, "rounds of sampling and training; default: 3 for star, 1 for pair_sft"
    )
    steps: int = flag(320, "training steps, of all rounds together", paper=papers(3000, code=1500))
    problems: int = flag(
        16, "P, problems that are sampled for every training step", paper=papers(32, code=8)
    )
    group_size: int = flag(4, "G, first attempts a problem")
    second_attempts: int = flag(
        4, "K, second attempts of each first one; a step trains on P * G * K rows"
    )

    judged_by = "eval_acc_t2"  # a batch of old samples has no reward
    shown = {"round": "stage", "t1": "acc_t1", "t2": "acc_t2"}

    @property
    def rows(self) -> int:
        return self.problems * self.group_size * self.second_attempts

    @property
    def last_stage(self) -> int:
        return len(self.starts) - 1

    @property
    def starts(self) -> list[int]:
        """The first step of every round, and the number of steps."""
        rounds = self.rounds or ROUNDS[self.method]
        return [self.steps * r // rounds for r in range(rounds + 1)]


def round_of(step: int, config) -> int:
    return sum(start <= step for start in config.starts) - 1


def roll_out(env, sampler, mine, config) -> list[dict]:
    """Two attempts at each of this rank's problems, as traces; the seeds are those of score.py.

    A trace: `parts`, the ids of prompt, first attempt, instruction and second attempt; `right`, the
    two verdicts; and which `problem` of the step it belongs to.
    """
    G, K = config.group_size, config.second_attempts
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    first = sampler.generate(env.prompts(mine.items), G, seeds=mine.seeds("first", G), **limits)
    second = sampler.extend(first, env.follow_up(first, "correct"), K, free=True, **limits)
    r1 = env.verdicts(first, 0, mine.items).right.repeat_interleave(K)
    r2 = env.verdicts(second, 1, mine.items).right
    rights = torch.stack([r1, r2], dim=1).int().tolist()  # (B, 2)
    numbers = [mine.span.start + index for index in second.prompt_index.tolist()]
    return [
        {"problem": number, "parts": parts, "right": right}
        for number, parts, right in zip(numbers, parts_of(second), rights, strict=True)
    ]


def parts_of(rollout) -> list[list[list[int]]]:
    """Of every row, the ids of its prompt, first attempt, instruction and second attempt."""
    kinds = [(turn, sampled) for turn in (0, 1) for sampled in (False, True)]
    spans = [(rollout.turn == turn) & (rollout.action_mask == sampled) for turn, sampled in kinds]
    ids, spans = rollout.ids.cpu(), [span.cpu() for span in spans]  # (B, T) each
    return [[ids[row, span[row]].tolist() for span in spans] for row in range(len(ids))]


def choose(traces: list[dict], config) -> list[dict]:
    """Of the traces of one problem, those to imitate.

    STaR:     wrong, then right.
    Pair-SFT: every wrong first attempt with a right second attempt at the same problem, its own
              where that is right, else one of another trace that was wrong at first: what follows a
              right attempt may just repeat it. Such pairs are synthetic, and many more.
    D+:       both also take right, then right.
    """
    wrong, plus = ([t for t in traces if t["right"][0] == r1] for r1 in (0, 1))
    fixed, plus = [t for t in wrong if t["right"][1]], [t for t in plus if t["right"][1]]
    kept = fixed if config.method == "star" else pair(wrong, fixed)
    return kept + plus * config.plus


def pair(wrong: list[dict], right: list[dict]) -> list[dict]:
    """All of `wrong`, each with a right second attempt: its own, or one of `right`'s in turn."""
    pairs = []
    for i, trace in enumerate(wrong if right else []):
        donor = trace if trace["right"][1] else right[i % len(right)]
        parts = trace["parts"][:3] + donor["parts"][3:]
        pairs.append(trace | {"parts": parts, "right": [0, 1]})
    return pairs


def collect(env, sampler, problems, turn: int, config) -> tuple[dict, list[dict]]:
    """A round's data: (figures, what is kept) of the samples that its steps are due."""
    steps = range(*config.starts[turn : turn + 2])
    kept, verdicts, text = [], [], f"sampling for round {turn + 1}"
    for step in over(steps, text, sampler):
        mine = pick(problems, config.problems, config.seed, step)
        found = exchange(in_parts(roll_out, env, sampler, mine, config))
        groups = {}
        for trace in (trace for part in found for trace in part):
            groups.setdefault(trace["problem"], []).append(trace)
            verdicts.append(trace["right"])
        kept += [trace for group in groups.values() for trace in choose(group, config)]
    acc_t1, acc_t2 = torch.tensor(verdicts, dtype=torch.float64).mean(dim=0).tolist()
    figures = {"acc_t1": acc_t1, "acc_t2": acc_t2, "sampled": len(verdicts), "kept": len(kept)}
    return figures, kept


def data_of_round(run: Path, turn: int, sample) -> tuple[dict, list[dict]]:
    """(figures, traces) of the round's file in the run's directory, which `sample()` fills once."""
    path = run / f"traces_{turn + 1}.jsonl"
    if not on_first(path.exists):
        figures, kept = sample()
        lines = (json.dumps(line) + "\n" for line in (figures, *kept))
        with saving(run):
            on_first(write_text, path, "".join(lines))
    figures, *kept = on_first(lambda: [json.loads(line) for line in path.read_text().splitlines()])
    return figures, kept


def advantages_of(traces: list[dict], rollout: Rollout, config) -> Tensor:
    """(B, T): 1 on every token to imitate: second attempts, and for STaR first ones if right."""
    per_turn = [[float(config.method == "star" and trace["right"][0]), 1.0] for trace in traces]
    return spread(torch.tensor(per_turn).view(-1, 2), rollout)


def make_batch(traces: list[dict], sampler, figures: dict, config) -> Batch:
    """This rank's share of some traces; the loss is the mean over all tokens to imitate."""
    traces = share_of(traces).items
    rollout = rollout_of([trace["parts"] for trace in traces], 2, sampler)
    advantages = advantages_of(traces, rollout, config)
    denominator = sum(exchange(float(advantages.sum())))
    kl_coef, right = torch.zeros_like(advantages), [trace["right"] for trace in traces]
    rewards = torch.tensor(right, dtype=torch.float32).view(-1, 2)
    return Batch(rollout, advantages, kl_coef, denominator, figures, rewards=rewards)


def check(config) -> None:
    if config.rounds and config.rounds > config.steps:
        few = f"there are only --steps {config.steps} to share"
        raise ValueError(f"--rounds {config.rounds}: {few}")
    if config.temperature <= 0:
        why = "greedy samples of a problem are all the same"
        raise ValueError(f"--temperature must be above 0: {why}")
    if config.epochs > 1:
        way_out = "say how long to imitate with --steps"
        raise ValueError(f"--epochs is for policy gradients alone: {way_out}")
    if config.is_cap:
        why = "what is imitated was sampled from older weights"
        raise ValueError(f"--is_cap is for policy gradients alone: {why}")


def main(config: Config) -> None:
    distributed.start(config)
    with exit_on_bad_input():
        check(config)
        counts = {"train": None, "validation": config.final_problems}
        env, sampler, splits = prepare(config, counts, day=check_run(config))
        problems, validation = splits["train"], splits["validation"]
        if env.task.given:
            why = "its first attempts are not the model's own, and these methods' are"
            raise ValueError(f"--task {env.task.name}: {why}")
        announce(config, env, sampler, splits)
        exam = Exam(env, config, "self_correct")
        if not has_state(config):
            probe(partial(exam, sampler), problems, config)
        run = open_run(config, contents_of(env, sampler.model, splits), env.day)
        config = replace(config, is_cap=0.0)  # in bfloat16 too; config.json has what was given
        scorer = make_scorer(sampler.model, config, reference=False)
    rounds = {}  # the data of the one that is under way

    def step_batch(step: int, state: dict) -> Batch:
        turn = round_of(step, config)
        figures = {"stage": turn + 1}
        if turn not in rounds:
            rounds.clear()
            sample = partial(collect, env, sampler, problems, turn, config)
            rounds[turn] = data_of_round(run, turn, sample)
        sampled, kept = rounds[turn]
        if not kept:
            none = f"of {sampled['sampled']} traces none can be imitated"
            stop(f"round {turn + 1}: {none}: take an easier task")
        if step == config.starts[turn]:  # the verdicts on this very model
            figures |= sampled
        return make_batch(
            pick_things(kept, config.seed, step, config.rows), sampler, figures, config
        )

    announce_time(config, exam.pace(), len(validation))
    train(config, run, scorer, sampler, exam.hooks(step_batch, sampler, validation), {})
    find = partial(sampler_of, scorer, sampler, env, config)
    results = exam.before_and_after(run, validation, find)
    conclude(config, results, len(validation))
    distributed.finish()


if __name__ == "__main__":
    run_script(main, Config)
