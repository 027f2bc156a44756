"""LoRA (arXiv 2106.09685): low-rank adapters beside the linear layers of a model's blocks.

A layer's weights W (out, in) become W + ALPHA / r * B A, with A (r, in) and B (out, r), of which A
and B alone are trained. Adapters are a module of their own, no part of the model: within
`adapted(model, adapters)` each layer adds its own, outside of it the model is what it was. So one
copy of the weights is policy and reference, and while B is zero, as at the start, both are the same
bit for bit.
"""

from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ALPHA = 32  # as in most LoRA runs; over r, so that one learning rate does for all ranks


class Adapter(nn.Module):
    """x (..., in) -> what is added to the layer's output (..., out), computed in x's dtype."""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)  # (r, in), (out, r)

    def forward(self, x: Tensor) -> Tensor:
        A, B = (weight.to(x.dtype) for weight in (self.A, self.B))
        return F.linear(F.linear(x, A) * (ALPHA / len(A)), B)


class Adapters(nn.ModuleDict):
    """{layer: Adapter}; a module's key has no dots, so there are slashes in the layers' names."""

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Adapters":
        """From {"layer.A": (r, in), "layer.B": (out, r)}, the names of its parameters."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return Adapters({n: Adapter(tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names})

    def by_layer(self, model) -> dict[nn.Module, Adapter]:
        return {model.get_submodule(name.replace("/", ".")): a for name, a in self.items()}


@contextmanager
def adapted(model, adapters: Adapters | None):
    """Within it each linear layer of `model` adds its adapter; None: the model as it is."""
    handles = []
    try:
        for layer, adapter in (adapters.by_layer(model) if adapters is not None else {}).items():
            handles.append(layer.register_forward_hook(partial(_add, adapter)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(adapter: Adapter, layer, inputs, output: Tensor) -> Tensor:
    return output + adapter(inputs[0])
