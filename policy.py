"""The policy: loading, scoring, updating and saving a causal language model, and a run's directory.

Everything that the algorithm files share and that is not an algorithm. One process for now.
"""

import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from loss import KL_KINDS, Scores, policy_loss
from scorer import Scorer

logging.disable_progress_bar()  # "Loading weights" on every load
WEIGHTS = ("*.safetensors", "*.bin")


def flag(default, text: str, **more):
    """A dataclass field that is a command-line flag with a help line."""
    return field(default=default, metadata={"help": text, **more})


KL_HELP = "KL estimator; loss.kl_terms says which gradient each one has"


@dataclass
class TaskConfig:
    """The flags that say what is to be done, and by which model."""

    model: str = flag("models/tiny", "model directory or hub name")
    task: str = flag("tiny", "tiny, countdown, math, gsm8k, mbpp, mbpp_r, humaneval or function_call")
    data: str | None = flag(
        None,
        "problems: a JSONL or JSON file, hub:NAME[:CONFIG], or train=...,test=... with one of these each; default: the "
        "task's own. One file is split by a hash of its content, 80/10/10 (MBPP: by task_id, as published)",
    )
    prompts: str | None = flag(None, "JSON file that replaces some of the task's prompts; prompts.py has their names")
    shots: int | None = flag(
        None, "few-shot examples, from the train split (MBPP: from task_id 1 to 10); default: 3 for mbpp, else 0"
    )
    shots_file: str | None = flag(
        None, "take the examples from this file instead; a `response` in it is shown as it is"
    )
    unsafe: bool = flag(
        False, "run programs of code tasks even where the sandbox can't hold them: they can do what you can do"
    )


@dataclass
class TrainConfig(TaskConfig):
    """The flags that every training script shares."""

    output_dir: str = flag("runs/run", "the run's directory: new, or to be resumed")
    resume: bool = flag(False, "go on with the run in --output_dir")
    seed: int = flag(0, "seed of the problems' order and of every sample")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    temperature: float = flag(1.0, "sampling temperature while training")
    kl: str = flag("exact", KL_HELP, choices=KL_KINDS)
    lr: float = flag(1.5e-4, "peak learning rate of AdamW")
    warmup: int = flag(10, "steps of linear warm-up")
    schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    epochs: int = flag(1, "updates a batch; above 1 the ratio pi / pi_old is clipped")
    clip: float = flag(0.2, "how far the ratio may move from 1 when epochs > 1")
    token_budget: int = flag(16384, "tokens of a micro-batch")
    checkpointing: bool = flag(False, "compute the activations again in the backward pass: less memory, more time")
    save_every: int = flag(20, "steps between saved states; the best checkpoint is chosen over such windows")
    eval_every: int = flag(40, "steps between evaluations at T = 1 on validation; 0: only at the end")
    eval_problems: int = flag(300, "validation problems of those evaluations")
    final_problems: int | None = flag(None, "validation problems of the final table; default: all")
    probe: int = flag(64, "training problems tried first: where all fail or none, training stops; 0: no probe")

    last_stage = 1  # no flag: the stage in which the best checkpoint is looked for


@contextmanager
def exit_on_bad_input():
    """Around a script's preparations: a ValueError there is the user's to mend, so it is one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_args(config_class, args: list[str] | None = None):
    """The dataclass, filled from the command line; a flag that does not parse is one line and exit code 2."""
    parser = HfArgumentParser(config_class)

    def error(message: str):
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    parser.error = error
    config, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {unknown[0]}: see --help")
    return config


def check_counts(config, *may_be_zero: str) -> None:
    """Every whole number among the flags must be at least 1, or 0 where that means something."""
    for name, value in asdict(config).items():
        least = 0 if name in (*may_be_zero, "seed", "warmup", "eval_every", "shots", "probe") else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")


def load_model(name: str, device: str | None = None):
    """(model, tokenizer) of a local directory or a hub name, in float32, in eval mode (no dropout, ever)."""
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "models/", "runs/"))
    if looks_local and not (path / "config.json").is_file():
        raise ValueError(f"--model {name}: no config.json there; give a Hugging Face model directory")
    if looks_local and not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise ValueError(f"--model {name}: no weights there (*.safetensors); was the directory copied whole?")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file or an unknown name makes of itself in there
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--model {name} can't be loaded: {reason[:300]}") from None
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    check_head(model, name)
    return model, tokenizer


@torch.no_grad()
def check_head(model, name: str) -> None:
    """Refuses models that scale or cap their logits after the head, which `token_scores` would not know of."""
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
        raise ValueError(f"--model {name}: its logits are not hidden @ head.T (a cap, scale or bias); not supported")


def fingerprint(model) -> str:
    """Of the weights: the beginning of every parameter, byte by byte."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().flatten()[:256].cpu().float().numpy().tobytes())
    return digest.hexdigest()


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row indices, cut so that rows x longest row stays within the budget; each row in exactly one.

    In order, not by length, since neighbours are siblings that share their prefix; padding costs attention only.
    """
    batches, start, longest = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > token_budget:
            batches.append(torch.arange(start, row))
            start, longest = row, length
    return [*batches, torch.arange(start, len(lengths))]


class Batch(NamedTuple):
    """What an algorithm makes of one step's rollout, and all that the shared update needs.

    advantages, kl_coef: (B, T) float32, one for every sampled token, 0 elsewhere
    denominator:         what the loss is divided by, counted over the whole batch
    figures:             the step's own metrics; `reward` among them decides which checkpoint is kept
    held:                (B, T) bool or None: tokens of the prompt that get a KL all the same, and nothing else
    """

    rollout: object
    advantages: Tensor
    kl_coef: Tensor
    denominator: float
    figures: dict
    held: Tensor | None = None


def accumulate_gradients(scorer: Scorer, batch: Batch, config, old_logprobs: Tensor | None = None) -> Scores:
    """Adds the gradient of `policy_loss` over all rows of a batch; returns the detached scores, each (B, T)."""
    rollout = batch.rollout
    kept = [torch.zeros_like(rollout.logprobs) for _ in Scores._fields]
    scored = rollout.action_mask if batch.held is None else rollout.action_mask | batch.held
    whole = (rollout.ids, scored, rollout.turn, batch.advantages, batch.kl_coef)
    for rows in micro_batches(rollout.lengths, config.token_budget):
        cut = int(rollout.lengths[rows].max())
        ids, mask, turn, advantages, kl_coef = (x[rows, :cut] for x in whole)
        scores = scorer(ids, mask, config.temperature)
        old = None if old_logprobs is None else old_logprobs[rows, :cut]
        loss = policy_loss(scores, advantages, kl_coef, mask, turn, batch.denominator, config.kl, old, config.clip)
        loss.backward()
        for all_rows, part in zip(kept, scores, strict=True):
            all_rows[rows, :cut] = part.detach().to(all_rows)
    return Scores(*kept)


def update(scorer: Scorer, optimizer, batch: Batch, config) -> tuple[Scores, float]:
    """One on-policy step on the batch, or `config.epochs`: (scores before the first, norm of the last gradient)."""
    before = None
    for _ in range(config.epochs):
        old_logprobs = None if before is None else before.logprobs
        scores = accumulate_gradients(scorer, batch, config, old_logprobs)
        before = before or scores
        norm = apply_gradients(scorer.model, optimizer, config.max_grad_norm)
    return before, norm


def apply_gradients(model, optimizer, max_norm: float) -> float:
    """Clips, steps, clears. Returns the gradient's norm; one that is not finite leaves the weights untouched."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_lr(optimizer, peak: float, step: int, steps: int, warmup: int, schedule: str) -> None:
    """Linear warm-up over `warmup` steps, then `constant`, or `cosine` to zero at `steps`."""
    scale = min(1.0, (step + 1) / max(1, warmup))
    if schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    for group in optimizer.param_groups:
        group["lr"] = peak * scale


def row_seeds(rows: int, *key) -> list[int]:
    """One seed a row. Another key (what for, the run's seed, the step) gives seeds of its own."""
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    return [(start + row) % 2**63 for row in range(rows)]


def pick_problems(problems: list[dict], seed: int, step: int, count: int) -> list[dict]:
    """The `step`-th batch of an endless stream of shuffled epochs. A pure function, so resuming needs no cursor."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        chosen.append(problems[_epoch_order(len(problems), seed, epoch)[index]])
    return chosen


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def check_run(config) -> None:
    """Refuses an output directory that is in use, or to resume what is not there or had other flags. Writes nothing."""
    run = Path(config.output_dir)
    if not config.resume:
        if run.is_file() or run.is_dir() and any(run.iterdir()):
            raise ValueError(f"--output_dir {run} is in use: name another, or go on with it with --resume")
        return
    if not (run / "state.pt").is_file():
        raise ValueError(f"--resume: {run} has no state.pt to go on from; start a new run elsewhere")
    flags, before = asdict(config), json.loads((run / "config.json").read_text())
    changed = [k for k in flags if k not in ("resume", "output_dir") and flags[k] != before.get(k)]
    if changed:
        was = ", ".join(f"--{k} was {before.get(k)}, is {flags[k]}" for k in changed)
        raise ValueError(f"--resume: {run} was started with other flags: {was}")


def open_run(config) -> Path:
    """The run's directory, made with its config.json unless it is resumed."""
    check_run(config)
    run = Path(config.output_dir)
    if not config.resume:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    return run


def save_model(model, tokenizer, path: Path) -> None:
    """In Hugging Face format, complete or not at all."""
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def save_state(run: Path, **state) -> None:
    """All that `--resume` needs, complete or not at all."""
    torch.save(state, run / "state.pt.new")
    os.replace(run / "state.pt.new", run / "state.pt")


def log_metrics(run: Path, row: dict) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def forget_metrics(run: Path, step: int) -> None:
    """Drops the lines of `step` and later, which a resumed run is about to write again."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] < step))


def token_metrics(batch: Batch, scores: Scores) -> dict:
    """Figures that mean the same for every algorithm; kl_* are nats an attempt, the others of a sampled token.

    ratio_error: the largest |log pi - log pi_sampler|: 0 up to rounding while sampler and scorer agree.
    zero_advantage: share of sampled tokens without a policy gradient. truncated: attempts cut off by the limit.
    """
    rollout, sampled = batch.rollout, batch.rollout.action_mask
    row = {}
    for turn in rollout.turn[sampled if batch.held is None else sampled | batch.held].unique().tolist():
        row[f"kl_t{turn + 1}"] = float((scores.kl * (rollout.turn == turn)).sum() / len(rollout.ids))
    row["entropy"] = float(scores.entropy[sampled].mean())
    row["ratio_error"] = float((scores.logprobs - rollout.logprobs)[sampled].abs().max())
    row["zero_advantage"] = float((batch.advantages[sampled] == 0).float().mean())
    row["truncated"] = 1 - float(rollout.stopped.float().mean())
    row["tokens"] = int(sampled.sum())
    row["response_length"] = row["tokens"] / rollout.stopped.numel()
    return row


def train(config, run: Path, scorer: Scorer, tokenizer, steps: int, make_batch, evaluate_now, state: dict) -> None:
    """The loop around an algorithm: `make_batch(step, state) -> Batch`, one update, metrics, checkpoints.

    `evaluate_now(step) -> dict` joins the metrics every `eval_every` steps. `state` is the algorithm's own memory
    between steps; it is saved and resumed with the rest, and holds the last step's figures under "last". The model
    kept in run/checkpoint is the one after the `save_every` steps with the highest mean training reward, counting
    steps of `config.last_stage` only.
    """
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    start, best, window = 0, float("-inf"), []

    def save(step: int) -> None:
        parts = {"scorer": scorer.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(run, **parts, step=step, best=best, state=state)

    if config.resume:
        start, best = _resume(run, scorer, optimizer, state)
    else:
        save(0)
    progress = trange(start, steps, initial=start, total=steps)
    for step in progress:
        set_lr(optimizer, config.lr, step, steps, config.warmup, config.schedule)
        started = time.perf_counter()
        batch = make_batch(step, state)
        sampled = time.perf_counter()
        scores, norm = update(scorer, optimizer, batch, config)
        row = {"stage": batch.figures["stage"], "step": step} | batch.figures | token_metrics(batch, scores)
        row |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"seconds_rollout": sampled - started, "seconds_update": time.perf_counter() - sampled}
        row["memory_mib"] = memory_mib()
        state["last"] = row
        if config.eval_every and (step + 1) % config.eval_every == 0:
            row |= evaluate_now(step)
        log_metrics(run, row)
        show(progress, row)
        if row["stage"] == config.last_stage and "reward" in row:
            window.append(row["reward"])
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            if window and sum(window) / len(window) > best:
                best = sum(window) / len(window)
                save_model(scorer.model, tokenizer, run / "checkpoint")
            window.clear()
            save(step + 1)


def memory_mib() -> float:
    """The peak so far: of the GPU if there is one, else of the process (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def show(progress, row: dict) -> None:
    keys = ("reward", "acc_t1", "acc_t2", "kl_t1", "response_length")
    shown = {key: f"{row[key]:.3f}" for key in keys if key in row}
    progress.set_postfix(stage=row["stage"], **shown, tokens_s=f"{row['tokens'] / row['seconds_rollout']:.0f}")


def _resume(run: Path, scorer: Scorer, optimizer, state: dict) -> tuple[int, float]:
    saved = torch.load(run / "state.pt", weights_only=True)
    scorer.load_state_dict(saved["scorer"])
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])
    forget_metrics(run, saved["step"])
    return saved["step"], saved["best"]
