"""A training run: its directory, the loop around an algorithm, and how it is stopped, resumed and
kept from harm."""

import copy
import fcntl
import hashlib
import json
import math
import os
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm, trange

from evaluate import evaluate
from loss import Scores
from report.figures import COLUMNS, format_table, format_transcripts, plot_curves
from training import checkpoint, distributed
from training.distributed import Stopped, exchange, interruptible, listening, on_first, rank
from training.policy import Batch, fingerprint, finite_weights, set_lr, update
from training.scorer import Scorer

# change no result
FREE = ("resume", "output_dir", "skip_damaged", "keep", "hsdp", "cpu_offload", "checkpointing")
LOGS = ("metrics.jsonl", "transcripts.txt")
WATCHED = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "well_formed")
_locks = {}  # of this process, held until it ends


def check_run(config) -> None:
    """Refuses an output directory that is in use, or to resume what is not there or had other
    flags. Writes nothing."""
    on_first(_check_run, config)


def _check_run(config) -> None:
    run = Path(config.output_dir)
    if not config.resume:
        if run.is_file() or run.is_dir() and any(run.iterdir()):
            raise ValueError(
                f"--output_dir {run} is in use: name another, or go on with it with --resume"
            )
        return
    if not (run / "config.json").is_file():
        raise ValueError(
            f"--resume: {run} has no config.json to go on from; start a new run elsewhere"
        )
    flags, before = asdict(config), json.loads((run / "config.json").read_text())
    changed = [k for k in flags if k not in FREE and flags[k] != before.get(k)]
    if changed:
        was = ", ".join(f"--{k} was {before.get(k)}, is {flags[k]}" for k in changed)
        raise ValueError(f"--resume: {run} was started with other flags: {was}")
    if (run / "results.json").exists():
        raise ValueError(
            f"--resume: {run} is complete, its results are in results.json: nothing is left to do"
        )


def open_run(config, contents: dict[str, str]) -> Path:
    """The run's directory, made with its config.json unless it is resumed, and locked.

    contents: of `contents_of`; if they are not those that the run was started with, that is a
        ValueError.
    """
    on_first(_open_run, config, contents)
    run = Path(config.output_dir)
    if not all(exchange((run / "config.json").exists())):
        raise ValueError(
            f"--output_dir {run}: not all ranks see it; it must be on a file system that they share"
        )
    return run


def _open_run(config, contents: dict[str, str]) -> None:
    _check_run(config)
    run = Path(config.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    if not config.resume:
        text = json.dumps(asdict(config) | {"contents": contents}, indent=2)
        return checkpoint.write_text(run / "config.json", text + "\n")
    before = json.loads((run / "config.json").read_text()).get("contents", {})
    changed = [name for name in contents if contents[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"--resume: {run} was started with another content of: {', '.join(changed)}"
        )
    checkpoint.newest_state(run, config.skip_damaged)


def lock(run: Path) -> None:
    """For this process alone, until it ends in whatever way."""
    if run.resolve() in _locks:
        return
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"--output_dir {run} is in use by another process, which is still running"
        ) from None
    _locks[run.resolve()] = file


def contents_of(model, tokenizer, **data) -> dict[str, str]:
    """{what: its hash}, of all that a run depends on besides its flags. data: lists that can be
    written as JSON."""

    def digest(x) -> str:
        return hashlib.blake2b(json.dumps(x, sort_keys=True).encode(), digest_size=16).hexdigest()

    words = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words += [backend.to_str()] if backend is not None else []
    named = {name.replace("_", " "): digest(x) for name, x in data.items()}
    return {"the model's weights": fingerprint(model), "the tokenizer": digest(words)} | named


@contextmanager
def saving(run: Path):
    """Around what writes to the run's directory: if that fails, one line says why and what is safe;
    exit code 1."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        stop(f"{run} can't be written ({causes[0]}): {newest(run)}")


def stop(message: str, code: int = 1):
    """Ends the run, on every rank; the first one says why."""
    if rank() == 0:
        # beside the progress bar
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def newest(run: Path) -> str:
    return (
        f"the newest saved state is {next((path.name for path in checkpoint.states(run)), 'none')}"
    )


def log(run: Path, row: dict, text: str) -> None:
    """A line of metrics, and the transcripts of an evaluation if there was one."""
    for name, more in zip(LOGS, (json.dumps(row) + "\n", text), strict=True):
        if more:
            with open(run / name, "a") as file:
                file.write(more)


def log_sizes(run: Path) -> dict:
    """How long the logs are, which are synced: what is written later is written again by a run
    resumed from here."""
    there = [run / name for name in LOGS if (run / name).exists()]
    for path in there:
        checkpoint.sync(path)
    return {path.name: path.stat().st_size for path in there}


def cut_logs(run: Path, sizes: dict) -> None:
    for path in (run / name for name in LOGS):
        size = path.stat().st_size if path.exists() else 0
        if size < sizes.get(path.name, 0):
            raise ValueError(f"--resume: {path} has lost lines: {size} bytes of {sizes[path.name]}")
        if size:
            os.truncate(path, sizes.get(path.name, 0))


def token_metrics(batch: Batch, scores: Scores, with_kl: bool) -> dict:
    """Figures that mean the same for every algorithm; kl_* are nats an attempt, the others of a
    sampled token.

    ratio_error: the largest |log pi - log pi_sampler|: 0 up to rounding while sampler and scorer
        agree.
    zero_advantage: share of sampled tokens without a policy gradient. truncated: attempts cut off
        by the limit.
    """
    rollout, sampled = batch.rollout, batch.rollout.action_mask
    shown = rollout.turn[sampled if batch.held is None else sampled | batch.held].unique().tolist()
    kl = {
        f"kl_t{turn + 1}": float(scores.kl.double()[rollout.turn == turn].sum()) for turn in shown
    }
    mine = (kl if with_kl else {}) | {
        "entropy": float(scores.entropy[sampled].double().sum()),
        "zero_advantage": int((batch.advantages[sampled] == 0).sum()),
        "truncated": int((~rollout.stopped).sum()),
        "tokens": int(sampled.sum()),
        "attempts": rollout.stopped.numel(),
        "rows": len(rollout.ids),
    }
    error = (scores.logprobs - rollout.logprobs)[sampled].abs()
    ranks = exchange((mine, float(error.max()) if len(error) else 0.0))
    total = {
        key: sum(part.get(key, 0) for part, _ in ranks)
        for key in sorted({k for part, _ in ranks for k in part})
    }
    row = {key: total[key] / max(1, total["rows"]) for key in total if key.startswith("kl_")}
    row |= {key: total[key] / max(1, total["tokens"]) for key in ("entropy", "zero_advantage")}
    row["truncated"] = total["truncated"] / max(1, total["attempts"])
    row |= {"ratio_error": max(worst for _, worst in ranks), "tokens": total["tokens"]}
    row["response_length"] = total["tokens"] / max(1, total["attempts"])
    return row


def train_step(
    config, scorer, sampler, optimizer, step: int, steps: int, make_batch, state: dict
) -> dict:
    """Rollout, verdicts and one update: the step's metrics. What is not finite is left out of them,
    and named."""
    set_lr(optimizer, config.lr, step, steps, config.warmup, config.schedule)
    started = time.perf_counter()
    with interruptible():
        batch = make_batch(step, state)
    sampled = time.perf_counter()
    with given_up(scorer, sampler.model):
        scores, norm, wrong = update(scorer, optimizer, batch, config)
    tokens = token_metrics(batch, scores, with_kl=scorer.reference is not None)
    row = {"stage": batch.figures["stage"], "step": step} | batch.figures | tokens
    row |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "skipped": int(bool(wrong))}
    row |= {"seconds_rollout": sampled - started, "seconds_update": time.perf_counter() - sampled}
    row["memory_mib"] = max(exchange(memory_mib()))
    finite = {key: value for key, value in row.items() if math.isfinite(value)}  # JSON has no NaN
    return finite | ({"not_finite": ", ".join(wrong)} if wrong else {})


@contextmanager
def given_up(scorer, model):
    """Around an update: where the policy is spread over ranks, the whole copy of it that is sampled
    from is no more, and afterwards it is there again, with the new weights."""
    if not distributed.together():
        yield
        return
    distributed.drop_weights(model)
    yield
    distributed.gather_weights(scorer.model, model)


def train(
    config,
    run: Path,
    scorer: Scorer,
    sampler,
    tokenizer,
    steps,
    make_batch,
    evaluate_now,
    state: dict,
) -> None:
    """The loop around an algorithm: `make_batch(step, state) -> Batch`, one update, metrics,
    checkpoints.

    `evaluate_now(step) -> (dict, transcripts)` joins the metrics every `eval_every` steps. `state`
    is the algorithm's own memory between steps; it is saved and resumed with the rest, and holds
    the last step's figures under "last". The model kept in run/checkpoint is the one after the
    `save_every` steps with the highest mean of `config.judged_by` (RL: the training reward),
    counting steps of `config.last_stage` only. SIGTERM: a saved state, and exit code 143.
    """
    optimizer = torch.optim.AdamW(
        scorer.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True
    )
    save = partial(save_memory, config, run, scorer, optimizer)
    save_best = partial(checkpoint.save_policy, scorer, sampler.model, tokenizer)
    # row: of a step whose update is made, but not its evaluation. bad: steps skipped in a row.
    memory = {"step": 0, "row": None, "best": None, "window": [], "bad": 0, "state": state}
    if not (config.resume and resume(run, scorer, sampler, optimizer, memory)):
        save(memory)
    progress = trange(
        memory["step"], steps, initial=memory["step"], total=steps, disable=rank() > 0
    )
    try:
        with listening():
            for step in progress:
                safe, text = copy.deepcopy(memory), ""
                if memory["row"] is None:
                    arguments = (
                        config,
                        scorer,
                        sampler,
                        optimizer,
                        step,
                        steps,
                        make_batch,
                        memory["state"],
                    )
                    memory["row"] = memory["state"]["last"] = train_step(*arguments)
                    safe = copy.deepcopy(memory)
                if config.eval_every and (step + 1) % config.eval_every == 0:
                    with interruptible():
                        figures, text = evaluate_now(step)
                    memory["row"] |= figures
                end_step(config, run, memory, text, progress)
                if memory["step"] % config.save_every == 0 or memory["step"] == steps:
                    save(
                        memory, save_best if close_window(memory, memory["step"] == steps) else None
                    )
            safe = None  # all is saved
            with interruptible():
                pass
    except Stopped:
        if safe is not None:
            save(safe)
        stop(f"stopped by SIGTERM: {newest(run)}, go on with --resume", distributed.STOPPED)
    if distributed.together():
        distributed.drop_weights(sampler.model)


def save_memory(config, run: Path, scorer, optimizer, memory: dict, save_best=None) -> None:
    """A state of all there is; weights that are not finite end the run instead."""
    if not finite_weights(scorer.model):
        stop(f"after {memory['step']} steps the weights are not finite: {newest(run)}")
    with saving(run):
        sizes = on_first(log_sizes, run)
        checkpoint.save_state(
            run, scorer, optimizer, memory | {"sizes": sizes}, save_best, config.keep
        )


def resume(run: Path, scorer, sampler, optimizer, memory: dict) -> bool:
    """Goes on from the newest state, which `open_run` has checked; False if the run ended before it
    had any."""
    found = on_first(checkpoint.states, run)
    if found:
        memory.update(checkpoint.load_state(found[0], scorer, optimizer))
        if distributed.together():
            distributed.gather_weights(scorer.model, sampler.model)
    with saving(run):
        on_first(cut_logs, run, memory.pop("sizes", {}))
        on_first(checkpoint.clean, run)
        on_first(checkpoint.publish_best, run, found[0] if found else None)
    return bool(found)


def end_step(config, run: Path, memory: dict, text: str, progress) -> None:
    """Logs the step in memory["row"], whose update and evaluation are made; stops after too many
    that were skipped."""
    row = memory["row"]
    with saving(run):
        on_first(log, run, row, text)
    show(progress, row)
    memory["bad"] = memory["bad"] + 1 if row["skipped"] else 0
    if memory["bad"] == config.max_skipped:
        fault = f"not finite in {memory['bad']} steps in a row: {row['not_finite']}"
        stop(f"step {row['step']}: {fault}; none of them changed the weights, and {newest(run)}")
    if row["stage"] == config.last_stage and config.judged_by in row and not row["skipped"]:
        memory["window"].append(row[config.judged_by])
    memory |= {"step": row["step"] + 1, "row": None}


def close_window(memory: dict, last: bool) -> bool:
    """Whether the model is the best so far, by the mean of the steps since the last saved state."""
    window, memory["window"] = memory["window"], []
    if window and (memory["best"] is None or sum(window) / len(window) > memory["best"]):
        memory["best"] = sum(window) / len(window)
        return True
    return last and memory["best"] is None  # no step says how good it is: the last model has to do


def memory_mib() -> float:
    """The peak so far: of the GPU if there is one, else of the process (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def show(progress, row: dict) -> None:
    keys = ("reward", "acc_t1", "acc_t2", "kl_t1", "response_length")
    shown = {key: f"{row[key]:.3f}" for key in keys if key in row}
    progress.set_postfix(
        stage=row["stage"], **shown, tokens_s=f"{row['tokens'] / row['seconds_rollout']:.0f}"
    )


def watcher(
    sampler,
    tokenizer,
    task,
    problems,
    prompts,
    config,
    method: str,
    keys: tuple[str, ...] = WATCHED,
):
    """What a training run calls now and then: figures `eval_*` at T = 1 on the first
    `eval_problems`, and a few of the conversations as text."""
    few = slice(config.eval_problems)

    def evaluate_now(step: int) -> tuple[dict, str]:
        figures, talks = evaluate(
            sampler, tokenizer, task, problems[few], prompts[few], config, 1.0, method
        )
        text = f"step {step + 1}\n{format_transcripts(talks)}\n\n"
        return {f"eval_{key}": figures[key] for key in keys if key in figures}, text

    return evaluate_now


def report(run: Path, results: dict, count: int, columns=COLUMNS) -> None:
    """A run's end: curves.png, the tables of base and trained model and of any `controls`, and
    results.json, which says that the run is complete."""

    def write() -> None:
        plot_curves(run)
        checkpoint.write_text(run / "results.json", json.dumps(results, indent=2) + "\n")

    on_first(write)
    models = {name: modes for name, modes in results.items() if name != "controls"}
    print(f"\n{count} validation problems:\n\n{format_table(models, columns)}")
    if "controls" in results:
        columns = ("retry_given_failure", "well_formed_retry")
        print(f"\nAfter the base model's failures:\n\n{format_table(results['controls'], columns)}")
    print(f"\nrun: {run}")
