"""A training update as one process on a GPU makes it: a group of one, bfloat16, float32 weights.

32 rows of 256 + 256 tokens, prompts shared by 8: 9,216 nodes, of which 8,192 are scored.
"""

from functools import partial
from types import SimpleNamespace

import torch

from gpu_parts.lines import device, gpu, once, peak_gib, timed, wrong
from gpu_parts.models import NAMES, prompts_of, random_model
from gpu_parts.profiles import kernels_of, ranking
from loss import token_scores
from sampler import fast
from score import Config
from training import distributed, lora
from training import scorer as scorer_module
from training.models import cast, materialise, skeleton
from training.policy import Batch, accumulate_gradients, apply_gradients
from training.scorer import Scorer, prefix_tree

HALF = torch.bfloat16
PEAK = 989e12  # FLOPs a second of bfloat16 products, by the data sheet of an H100 or H200


def update(part):
    distributed.start(Config(dtype="bfloat16"))
    work = batch_of(*((4, 8, 8) if part.small else (32, 256, 256)))
    part.section("gradients", compared_gradients, part, work)
    for name in NAMES:
        part.section(f"{name} all weights", all_weights, part, name, work)
        part.section(f"{name} LoRA", adapters_alone, part, name, work)
    distributed.leave()


def compiled(part):
    """The same with --compile, whose first update took more than 75 s on an H100's host."""
    distributed.start(Config(dtype="bfloat16"))
    work = batch_of(*((4, 8, 8) if part.small else (32, 256, 256)))
    for name in NAMES[:1] if part.small else NAMES[::-1]:  # the smaller one first
        part.section(f"{name} compiled", compiled_blocks, part, name, work)
    distributed.leave()


def batch_of(rows: int, prompt: int, new: int) -> Batch:
    """A rollout of rows that share their prompts by 8."""
    ids = torch.tensor(prompts_of(rows, prompt + new), device=device())
    ids[:, :prompt] = ids[torch.arange(rows, device=ids.device) // 8 * 8, :prompt]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt:] = True
    lengths = torch.full((rows,), prompt + new, device=ids.device)
    zeros = torch.zeros(ids.shape, device=ids.device)
    rollout = SimpleNamespace(
        ids=ids, action_mask=mask, turn=torch.zeros_like(ids), lengths=lengths, logprobs=zeros
    )
    advantages = torch.randn(ids.shape, device=ids.device) * mask
    return Batch(rollout, advantages, 0.05 * mask.float(), float(rows), {})


def whole_scorer(part, name: str, **how) -> Scorer:
    """Policy and reference with all weights trained, sharded over the one rank."""
    plain = random_model(part, name, HALF)
    models = [skeleton(plain) for _ in range(2)]
    scorer = Scorer(*models, **how)
    distributed.shard(scorer, models, HALF)
    materialise(scorer, device())
    distributed.send(plain, *models)
    return scorer


def lora_scorer(part, name: str, **how) -> Scorer:
    model = random_model(part, name, HALF)
    adapters = lora.make(model, 4 if part.small else 16, 0)
    scorer = Scorer(model, model, adapters, **how)
    distributed.shard(scorer, [], HALF, whole=model)
    return scorer


def all_weights(part, name: str, work: Batch) -> None:
    scorer = whole_scorer(part, name)
    settings = {
        "as it is": {},
        "no kernels": {"kernels": False},
        "checkpointing": {"checkpointing": True},
    }
    optimizer = optimizer_of(scorer)
    for label, setting in settings.items():
        what = f"{name} {label}"
        part.measure(what, updates, scorer, optimizer, work, setting, needs=5)
    part.measure(f"{name} profile", launches, scorer, work, needs=5)
    part.measure(f"{name} gather_weights", gathering, part, name, scorer, needs=4)
    part.measure(f"{name} head by chunk", head_alone, scorer, work, needs=4)


def adapters_alone(part, name: str, work: Batch) -> None:
    scorer = lora_scorer(part, name)
    optimizer = optimizer_of(scorer)
    settings = {
        "LoRA": {},
        "LoRA no kernels": {"kernels": False},
        "LoRA checkpointing": {"checkpointing": True},
    }
    for label, setting in settings.items():
        part.measure(f"{name} {label}", updates, scorer, optimizer, work, setting, needs=5)


def compiled_blocks(part, name: str, work: Batch) -> None:
    if part.small:  # traced as on a GPU, but a CPU's compiler takes minutes
        torch.compile = partial(torch.compile, backend="eager")
    kinds = {"LoRA": lora_scorer} | ({} if part.small else {"all weights": whole_scorer})
    for label, make in kinds.items():

        def measured(make=make):
            scorer = make(part, name, compiled=True)
            found = updates(scorer, optimizer_of(scorer), work, {})
            return found | {"profile": launches(scorer, work)}

        part.measure(f"{name} {label} compiled", measured, needs=25)


def compared_gradients(part, work: Batch) -> None:
    part.measure("gradients", sharded_gradients, part, NAMES[-1], work, needs=8)


def sharded_gradients(part, name: str, work: Batch) -> dict:
    """Of one rank in bfloat16, with checkpointing and without, beside a plain float32 model's."""
    twins = [cast(random_model(part, name, HALF), torch.float32) for _ in range(2)]
    right, found = gradient_of(Scorer(*twins), work), {}
    for label, checkpointing in (("whole", False), ("checkpointing", True)):
        scorer = whole_scorer(part, name)
        scorer.checkpointing = checkpointing
        ours = gradient_of(scorer, work)
        off = {key: float((ours[key] - x).norm() / x.norm()) for key, x in right.items()}
        worst = sorted(off.items(), key=lambda item: -item[1])[:6]
        both = [torch.stack([x.norm() for x in g.values()]).norm() for g in (ours, right)]
        rest = torch.stack([(ours[key] - x).norm() for key, x in right.items()]).norm()
        found[label] = {"relative": float(rest / both[1]), "norms": [float(x) for x in both]}
        found[label]["worst"] = worst
    fine = {label: found[label]["relative"] < 0.1 for label in found}
    return found | wrong(**fine)


def gradient_of(scorer: Scorer, work: Batch) -> dict:
    """Of each parameter, whole, in float32."""
    gradients_of(scorer, work)
    grads = {key: p.grad for key, p in scorer.trained.named_parameters()}
    return {
        key: (g.full_tensor() if hasattr(g, "full_tensor") else g).float()
        for key, g in grads.items()
    }


def optimizer_of(scorer: Scorer):
    parameters = scorer.trained.parameters()
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)


def updates(scorer: Scorer, optimizer, work: Batch, setting: dict) -> dict:
    """Three of them; the first one plans and compiles, the last one is what counts."""
    scorer.checkpointing = setting.get("checkpointing", False)
    scorer_module.fast = fast if setting.get("kernels", True) else None
    times, norms = [], []
    peak_gib()
    for _ in range(3):
        gradients = once(lambda: gradients_of(scorer, work))
        step = once(lambda: norms.append(apply_gradients(scorer.trained, optimizer, 1.0)))
        times.append((gradients, step))
    gradients, step = times[-1]
    flops = flops_of(scorer, work)
    found = {"first_s": times[0][0], "gradients_s": gradients, "optimizer_s": step}
    found |= {
        "TFLOP_s": flops / gradients / 1e12,
        "MFU": flops / gradients / PEAK if gpu() else None,
    }
    return found | {"norm": norms[-1], "peak_GiB": peak_gib()}


def gradients_of(scorer: Scorer, work: Batch) -> None:
    flags = Config(dtype="bfloat16", token_budget=work.rollout.ids.numel())
    accumulate_gradients(scorer, work, flags)


def launches(scorer: Scorer, work: Batch) -> dict:
    """Kernels of an update's gradients, with all activations kept."""
    scorer.checkpointing, scorer_module.fast = False, fast
    return ranking(*kernels_of(lambda: gradients_of(scorer, work)))


def flops_of(scorer: Scorer, work: Batch) -> float:
    """What an update can't do without: of policy 6 a weight and token, of the reference 2.

    Of frozen weights 4, since they have no gradient of their own. Attention's are left out.
    """
    ids, mask = work.rollout.ids, work.rollout.action_mask
    nodes, scored = prefix_tree(ids, torch.ones_like(mask)).ids.numel(), int(mask.sum())
    head = scorer.model.get_output_embeddings().weight.numel()
    weights = sum(p.numel() for p in scorer.model.parameters())
    each = (6 if scorer.adapters is None else 4) + 2
    return each * ((weights - head) * nodes + head * scored)


def gathering(part, name: str, scorer: Scorer) -> dict:
    """The whole policy in bfloat16, as before a rollout."""
    whole = cast(skeleton(scorer.model), HALF)
    materialise(whole, device())

    def again():
        distributed.drop_weights(whole)
        distributed.gather_weights(scorer.model, whole)

    return {"gather_s": timed(again, 3, 1)}


def head_alone(scorer: Scorer, work: Batch) -> dict:
    """Seconds of the loss's own part, forward and backward, by logits a chunk."""
    count, words = int(work.rollout.action_mask.sum()), scorer.model.config.vocab_size
    found, size = {}, scorer.model.config.hidden_size
    half = {"device": device(), "dtype": HALF}
    hidden, head = (torch.randn(n, size, **half).requires_grad_() for n in (count, words))
    tokens = torch.randint(words, (count,), device=device())
    inputs = (hidden, head, tokens, hidden.detach(), head.detach())
    score = fast.score_of(torch.device(device())) if fast else None

    def both_ways(chunk):
        scores = token_scores(*inputs, chunk=chunk, score=score)
        (scores.logprobs.sum() + scores.kl.sum()).backward()
        hidden.grad = head.grad = None

    for power in (24, 26, 27, 28):
        chunk = max(1, 2**power // words)
        found[f"2^{power}"] = timed(lambda chunk=chunk: both_ways(chunk), 2, 1)
    return {"seconds": found}
