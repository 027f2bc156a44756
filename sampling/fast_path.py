"""The one place outside fast/ that looks for it: without that folder sampling is only slower."""

import warnings
from collections.abc import Callable
from functools import cache
from shutil import which

import torch
from torch import Tensor

try:
    from fast import fused
except ModuleNotFoundError as error:
    if error.name not in ("fast", "fast.fused"):  # something else is missing, which is no choice
        raise
    fused = None


def fast_forward(model) -> Callable | None:
    """The fused forward pass with the weights of now; None where there is none for this model."""
    return fused.fuse(model) if fused and fused.why_not(model) is None else None


def is_fast(model, ids: Tensor, logits: Tensor) -> bool:
    """Whether the fast path is there for a model and, fed ids (1, Q), gives its logits (1, V).

    Warns where one would have expected it, on a GPU or a CPU with a compiler, and says why not.
    """
    if fused is None:
        return False
    reason = fused.why_not(model) or fused.why_wrong(model, ids, logits)
    compiles = model.device.type == "cpu" and model.dtype == torch.float32 and which("cc")
    if reason and (compiles or model.device.type != "cpu"):
        _warn(f"sampling from {type(model).__name__} takes the plain path, a slower one: {reason}")
    return reason is None


@cache  # once a reason
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)  # the line that makes the Sampler
