"""Token log-probabilities of whole rollouts, with gradients: each distinct prefix is encoded once.

Rows of a group share their prompt, second attempts their first, and a policy that has learnt
something says many things twice. `Scorer.forward` does all the work on the weights that a training
step needs, so that sharding has one module to wrap.
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss import Scores, compiled, compiling, scoring, token_scores
from sampler import fast
from sampling.adapters import adapted
from sampling.attention import OURS, attention_is, check_layer

STEM = 64  # tokens that all rows begin with (few-shot examples, say), to attend to each other once

# What a pair of tokens costs attention with a mask, which the rest of the rows needs beside a stem,
# over what it costs causal attention, which leaves out half of all pairs. On a CPU 0.5 to 0.8,
# measured (forward and backward, 8 heads of 64, 4 and 16 rows of 114 to 900 tokens). On CUDA not
# measured: a mask means another kernel there, and copies of shared key-value heads.
MASKED = {"cpu": 2 / 3, "cuda": 2.0}


class PrefixTree(NamedTuple):
    """The distinct prefixes of B rows, each a node that is encoded once; R distinct rows, N nodes.

    Fed as whole rows a batch would be B * T tokens; here it is N, a row of them.
    """

    ids: Tensor  # (1, N) int64, what to feed
    positions: Tensor  # (1, N) int64
    parent: Tensor  # (N,) int64, the prefix without its last token; at position 0 the node itself
    node: Tensor  # (R, T) int64, the node at each place of a distinct row; 0 in the padding
    row: Tensor  # (B,) int64, which distinct row a row is
    stem: int  # how many tokens all rows begin with, nodes 0, 1, ...; 0 if that spares too little
    place: Tensor  # (N - stem,) int64, where in `node[:, stem:]`, flattened, a further node stands


def prefix_tree(ids: Tensor, real: Tensor) -> PrefixTree:
    """The tree of rows ids (B, T), right-padded where `real` (B, T) is False.

    Exact: tokens are compared, not hashed. Each row is compared with the one above it alone, since
    rows are sorted: a prefix that any row above has, the next one above has too.
    """
    rows, row = torch.unique(ids.masked_fill(~real, -1), dim=0, return_inverse=True)  # (R, T), (B,)
    above = (rows[1:] == rows[:-1]).long().cumprod(1)
    shared = F.pad(above, (0, 0, 1, 0)).bool()  # (R, T), as in the row above up to here
    new = (rows >= 0) & ~shared  # (R, T)
    number = (new.flatten().cumsum(0) - 1).view_as(rows)
    first = torch.arange(len(rows), device=ids.device)[:, None] * new
    node = number.gather(0, first.cummax(0).values).masked_fill(rows < 0, 0)  # (R, T)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(rows)[new]
    parent = node.flatten()[new.flatten().nonzero()[:, 0] - (positions > 0).long()]
    stem = int(shared[1:].sum(1).min()) if len(rows) > 1 else 0
    stem = stem if spares(stem, ids.shape[1], ids.device) else 0
    place = new[:, stem:].flatten().nonzero()[:, 0]
    return PrefixTree(rows[new][None], positions[None], parent, node, row, stem, place)


def spares(stem: int, T: int, device: torch.device) -> bool:
    """Whether attention costs less if the first `stem` of a row's T tokens attend once for all.

    Of each row (T - stem) * T pairs are left, with a mask, in place of T * T / 2.
    """
    return stem >= STEM and MASKED[device.type] * (T - stem) * T <= T * T / 2


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    """Of query (1, heads, N, D), key and value (1, kv_heads, N, D) of a tree: (1, N, heads, D).

    Only here are rows whole again: every node beyond the stem is copied to where it stands. All
    else in a layer is done once a node.
    """
    check_layer(module, attention_mask, sliding_window, kwargs)
    tree, stem = kwargs["position_ids"].tree, kwargs["position_ids"].tree.stem

    def spread_out(x: Tensor, node: Tensor) -> Tensor:
        """(1, heads, N, D) -> (R, heads, columns of node, D)"""
        flat = x[0].transpose(0, 1).flatten(1).index_select(0, node.flatten())
        return flat.view(*node.shape, *x.shape[1::2]).transpose(1, 2)

    attend = partial(_causal, scale=scaling, window=sliding_window)
    queries = spread_out(query, tree.node[:, stem:])
    rows = attend(queries, spread_out(key, tree.node), spread_out(value, tree.node))
    out = rows.flatten(0, 1).index_select(0, tree.place)[None]  # (1, N - stem, heads, D)
    if stem:
        out = torch.cat([attend(*(x[:, :, :stem] for x in (query, key, value))), out], 1)
    return out, None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """query (n, heads, Q, D), key and value (n, kv_heads, T, D) -> (n, Q, heads, D).

    The queries are those of the last Q of T positions. Padding on the right is out of sight of all
    that counts by itself.
    """
    Q, T = query.shape[2], key.shape[2]
    mask = None
    if Q < T or window is not None:
        t = torch.arange(T, device=query.device)
        mask = t <= t[T - Q :, None]  # (Q, T)
        if window is not None:
            mask &= t > t[T - Q :, None] - window
    grouped = query.device.type == "cpu" or (mask is None and query.dtype.itemsize == 2)
    if not grouped:  # where torch would take its slow kernel for shared key-value heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    options = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


OURS["prefix_tree"] = tree_attention


@contextmanager
def _reading_trees(model, adapters, fused: bool):
    """The model attends as a tree wants it, with its adapters on, or (None) off.

    fused: and by fast/'s kernels between its products.
    """
    kernels = fast.blocks_fused(model) if fused else nullcontext()
    with attention_is(model, "prefix_tree"), adapted(model, adapters), kernels:
        yield


@contextmanager
def _blocks_run(model, *ways):
    """The blocks run in these ways, the first one innermost: each wraps a block's `forward`."""
    blocks = model.get_decoder().layers
    try:
        for block in blocks:
            for way in ways:
                block.forward = way(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _checkpointed(*how):
    """A way of blocks to run: they keep what they are given, and run again for the backward."""

    def contexts():  # when run again, it is long after `_hidden`, but all is to be as it was
        return nullcontext(), _reading_trees(*how)

    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    return lambda forward: partial(again, forward)


def _compiled(forward):
    """A way of blocks to run: what is compiled of one serves all of its kind, and both models."""
    function, block = compiled(forward.__func__), forward.__self__

    def run(hidden, *rest, **more):
        if torch.is_grad_enabled() and not hidden.requires_grad:  # of adapters' first block
            hidden = hidden.detach().requires_grad_()
        return function(block, hidden, *rest, **more)

    return run


def _forgetful(forward):
    """A way of the reference's blocks to run: as if for gradients, of which nothing is kept.

    So it is the very code that the policy runs, and both are the same bit for bit while their
    weights are. Compiled without gradients it would be another, which may round differently.
    """

    def run(hidden, *rest, **more):
        with torch.enable_grad():
            return forward(hidden, *rest, **more).detach()

    return run


class Scorer(nn.Module):
    """Token log-probabilities, entropy and the KL to a reference, of whole rollouts.

    forward(ids (B, T), action_mask (B, T), temperature) -> Scores of (B, T) float32 tensors, 0
    where not sampled. Rows start at position 0. A prefix that several rows begin with, and a token
    sampled there by several of them, is computed once: its scores, and with them the gradients, are
    those of every row that has it. `checkpointing` spares the memory of all activations inside the
    model's blocks, for about a third more time. `compiled`: blocks by torch.compile, and the head
    where it has no kernels.

    With `adapters` (LoRA) they are what is trained, and the weights of `model` are frozen. Then the
    reference is the very same model, with its adapters off, or with `ref_adapters` on.
    """

    def __init__(
        self,
        model,
        reference=None,
        adapters=None,
        ref_adapters=None,
        chunk=None,
        checkpointing=False,
        compiled=False,
    ):
        super().__init__()
        self.model, self.reference = model, reference
        self.adapters, self.ref_adapters = adapters, ref_adapters
        self.chunk, self.checkpointing, self.compiled = chunk, checkpointing, compiled
        self.nodes = self.scored = 0  # that it has encoded so far, and those of them it scored
        for frozen in (reference, ref_adapters, model if adapters is not None else None):
            if frozen is not None:  # what `_forgetful` runs as if for gradients seems to have some
                frozen.requires_grad_(compiled and frozen is self.frozen)

    @property
    def trained(self) -> nn.Module:
        """What has gradients, and the optimiser's moments."""
        return self.model if self.adapters is None else self.adapters

    @property
    def frozen(self) -> nn.Module | None:
        """What the reference has of its own."""
        return self.reference if self.adapters is None else self.ref_adapters

    def hold(self) -> None:
        """The policy of now becomes the reference."""
        self.frozen.load_state_dict(self.trained.state_dict())

    def forward(self, ids: Tensor, action_mask: Tensor, temperature: float = 1.0) -> Scores:
        needed = action_mask.flip(1).cummax(1).values.flip(1)  # up to a row's last sampled token
        tree = prefix_tree(ids, needed)
        sampled = tree.node[tree.row][action_mask]  # (M,) the nodes of sampled tokens
        chosen, back = torch.unique(sampled, return_inverse=True)
        self.nodes, self.scored = self.nodes + tree.ids.shape[1], self.scored + len(chosen)
        score = fast.score_of(ids.device) if fast else None  # not None on a GPU, where it is right
        how = temperature, self.chunk, score or scoring(self.compiled)
        here = nullcontext() if ids.device.type == "cpu" else torch.cuda.device(ids.device)
        ways, fused = [_compiled] if self.compiled else [], bool(score) and not self.compiled
        policy, ref_hidden, ref_head = (self.model, self.adapters, fused), None, None
        # kernels start on the current GPU
        with here, compiling() if self.compiled else nullcontext():
            if self.reference is not None:  # first, while no graph of the policy takes memory
                reference = self.reference, self.ref_adapters, fused
                forgetful = [*ways, _forgetful] if ways else []
                with torch.no_grad():
                    ref_hidden, ref_head = self._hidden(*reference, forgetful, tree, chosen)
            ways += [_checkpointed(*policy)] if self.checkpointing else []
            hidden, head = self._hidden(*policy, ways, tree, chosen)
            tokens = tree.ids[0, chosen]
            scores = token_scores(hidden, head, tokens, ref_hidden, ref_head, *how)
        placed = (x.new_zeros(ids.shape).masked_scatter(action_mask, x[back]) for x in scores)
        return Scores(*placed)

    @staticmethod
    def _hidden(model, adapters, fused, ways, tree, chosen) -> tuple[Tensor, Tensor]:
        """What the chosen nodes (M,) are predicted from, (M, H), and the output weights (V, H)."""
        positions = tree.positions.clone()
        positions.tree = tree  # the layers hand it on to their attention
        inputs = {"input_ids": tree.ids, "position_ids": positions, "use_cache": False}
        with _reading_trees(model, adapters, fused), _blocks_run(model, *ways):
            hidden = model.get_decoder()(**inputs).last_hidden_state  # (1, N, H)
        return hidden[0, tree.parent[chosen]], model.get_output_embeddings().weight
