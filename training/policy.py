"""The policy: loading, scoring and updating a causal language model, be it in one place or spread
over many.

Bytes of memory that a rank of torchrun needs, of N parameters, V words, width H, L layers with K
key-value heads of size D, for S ranks that share one copy (all, or with --hsdp those of a copy),
computing in c bytes (bfloat16: 2):

    always      (4 + 8 + 4) N / S                      weights, Adam's moments, the reference:
                float32
    sampling    c N  +  2 c L K D t                    a whole copy; the cache of t tokens
    updating    4 N / S  +  (2 + 1) c E  +  5 c N / L  gradients; embedding and head (E = V H,
                                                       untied 2 V H) of both models, with gradient;
                                                       blocks that are gathered and reduced
                6 * 4 * 2^24                           logits: a chunk, in float32, and what is made
                of it
                c L H m  +  34 c H m                   with --checkpointing: m tokens of a
                                                       micro-batch at each block, and all that is
                                                       kept of one

The peak is the first line and the larger of the other two. bench/memory.py prints it for some
models.
"""

import copy
import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loss import Scores, policy_loss
from training import distributed
from training.scorer import Scorer

logging.disable_progress_bar()  # "Loading weights" on every load
WEIGHTS = ("*.safetensors", "*.bin")


def compute_dtype(config) -> torch.dtype:
    """What the models compute in: float32, or with torchrun on GPUs bfloat16, unless a flag says
    otherwise.

    ValueError for flags that make no sense with this number of processes.
    """
    usual = {"dtype": None, "hsdp": 1, "cpu_offload": False}
    asked = [f"--{name}" for name, value in usual.items() if getattr(config, name, value) != value]
    if asked and not distributed.together():
        raise ValueError(
            f"{', '.join(asked)}: needs torchrun, on one GPU too: torchrun --nproc-per-node 1 ..."
        )
    if distributed.world() % getattr(config, "hsdp", 1):
        raise ValueError(f"--hsdp {config.hsdp} does not divide the {distributed.world()} ranks")
    halved = distributed.together() and torch.cuda.is_available()
    return getattr(torch, config.dtype or ("bfloat16" if halved else "float32"))


def load_model(name: str, device: str | None = None, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a local directory or a hub name, in eval mode (no dropout, ever).

    With torchrun the first rank reads it, and every rank gets a whole copy in `dtype`.
    """
    source, tokenizer = read_model(name)
    if distributed.together():
        model = skeleton(source)
        for parameter in model.parameters():
            # not the buffers, which are float32 in every model
            parameter.data = parameter.data.to(dtype)
        materialise(model, distributed.device())
        distributed.send(source, model)
    else:
        model = source.to(device or distributed.device())
    check_head(model, name)
    return model, tokenizer


def read_model(name: str):
    """(model on the CPU in float32, tokenizer). On ranks other than the first, the model has no
    values."""
    models = []

    def read():
        model, tokenizer = _read_files(name)
        models.append(model)
        return model.config, model.generation_config, tokenizer

    config, generation_config, tokenizer = distributed.on_first(read)
    return models[0] if models else _without_values(config, generation_config), tokenizer


def _read_files(name: str):
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "models/", "runs/"))
    if looks_local and not (path / "config.json").is_file():
        raise ValueError(
            f"--model {name}: no config.json there; give a Hugging Face model directory"
        )
    if looks_local and not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise ValueError(
            f"--model {name}: no weights there (*.safetensors); was the directory copied whole?"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), tokenizer
    # whatever a damaged file or an unknown name makes of itself in there
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--model {name} can't be loaded: {reason[:300]}") from None


def skeleton(model):
    """Another model of the same build, all shapes and no values."""
    return _without_values(model.config, model.generation_config)


def _without_values(config, generation_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    model.generation_config = generation_config
    return model


def materialise(module: nn.Module, device, buffer_device=None) -> None:
    """Memory for a module that has no values, which it does not set. Tied weights stay tied."""
    names = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name.rpartition("."))
    module.to_empty(device=device)
    for (first, _, weight), *others in names.values():
        for owner, _, name in others:
            setattr(module.get_submodule(owner), name, getattr(module.get_submodule(first), weight))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(buffer_device or device))


def make_scorer(model, config, reference: bool = True) -> Scorer:
    """The policy to be trained, which starts as the whole `model`, and unless told otherwise its
    frozen reference.

    With torchrun both are spread over the ranks, in float32, and `model` keeps being a copy of the
    whole policy to
    sample from: it is given up for each update, and gathered again after it.
    """
    if not distributed.together():
        return Scorer(
            model, copy.deepcopy(model) if reference else None, checkpointing=config.checkpointing
        )
    distributed.drop_weights(model)
    source, _ = read_model(config.model)  # again, since `model` may be rounded
    models, device = [skeleton(source) for _ in range(1 + reference)], distributed.device()
    scorer = Scorer(*models, checkpointing=config.checkpointing)
    distributed.shard(scorer, models, compute_dtype(config), config.hsdp, config.cpu_offload)
    materialise(scorer, "cpu" if config.cpu_offload else device, device)
    distributed.send(source, *models)
    del source  # of the first rank, before the next whole copy
    distributed.gather_weights(scorer.model, model)
    return scorer


@torch.no_grad()
def check_head(model, name: str) -> None:
    """Refuses models that scale or cap their logits after the head, which `token_scores` would not
    know of."""
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if not torch.allclose(logits, model(input_ids=ids).logits, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"--model {name}: its logits are not hidden @ head.T (a cap, scale or bias); not supported"
        )


def fingerprint(model) -> str:
    """Of the weights: the beginning of every parameter, byte by byte."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(
            name.encode() + parameter.detach().flatten()[:256].cpu().float().numpy().tobytes()
        )
    return digest.hexdigest()


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row indices, cut so that rows x longest row stays within the budget; each row in exactly one.

    In order, not by length, since neighbours are siblings that share their prefix; padding costs
    attention only.
    """
    batches, start, longest = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > token_budget:
            batches.append(torch.arange(start, row))
            start, longest = row, length
    return [*batches, torch.arange(start, len(lengths))] if len(lengths) else []


class Batch(NamedTuple):
    """What an algorithm makes of one step's rollout, and all that the shared update needs: this
    rank's rows.

    advantages, kl_coef: (B, T) float32, one for every sampled token, 0 elsewhere
    denominator:         what the loss is divided by, counted over the whole batch, of all ranks
    figures:             the step's own metrics; `reward` among them decides which checkpoint is
                         kept
    held:                (B, T) bool or None: tokens of the prompt that get a KL all the same, and
                         nothing else
    """

    rollout: object
    advantages: Tensor
    kl_coef: Tensor
    denominator: float
    figures: dict
    held: Tensor | None = None


def accumulate_gradients(
    scorer, batch: Batch, config, old_logprobs: Tensor | None = None
) -> tuple[Scores, float]:
    """Adds the gradient of `policy_loss` over all rows of a batch: (detached scores, each (B, T);
    the loss)."""
    rollout, loss = batch.rollout, 0.0
    kept = [torch.zeros_like(rollout.logprobs) for _ in Scores._fields]
    scored = rollout.action_mask if batch.held is None else rollout.action_mask | batch.held
    whole = (rollout.ids, scored, rollout.turn, batch.advantages, batch.kl_coef)
    pieces = micro_batches(rollout.lengths, config.token_budget)
    idle = max(distributed.exchange(len(pieces))) - len(pieces)
    for rows in pieces:
        cut = int(rollout.lengths[rows].max())
        ids, mask, turn, advantages, kl_coef = (x[rows, :cut] for x in whole)
        scores = scorer(ids, mask, config.temperature)
        old = None if old_logprobs is None else old_logprobs[rows, :cut]
        part = policy_loss(
            scores, advantages, kl_coef, mask, turn, batch.denominator, config.kl, old, config.clip
        )
        part.backward()
        loss += part.detach()
        for all_rows, part in zip(kept, scores, strict=True):
            all_rows[rows, :cut] = part.detach().to(all_rows)
    for _ in range(idle):  # another rank has more, and weights are gathered by all ranks or none
        token = torch.tensor([[False, True]], device=rollout.ids.device)
        (0 * scorer(token.long(), token).logprobs.sum()).backward()
    return Scores(*kept), float(loss)


def update(scorer: Scorer, optimizer, batch: Batch, config) -> tuple[Scores, float, list[str]]:
    """One on-policy step on the batch, or `config.epochs`: (scores before the first, norm of the
    last gradient, what was not finite). If anything was not, that step is not made, and no other
    after it."""
    before, wrong = None, []
    for _ in range(config.epochs if batch.denominator else 1):
        old_logprobs = None if before is None else before.logprobs
        scores, loss = accumulate_gradients(scorer, batch, config, old_logprobs)
        before, wrong = before or scores, not_finite(batch, loss)
        norm = apply_gradients(
            scorer.model, optimizer, config.max_grad_norm, bool(batch.denominator) and not wrong
        )
        wrong += [] if math.isfinite(norm) else ["gradient"]
        if wrong:
            break
    return before, norm, wrong


def not_finite(batch: Batch, loss: float) -> list[str]:
    """What is NaN or infinite on any rank; the same list on all of them."""
    parts = {
        "reward": [x for x in batch.figures.values() if isinstance(x, float)],
        "log-probs of the sampler": batch.rollout.logprobs,
        "advantages": batch.advantages,
        "loss": [loss],
    }
    local = [name for name, values in parts.items() if not torch.as_tensor(values).isfinite().all()]
    found = {name for names in distributed.exchange(local) for name in names}
    return [name for name in parts if name in found]


def finite_weights(model) -> bool:
    """Of all ranks."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(distributed.exchange(all(bool(part.isfinite().all()) for part in parts)))


def apply_gradients(model, optimizer, max_norm: float, wanted: bool = True) -> float:
    """Clips, steps if `wanted`, clears. Returns the gradient's norm; one that is not finite makes
    no step either."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if wanted and math.isfinite(norm):
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


def row_seeds(things: int | range, *key, each: int = 1) -> list[int]:
    """A seed for each row: `each` rows a thing, and a range for a rank's share of them. Another key
    (what for, the run's seed, the step) gives seeds of its own."""
    things = range(things) if isinstance(things, int) else things
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    return [(start + row) % 2**63 for row in range(things.start * each, things.stop * each)]


def pick_problems(problems: list[dict], seed: int, step: int, count: int) -> list[dict]:
    """The `step`-th batch of an endless stream of shuffled epochs. A pure function, so resuming
    needs no cursor."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        chosen.append(problems[_epoch_order(len(problems), seed, epoch)[index]])
    return chosen


def unzip(pairs: list, some: range) -> tuple[list, list]:
    """Problems and prompts, of some of the (problem, prompt) pairs."""
    problems, prompts = zip(*pairs[some.start : some.stop], strict=True) if some else ((), ())
    return [*problems], [*prompts]


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
