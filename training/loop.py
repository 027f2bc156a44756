"""The loop around an algorithm: rollout, update, metrics, saved states; stopped and resumed.

It knows neither evaluation nor pictures: it is handed what to call (`Hooks`).
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from loss import Scores
from tasks.own import is_own
from training import checkpoint, distributed
from training.card import write_card
from training.command import exit_on_bad_input
from training.distributed import Stopped, exchange, interruptible, listening, on_first
from training.loggers import open_loggers, tell
from training.models import hand_over, save_policy
from training.pace import Done, flops, pace, said
from training.policy import Batch, finite_weights, is_cap, set_lr, update
from training.progress import bar, counted
from training.run import cut_logs, log, log_sizes, newest, saving, stop, time_is_up
from training.scorer import Scorer

RATIOS = (0.9, 1.1)  # of pi / pi_sampler; an on-policy update has 1, up to rounding


class Hooks(NamedTuple):
    """What an algorithm hands to `train`.

    step_batch: (step, state) -> Batch: rollout and verdicts, turned into advantages
    evaluate:   step -> (figures that join the metrics, transcripts), every --eval_every steps
    plot:       run -> None: the run's picture, at every saved state, on the first rank
    look:       (step, batch, scores) -> None: for the page of rollouts, on the first rank, at the
                first step, the last, and those that are evaluated
    """

    step_batch: Callable[[int, dict], Batch]
    evaluate: Callable[[int], tuple[dict, str]]
    plot: Callable[[Path], None]
    look: Callable[[int, Batch, Scores], None] | None = None


def train(config, run: Path, scorer: Scorer, sampler, hooks: Hooks, state: dict) -> None:
    """`config.steps` steps, from the newest saved state if there is one.

    `state` is the algorithm's own memory between steps; it is saved and resumed with the rest, and
    holds the last step's figures under "last". The model kept in run/checkpoint is the one after
    the `save_every` steps with the highest mean of `config.judged_by` (RL: the training reward),
    counting steps of `config.last_stage` only. SIGTERM and Ctrl-C: a saved state, and exit code 143
    or 130; --max_minutes: the same, with a checkpoint, and 0.
    """
    parameters = scorer.trained.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    save = partial(save_memory, config, run, scorer, optimizer)
    save_best = partial(publish, scorer, sampler, config)
    # row: of a step whose update is made, but not its evaluation. bad: steps skipped in a row.
    memory = {"step": 0, "row": None, "best": None, "window": [], "bad": 0, "idle": 0}
    memory["state"] = state
    safely, over, loggers = partial(saved_if_stopped, save, run, memory), False, []
    with listening():
        resume(run, scorer, sampler, optimizer, memory)
        first = memory["step"]
        with exit_on_bad_input():
            on_first(lambda: loggers.extend(open_loggers(config, run, first)))
        with bar("training", config.steps, first) as progress:
            while memory["step"] < config.steps and not over:
                text = ""
                with safely(), counted(progress, sampler):
                    if memory["row"] is None:
                        learnt = scorer, sampler, optimizer, memory["step"], hooks, memory["state"]
                        memory["row"] = memory["state"]["last"] = train_step(config, *learnt)
                if is_watched(memory["step"], config):
                    with safely(), interruptible():
                        figures, text = hooks.evaluate(memory["step"])
                    memory["row"] |= figures
                row = memory["row"]
                end_step(config, run, memory, text, progress)
                tell(loggers, row)
                last, over = memory["step"] == config.steps, time_is_up(config)
                ends = last or memory["step"] % config.save_every == 0
                if ends or over:
                    save(memory, save_best if ends and close_window(memory, last) else None)
                    on_first(hooks.plot, run)
            with safely(), interruptible():
                pass  # a signal that came since is heard here, on every rank
        if over:
            end_early(config, run, memory, save_best)
    if first == config.steps:  # resumed after its last state, maybe before its picture
        on_first(hooks.plot, run)
    if scorer.adapters is None:  # the final table is of another model, run/checkpoint
        distributed.drop_weights(sampler.model)


@contextmanager
def saved_if_stopped(save, run: Path, memory: dict):
    """Around work that changes `memory`: told to stop, the run ends with a state of before it."""
    safe = copy.deepcopy(memory)
    try:
        yield
    except Stopped as stopped:
        name = f"step_{safe['step']:06d}"
        there = [path.name for path in on_first(checkpoint.states, run)][:1] == [name]
        if safe["row"] or safe["step"] and not there:
            save(safe)
        stop(f"{stopped}: {newest(run)}, go on with --resume", stopped.code)


def publish(scorer, sampler, config, path: Path) -> None:
    save_policy(scorer, sampler, config, path)
    on_first(write_card, config, path)


def end_early(config, run: Path, memory: dict, save_best) -> None:
    """Ends a run whose time is up, just after a state was saved, with a model to look at."""
    if not on_first((run / "checkpoint").exists):
        with saving(run):
            save_best(run / "checkpoint")  # no window has closed yet: the model of now
    done = f"{memory['step']} of {config.steps} steps after --max_minutes {config.max_minutes:g}"
    stop(f"{done}: {newest(run)}, go on with --resume", code=0)


def train_step(config, scorer, sampler, optimizer, step: int, hooks: Hooks, state: dict) -> dict:
    """Rollout, verdicts and one update: the step's metrics. What is not finite is named instead."""
    set_lr(optimizer, config.lr, step, config.steps, config.warmup, config.schedule)
    started = time.perf_counter()
    with interruptible():
        batch = hooks.step_batch(step, state)
    sampled, nodes, scored = time.perf_counter(), scorer.nodes, scorer.scored
    with given_up(scorer, sampler):
        scores, norm, wrong, idle = update(scorer, optimizer, batch, config)
    tokens = token_metrics(batch, scores, scorer.reference is not None, is_cap(config))
    first = {"stage": batch.figures["stage"], "step": step}  # what a line begins with
    row = first | batch.figures | tokens
    row |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    row |= {"skipped": int(bool(wrong)), "idle": int(idle)}
    made = flops(scorer, scorer.nodes - nodes, scorer.scored - scored)
    row |= pace(batch, Done(sampled - started, time.perf_counter() - sampled, made))
    if hooks.look and (is_watched(step, config) or step in (0, config.steps - 1)):
        run = Path(config.output_dir)
        with saving(run):
            on_first(hooks.look, step, batch, scores)
    finite = {key: value for key, value in row.items() if math.isfinite(value)}  # JSON has no NaN
    return finite | ({"not_finite": ", ".join(wrong)} if wrong else {})


def is_watched(step: int, config) -> bool:
    """Whether the model is evaluated after this step."""
    return bool(config.eval_every) and (step + 1) % config.eval_every == 0


@contextmanager
def given_up(scorer, sampler):
    """Around an update: where the policy is spread over ranks, its whole copy makes room.

    Unless CUDA graphs are to find it where it is. Afterwards it has the new weights.
    """
    if distributed.together() and scorer.adapters is None and not sampler.graphs:
        distributed.drop_weights(sampler.model)
    yield
    hand_over(scorer, sampler)


def token_metrics(batch: Batch, scores: Scores, with_kl: bool, cap: float | None = None) -> dict:
    """Figures that mean the same for every algorithm, over the rows of all ranks.

    kl_*: nats an attempt; the others are of a sampled token. ratio_error: the largest
    |log pi - log pi_sampler|: 0 up to rounding while sampler and scorer agree. ratio_outside: share
    of tokens whose pi / pi_sampler is not within RATIOS. is_capped: share of those beyond the `cap`
    of importance weights, if there is one. zero_advantage: share of tokens without a policy
    gradient. truncated: attempts cut off by the limit.
    """
    rollout, sampled = batch.rollout, batch.rollout.action_mask
    stopped = rollout.stopped[:, rollout.turn[sampled].unique()]  # (B, turns sampled here)
    log_ratio = (scores.logprobs - rollout.logprobs)[sampled]
    outside = (log_ratio.exp() < RATIOS[0]) | (log_ratio.exp() > RATIOS[1])
    mine = {
        "entropy": float(scores.entropy[sampled].double().sum()),
        "zero_advantage": int((batch.advantages[sampled] == 0).sum()),
        "ratio_outside": int(outside.sum()),
        "truncated": int((~stopped).sum()),
        "tokens": int(sampled.sum()),
        "attempts": stopped.numel(),
        "rows": len(rollout.ids),
    }
    if cap is not None:
        drawn = rollout.logprobs[sampled] < 0  # any other has no weight but 1
        mine["is_capped"] = int((drawn & (log_ratio > math.log(cap))).sum())
    for turn in rollout.turn[batch.scored].unique().tolist() if with_kl else ():
        mine[f"kl_t{turn + 1}"] = float(scores.kl.double()[rollout.turn == turn].sum())
    ranks = exchange((mine, float(log_ratio.abs().max()) if len(log_ratio) else 0.0))
    return token_row([part for part, _ in ranks]) | {"ratio_error": max(e for _, e in ranks)}


def token_row(parts: list[dict]) -> dict:
    """The means of what each rank has summed; a rank may lack a turn that others have."""
    keys = sorted({key for part in parts for key in part})
    total = {key: sum(part.get(key, 0) for part in parts) for key in keys}
    row = {key: total[key] / max(1, total["rows"]) for key in total if key.startswith("kl_")}
    of_tokens = ("entropy", "zero_advantage", "ratio_outside", "is_capped")
    row |= {key: total[key] / max(1, total["tokens"]) for key in of_tokens if key in total}
    row |= {"truncated": total["truncated"] / max(1, total["attempts"]), "tokens": total["tokens"]}
    return row | {"response_length": total["tokens"] / max(1, total["attempts"])}


def save_memory(config, run: Path, scorer, optimizer, memory: dict, save_best=None) -> None:
    """A state of all there is; weights that are not finite end the run instead."""
    if not finite_weights(scorer.trained):
        stop(f"after {memory['step']} steps the weights are not finite: {newest(run)}")
    with saving(run):
        whole = memory | {"sizes": on_first(log_sizes, run)}
        checkpoint.save_state(run, scorer, optimizer, whole, save_best, config.keep)


def resume(run: Path, scorer, sampler, optimizer, memory: dict) -> None:
    """Goes on from the newest state, which `open_run` has checked, if there is one yet."""
    found = on_first(checkpoint.states, run)
    if found:
        memory.update(checkpoint.load_state(found[0], scorer, optimizer))
    hand_over(scorer, sampler)
    with exit_on_bad_input(), saving(run):
        on_first(cut_logs, run, memory.pop("sizes", {}))
        on_first(checkpoint.clean, run)
        on_first(checkpoint.publish_best, run, found[0] if found else None)


def end_step(config, run: Path, memory: dict, text: str, progress) -> None:
    """Logs the step in memory["row"], with its evaluation; stops after too many skipped ones."""
    row = memory["row"]
    with saving(run):
        on_first(log, run, row, text)
    memory["idle"] += row["idle"]
    shown = config.shown
    if is_own(config.task) and "reward" not in shown.values():  # it may have parts
        shown = shown | {"reward": "reward"}
    show(progress, row, shown, memory["idle"])
    memory["bad"] = memory["bad"] + 1 if row["skipped"] else 0
    if memory["bad"] == config.max_skipped:
        fault = f"not finite in {memory['bad']} steps in a row: {row['not_finite']}"
        safe = f"none of them changed the weights, and {newest(run)}"
        stop(f"step {row['step']}: {fault}; {safe}")
    if row["stage"] == config.last_stage and config.judged_by in row and not row["skipped"]:
        memory["window"].append(row[config.judged_by])
    memory |= {"step": row["step"] + 1, "row": None}


def close_window(memory: dict, last: bool) -> bool:
    """Whether the model is the best so far, by the mean of the steps since the last saved state."""
    window, memory["window"] = memory["window"], []
    if window and (memory["best"] is None or sum(window) / len(window) > memory["best"]):
        memory["best"] = sum(window) / len(window)
        return True
    # where no step says how good it is, the last model has to do
    return last and memory["best"] is None


def show(progress, row: dict, names: dict[str, str], idle: int) -> None:
    """The step's figures beside the bar, by `names` {shown as: figure}, and idle steps so far."""
    figures = {name: row[key] for name, key in names.items() if key in row}
    figures |= {"idle_steps": idle} if idle else {}
    figures |= said(row)
    shown = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in figures.items()}
    progress.set_postfix(shown, refresh=False)
    progress.update()
