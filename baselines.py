"""Pair-SFT and multi-turn STaR, what SCoRe is compared with (arXiv 2409.12917, section 4): both
imitate own samples.

    python baselines.py --method star               # the tiny model, a few minutes on two cores
    python baselines.py --method pair_sft --plus    # also with second attempts that leave a right
    answer right

A round: sample two attempts at training problems, keep what the verdicts choose, train on it.
    Pair-SFT has one round,
and imitates the second attempt of (wrong, right) pairs; STaR has three, each with the model that
the last one left, and imitates what is right in traces that went from wrong to right. `--plus` adds
those that went from right to right (D+).

Imitation is policy gradient with other advantages: 1 on every token to imitate, 0 elsewhere, no
baseline and no KL, so no reference either. So the shared loss has the gradient of cross-entropy,
and all else is shared with score.py too, which samples as many attempts from as many problems, and
trains on as many rows in as many steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluate import (
    before_and_after,
    evaluate_both,
    first_attempts,
    grade,
    load_sampler,
    prepare,
    probe,
)
from loss import spread
from sampling.rollout import Rollout, rollout_of
from sampling.turns import follow_up_ids
from training import distributed
from training.checkpoint import write_text
from training.distributed import exchange, on_first, rank, share
from training.flags import TrainConfig, check_counts, exit_on_bad_input, flag, parse_args
from training.loop import check_run, contents_of, open_run, report, saving, stop, train, watcher
from training.policy import Batch, make_scorer, pick_problems, row_seeds, unzip

ROUNDS = {"pair_sft": 1, "star": 3}


@dataclass
class Config(TrainConfig):
    output_dir: str = flag("runs/baselines", "the run's directory: new, or to be resumed")
    method: str = flag(
        "star", "pair_sft or star: see the head of baselines.py", choices=tuple(ROUNDS)
    )
    plus: bool = flag(False, "D+: keep also the traces in which both attempts are right")
    rounds: int | None = flag(
        None, "rounds of sampling and training; default: 3 for star, 1 for pair_sft"
    )
    steps: int = flag(320, "training steps, of all rounds together")
    problems: int = flag(16, "P, problems that are sampled for every training step")
    group_size: int = flag(4, "G, first attempts a problem")
    second_attempts: int = flag(
        4, "K, second attempts of each first one; a step trains on P * G * K rows"
    )

    judged_by = "eval_acc_t2"  # a batch of old samples has no reward

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


def roll_out(sampler, tokenizer, task, chosen, step: int, config) -> list[dict]:
    """Two attempts at each of this rank's problems, as traces; the seeds are those of score.py.

    A trace: `parts`, the ids of prompt, first attempt, instruction and second attempt; `right`, the
        two verdicts; and
    which `problem` it belongs to.
    """
    mine = share(len(chosen))
    problems, prompts = unzip(chosen, mine)
    G, K = config.group_size, config.second_attempts
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    seeds = row_seeds(mine, "first", config.seed, step, each=G)
    first = first_attempts(sampler, tokenizer, task, problems, prompts, G, seeds, limits)
    second = sampler.extend(
        first, follow_up_ids(tokenizer, task.correct, first.last_ids()), K, **limits
    )
    r1 = (
        grade(tokenizer, task, first, 0, [p for p in problems for _ in range(G)])[1]
        .repeat_interleave(K)
        .tolist()
    )
    r2 = grade(tokenizer, task, second, 1, [p for p in problems for _ in range(G * K)])[1].tolist()
    return [
        {"problem": [step, mine.start + i // (G * K)], "parts": parts, "right": [int(a), int(b)]}
        for i, (parts, a, b) in enumerate(zip(parts_of(second), r1, r2, strict=True))
    ]


def parts_of(rollout) -> list[list[list[int]]]:
    """Of every row, the ids of its prompt, first attempt, instruction and second attempt."""
    spans = [
        (rollout.turn == turn) & (rollout.action_mask == said)
        for turn in (0, 1)
        for said in (False, True)
    ]
    ids, spans = rollout.ids.cpu(), [span.cpu() for span in spans]
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
    """Traces whose first attempt is wrong, and whose second is right: their own, or those of
    `right` in turn."""
    if not right:
        return []
    donors = [t if t["right"][1] else right[i % len(right)] for i, t in enumerate(wrong)]
    return [
        t | {"parts": t["parts"][:3] + d["parts"][3:], "right": [0, 1]}
        for t, d in zip(wrong, donors, strict=True)
    ]


def collect(sampler, tokenizer, task, split, turn: int, config) -> tuple[dict, list[dict]]:
    """A round's data: (figures, what is kept) of the samples that its steps are due."""
    steps = range(*config.starts[turn : turn + 2])
    kept, verdicts = [], []
    for step in tqdm(steps, desc=f"sampling for round {turn + 1}", leave=False, disable=rank() > 0):
        chosen = pick_problems(split, config.seed, step, config.problems)
        found = exchange(roll_out(sampler, tokenizer, task, chosen, step, config))
        groups = {}
        for trace in (trace for part in found for trace in part):
            groups.setdefault(tuple(trace["problem"]), []).append(trace)
            verdicts.append(trace["right"])
        kept += [trace for group in groups.values() for trace in choose(group, config)]
    accuracies = torch.tensor(verdicts, dtype=torch.float64).mean(dim=0).tolist()
    return {
        "acc_t1": accuracies[0],
        "acc_t2": accuracies[1],
        "sampled": len(verdicts),
        "kept": len(kept),
    }, kept


def data_of_round(run: Path, turn: int, sample) -> tuple[dict, list[dict]]:
    """(figures, traces) of the round's file in the run's directory, which is made by `sample()` if
    it isn't there."""
    path = run / f"traces_{turn + 1}.jsonl"
    if not on_first(path.exists):
        figures, kept = sample()
        with saving(run):
            on_first(
                write_text, path, "".join(json.dumps(line) + "\n" for line in (figures, *kept))
            )
    figures, *kept = on_first(lambda: [json.loads(line) for line in path.read_text().splitlines()])
    return figures, kept


def advantages_of(traces: list[dict], rollout: Rollout, config) -> Tensor:
    """(B, T): 1 on every token to imitate: those of second attempts, and in STaR also of first ones
    that are right."""
    per_turn = [[float(config.method == "star" and trace["right"][0]), 1.0] for trace in traces]
    return spread(torch.tensor(per_turn).view(-1, 2), rollout)


def make_batch(traces: list[dict], sampler, figures: dict, config) -> Batch:
    """This rank's share of some traces; the loss is the mean over all tokens that are imitated, of
    all ranks."""
    mine = share(len(traces))
    traces = traces[mine.start : mine.stop]
    index = torch.arange(len(traces))
    rollout = rollout_of([trace["parts"] for trace in traces], 2, index, index, sampler)
    advantages = advantages_of(traces, rollout, config)
    denominator = sum(exchange(float(advantages.sum())))
    return Batch(rollout, advantages, torch.zeros_like(advantages), denominator, figures)


def check(config) -> None:
    check_counts(config)
    if config.rounds and config.rounds > config.steps:
        raise ValueError(
            f"--rounds {config.rounds}: there are only --steps {config.steps} to share"
        )
    if config.temperature <= 0:
        raise ValueError(
            "--temperature must be above 0: greedy samples of a problem are all the same"
        )
    if config.epochs > 1:
        raise ValueError(
            "--epochs is for policy gradients alone: say how long to imitate with --steps"
        )


def main(config: Config) -> None:
    distributed.start()
    with exit_on_bad_input():
        check(config)
        check_run(config)
        task, sampler, tokenizer, splits = prepare(
            config, {"train": None, "validation": config.final_problems}
        )
        if task.given:
            raise ValueError(
                f"--task {task.name}: its first attempts are not the model's own, and these methods' are"
            )
        if not config.resume:
            probe(sampler, tokenizer, task, splits["train"], config, "self_correct")
        run = open_run(config, contents_of(sampler.model, tokenizer, **splits))
        scorer = make_scorer(sampler.model, config, reference=False)
    shared = (tokenizer, task, *zip(*splits["validation"], strict=True), config)
    rounds = {}  # the data of the one that is under way

    def step_batch(step: int, state: dict) -> Batch:
        turn, figures = round_of(step, config), {"stage": round_of(step, config) + 1}
        if turn not in rounds:
            rounds.clear()
            sample = lambda: collect(sampler, tokenizer, task, splits["train"], turn, config)  # noqa: E731
            rounds[turn] = data_of_round(run, turn, sample)
        sampled, kept = rounds[turn]
        if not kept:
            stop(
                f"round {turn + 1}: of {sampled['sampled']} traces none can be imitated: take an easier task"
            )
        if step == config.starts[turn]:  # the verdicts on this very model
            figures |= sampled
        rows = config.problems * config.group_size * config.second_attempts
        return make_batch(pick_problems(kept, config.seed, step, rows), sampler, figures, config)

    evaluate_now = watcher(sampler, *shared, "self_correct")
    train(config, run, scorer, sampler, tokenizer, config.steps, step_batch, evaluate_now, {})
    models = before_and_after(run, config).items()
    results = {
        name: evaluate_both(load_sampler(path, tokenizer, config), *shared) for name, path in models
    }
    report(run, results, len(splits["validation"]))
    distributed.finish()


if __name__ == "__main__":
    main(parse_args(Config))
