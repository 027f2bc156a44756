"""How fast a step was, and what of the machine it used.

MFU, the share of the GPUs' dense bfloat16 arithmetic that an update made use of, is

    FLOPs / (seconds of the update * peak of a GPU * GPUs)
    FLOPs = (6 W + 2 W) nodes + (6 E + 2 E) scored                  policy and reference
            (4 W + 6 n + 2 W) nodes + (4 E + 2 E) scored            with n parameters of adapters

of a model with W weights in the matrices of its blocks and a head of E. Nodes are the distinct
prefixes of a micro-batch (`scorer.PrefixTree`), which is less than its tokens, and scored are the
distinct ones of those that the loss is about; both times --epochs. A weight takes 2 FLOPs forward,
2 for its input's gradient, 2 for its own. Not counted: attention itself, and what is computed a
second time, blocks with --checkpointing, chunks of logits: it is MFU, not HFU.
"""

import resource
from typing import NamedTuple

import torch

from training import distributed

# TFLOP/s of dense bfloat16 products, added up in float32, as the makers say; another card: no MFU.
PEAKS = {
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
    "H100 80GB HBM3": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H200": 989,
    "B200": 2250,
    "L40S": 362,
    "GeForce RTX 4090": 165,
}


class Done(NamedTuple):
    """What this rank has done of a step, in seconds and FLOPs."""

    rollout: float
    update: float
    flops: int


def flops(scorer, nodes: int, scored: int) -> int:
    """Of forward and backward passes of a scorer that encoded so many nodes."""
    blocks = scorer.model.get_decoder().layers.parameters()
    W = sum(weight.numel() for weight in blocks if weight.ndim > 1)
    E = scorer.model.get_output_embeddings().weight.numel()
    own, theirs = 0, 0
    if scorer.adapters is not None:
        own = 6 * sum(weight.numel() for weight in scorer.adapters.parameters())
        theirs = own // 3 if scorer.ref_adapters is not None else 0
    frozen = scorer.adapters is not None
    total = ((4 if frozen else 6) * W + own) * nodes + (4 if frozen else 6) * E * scored
    if scorer.reference is not None:
        total += (2 * W + theirs) * nodes + 2 * E * scored
    return total


def pace(batch, done: Done) -> dict:
    """The step's figures, of all ranks; what can't be known here is missing.

    tokens_per_second_rollout: sampled ones, none where old samples are imitated
    tokens_per_second_update:  of whole conversations, prompts and all
    share_of_time_*:           of the step's seconds, of which verdicts are the rollout's
    memory_*:                  peak so far in MiB, of the rank that needs most
    """
    rollout = batch.rollout
    sampled = int(rollout.action_mask.sum()) if rollout.logprobs.any() else 0
    mine = sampled, int(rollout.lengths.sum()), done.flops, memory_mib(), reserved_mib()
    sampled, tokens, made, memory, reserved = zip(*distributed.exchange(mine), strict=True)
    seconds, peak = done.rollout + done.update, peak_flops()
    row = {"seconds_rollout": done.rollout, "seconds_update": done.update}
    row["share_of_time_rollout"] = done.rollout / seconds
    row["share_of_time_update"] = done.update / seconds
    row |= {"tokens_per_second_rollout": sum(sampled) / done.rollout} if sum(sampled) else {}
    row["tokens_per_second_update"] = sum(tokens) / done.update
    row |= {"mfu": sum(made) / (done.update * peak * len(made))} if peak else {}
    row["memory_mib"] = max(memory)
    return row | ({"memory_reserved_mib": max(reserved)} if max(reserved) else {})


def peak_flops() -> float | None:
    """A second, of this rank's GPU; None: there is none, or its peak is not known."""
    if not torch.cuda.is_available():
        return None
    tera = PEAKS.get(torch.cuda.get_device_name().removeprefix("NVIDIA "))
    return tera and tera * 1e12


def memory_mib() -> float:
    """The peak so far: of the GPU if there is one, else of the process (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def reserved_mib() -> float:
    """The peak so far of what PyTorch has taken of the GPU, in use or not; 0 without one."""
    return torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0


def said(row: dict) -> dict:
    """For the progress line: tokens a second of sampling / updating, and MFU."""
    kinds = [f"tokens_per_second_{kind}" for kind in ("rollout", "update")]
    rates = "/".join(f"{row[kind]:.0f}" if kind in row else "-" for kind in kinds)
    return {"tokens_s": rates} | ({"mfu": row["mfu"]} if "mfu" in row else {})
