"""The policy: loading, scoring, updating and saving a causal language model, and a run's directory.

Everything that the algorithm files share and that is not an algorithm. One process for now; `Scorer.forward` does all
the work on the weights that a training step needs, so that sharding has one module to wrap.
"""

import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from loss import Scores, policy_loss, token_scores

WEIGHTS = ("*.safetensors", "*.bin")


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
    return parser.parse_args_into_dataclasses(args)[0]


def load_model(name: str, device: str = "cpu"):
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
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: {str(error).splitlines()[0]}") from None
    model.to(device).eval()
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


def context_length(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


class Scorer(nn.Module):
    """Token log-probabilities, entropy and the KL to a reference, of whole rollouts.

    forward(ids (B, T), action_mask (B, T), temperature) -> Scores of (B, T) float32 tensors, 0 where not sampled.
    Rows start at position 0 and are padded on the right, where causal attention keeps padding out of sight: so no
    attention mask, and no token value is ever taken for padding.
    """

    def __init__(self, model, reference=None, chunk: int = 2048):
        super().__init__()
        self.model, self.reference, self.chunk = model, reference, chunk
        if reference is not None:
            reference.requires_grad_(False)

    def forward(self, ids: Tensor, action_mask: Tensor, temperature: float = 1.0) -> Scores:
        chosen = action_mask[:, 1:]  # position t is predicted at t - 1
        hidden, head = self._hidden(self.model, ids, chosen)
        ref_hidden = ref_head = None
        if self.reference is not None:
            with torch.no_grad():
                ref_hidden, ref_head = self._hidden(self.reference, ids, chosen)
        flat = token_scores(hidden, head, ids[:, 1:][chosen], ref_hidden, ref_head, temperature, self.chunk)
        return Scores(*(x.new_zeros(ids.shape).masked_scatter(action_mask, x) for x in flat))

    @staticmethod
    def _hidden(model, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return hidden[chosen], model.get_output_embeddings().weight  # (M, H), (V, H)


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row indices, longest first, cut so that rows x longest row stays within the budget; each row in exactly one."""
    order = lengths.argsort(descending=True, stable=True)
    batches, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def accumulate_gradients(
    scorer: Scorer,
    rollout,
    advantages: Tensor,
    kl_coef: Tensor,
    denominator: float,
    temperature: float = 1.0,
    kl_kind: str = "exact",
    token_budget: int = 16384,
    old_logprobs: Tensor | None = None,
    clip: float = 0.2,
) -> Scores:
    """Adds the gradient of `policy_loss` over all rows of a rollout; returns the detached scores, each (B, T).

    advantages, kl_coef (B, T). The denominator is the whole batch's, so how rows fall into micro-batches changes
    nothing.
    """
    kept = [torch.zeros_like(rollout.logprobs) for _ in Scores._fields]
    for rows in micro_batches(rollout.lengths, token_budget):
        cut = int(rollout.lengths[rows].max())
        ids, mask, turn, adv, coef = (
            x[rows, :cut] for x in (rollout.ids, rollout.action_mask, rollout.turn, advantages, kl_coef)
        )
        scores = scorer(ids, mask, temperature)
        old = None if old_logprobs is None else old_logprobs[rows, :cut]
        policy_loss(scores, adv, coef, mask, turn, denominator, kl_kind, old, clip).backward()
        for whole, part in zip(kept, scores, strict=True):
            whole[rows, :cut] = part.detach().to(whole)
    return Scores(*kept)


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


def row_seeds(seed: int, step: int, rows: int) -> list[int]:
    """One seed for each row of a step's batch, never used twice in a run."""
    return [(seed * 1_000_003 + step) * 1_000_003 + row for row in range(rows)]


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


def open_run(config) -> Path:
    """Makes `config.output_dir` with its config.json. One that is in use is refused, unless it is to be resumed."""
    run = Path(config.output_dir)
    if config.resume:
        if not (run / "state.pt").is_file():
            raise ValueError(f"--resume: {run} has no state.pt to go on from; start without --resume")
        return run
    if run.exists() and any(run.iterdir()):
        raise ValueError(f"--output_dir {run} is in use: name another, or go on with it with --resume")
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
