"""Which fast paths a model can take on this machine: all that others ask of this folder."""

import warnings
from collections.abc import Callable
from functools import cache
from shutil import which

import torch
from torch import Tensor

from fast import fused


def tried(model, ids: Tensor, logits: Tensor) -> tuple[bool, bool]:
    """Whether the fused forward pass, and whether the kernels for CUDA are right for a model.

    They are where, fed ids (1, Q), they give its logits (1, V). Warns where one would have expected
    them, on a GPU or a CPU with a compiler, and says why not.
    """
    cuda, name = model.device.type == "cuda", type(model).__name__
    reason = fused.why_not(model) or fused.why_wrong(model, ids, logits)
    compiles = model.device.type == "cpu" and model.dtype == torch.float32 and which("cc")
    if reason and (compiles or model.device.type != "cpu"):
        _warn(f"sampling from {name} takes the plain path, a slower one: {reason}")
    if reason or not cuda:
        return reason is None, False
    reason = why_no_kernels(model, ids, logits)
    if reason:
        _warn(f"decoding with {name} is slower, without kernels and CUDA graphs: {reason}")
    return True, reason is None


def why_no_kernels(model, ids: Tensor, logits: Tensor) -> str | None:
    """What stands against decoding with the kernels of cuda_kernels.py, if anything does."""
    try:
        from fast.cuda_step import why_wrong
    except ImportError as error:
        return f"Triton, which comes with torch for CUDA, can't be imported: {error}"
    return why_wrong(model, ids, logits)


def forward_of(model, adapters) -> Callable | None:
    """The fused forward pass with the weights of now; None where there is none for this model."""
    return fused.fuse(model, adapters) if fused.why_not(model) is None else None


def step_of(model, adapters, kept: dict):
    """A decoding step (cuda_step.py) with the weights of now. kept: the sampler's dict for it."""
    from fast.cuda_step import step_of  # only here, since it needs Triton

    return step_of(model, adapters, kept)


@cache
def score_of(device: torch.device) -> Callable | None:
    """What may score tokens on this device in place of `loss._score`, if anything may."""
    if device.type != "cuda":
        return None
    try:
        from fast import cuda_loss, cuda_update
    except ImportError as error:
        reason = f"Triton, which comes with torch for CUDA, can't be imported: {error}"
    else:
        reason = cuda_update.why_no_score(device)
    if reason:
        _warn(f"updates are slower, without kernels for the loss: {reason}", 2)
    return None if reason else cuda_loss.score


def blocks_fused(model):
    """A context in which norms and gates are one kernel each, where `score_of` is not None."""
    from fast.cuda_update import blocks_fused  # only here, since it needs Triton

    return blocks_fused(model)


@cache  # once a reason
def _warn(message: str, level: int = 5) -> None:
    warnings.warn(message, stacklevel=level)  # 5: the line that makes the Sampler
