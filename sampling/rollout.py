"""What the sampler makes and the losses read: token sequences of several turns."""

from dataclasses import dataclass, fields
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.attention import KVCache


@dataclass
class Rollout:
    """Token sequences of B rows over one or more turns, trimmed to T, the longest row's length."""

    ids: Tensor  # (B, T) int64, right-padded with the pad id
    action_mask: Tensor  # (B, T) bool, True = sampled, the stop token included
    turn: Tensor  # (B, T) int64, a turn's prompt and completion share its number; -1 = padding
    logprobs: Tensor  # (B, T) float32, of sampled tokens at their temperature (greedy: 1), else 0
    lengths: Tensor  # (B,) int64
    stopped: Tensor  # (B, turns) bool, ended by a stop token rather than by max_new_tokens
    parents: Tensor  # (B,) int64, row of the rollout extended, or index of the prompt
    seeds: Tensor  # (B,) int64
    prompt_index: Tensor  # (B,) int64, which prompt of `generate` the row began with
    # By far the largest of it all. None frees the memory, before an update, say; `extend` then has
    # to encode every row anew.
    cache: KVCache | None

    def completion_ids(self, turn: int) -> list[list[int]]:
        """The ids sampled in a turn (0-based), a list for each row, without the stop token."""
        ids, sampled = self.ids.cpu(), (self.action_mask & (self.turn == turn)).cpu()
        rows = [row[mask].tolist() for row, mask in zip(ids, sampled, strict=True)]
        return [r[: len(r) - s] for r, s in zip(rows, self.stopped[:, turn].tolist(), strict=True)]

    def row_ids(self) -> list[list[int]]:
        """The ids of each row, without padding."""
        rows = zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def ids_between(self, rows: list[int], starts: list[int], ends: list[int]) -> list[list[int]]:
        """The ids of some rows, of each from its start to before its end; one host sync for all."""
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        first = torch.tensor(starts, device=self.ids.device)[:, None]
        places = first + torch.arange(max(lengths, default=0), device=first.device)
        ids = self.ids[rows].gather(1, places.clamp_max(self.ids.shape[1] - 1)).tolist()
        return [got[:length] for got, length in zip(ids, lengths, strict=True)]

    def last_ids(self) -> list[int]:
        """The last id of each row, a stop token unless the row was cut off."""
        return self.ids.gather(1, self.lengths[:, None] - 1)[:, 0].tolist()

    def take(self, index, width: int, pad_id: int, cache: KVCache | None = None) -> "Rollout":
        """Rows `index`, made `width` wide by padding or cutting, with another cache."""
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "cache"}
        fills = {"ids": pad_id, "action_mask": False, "turn": -1, "logprobs": 0.0}
        for name, fill in fills.items():
            tensors[name] = F.pad(tensors[name], (0, width - tensors[name].shape[1]), value=fill)
        return Rollout(**tensors, cache=cache)

    def append(self, index, more: list[list[int]], width: int, pad_id: int) -> "Rollout":
        """Rows `index` (R,), `width` wide and without a cache, with ids `more[i]` behind row i."""
        longer = self.take(index, width, pad_id)
        begin = longer.lengths[:, None]
        longer.lengths = longer.lengths + torch.tensor([len(ids) for ids in more]).to(begin)
        column = torch.arange(width, device=begin.device)
        new = (column >= begin) & (column < longer.lengths[:, None])  # (R, width)
        longer.ids.masked_scatter_(new, torch.tensor([i for ids in more for i in ids]).to(begin))
        return longer


def rollout_of(rows: list[list[list[int]]], turns: int, sampler, index=None, seeds=None) -> Rollout:
    """Conversations that were not sampled here; there is no cache to go on from.

    rows: each row's parts, told and spoken in turn, a spoken one with its stop token if it has one.
    index, seeds: (B,) int64, the index of each row's prompt, and its seed; by default 0, 1, ...
    `logprobs` are 0. Of the sampler only its device, pad id and stop tokens are used.
    """
    lengths = torch.tensor([sum(map(len, parts)) for parts in rows], dtype=torch.long)
    ids = torch.full((len(rows), max(lengths.tolist(), default=1)), sampler.pad_id)
    kind = torch.full_like(ids, -2)  # of the part that a token is in: even if told, odd if spoken
    for row, parts in enumerate(rows):
        ids[row, : lengths[row]] = torch.tensor([i for part in parts for i in part]).long()
        numbers = [k for k, part in enumerate(parts) for _ in part]
        kind[row, : lengths[row]] = torch.tensor(numbers).long()
    ends = [[part[-1] for part in parts[1::2]] for parts in rows]
    stopped = sampler.is_stop.cpu()[torch.tensor(ends, dtype=torch.long).view(len(rows), turns)]
    tensors = (ids, kind % 2 == 1, kind // 2, torch.zeros(ids.shape), lengths, stopped)
    index = torch.arange(len(rows)) if index is None else index
    seeds = index if seeds is None else torch.as_tensor(seeds)
    tensors = (*tensors, index, seeds, index)
    return Rollout(*(tensor.to(sampler.model.device) for tensor in tensors), cache=None)


def join_rollouts(parts: list[Rollout], prompts: list[int], pad_id: int) -> Rollout:
    """Rollouts of `prompts` prompts each as one, without a cache.

    `parents` count on as if every row of the rollouts extended had gone on.
    """
    width = max(rollout.ids.shape[1] for rollout in parts)
    wide = [rollout.take(slice(None), width, pad_id) for rollout in parts]
    rows = [int(rollout.parents.max()) + 1 if len(rollout.parents) else 0 for rollout in parts]
    befores = zip(accumulate(prompts, initial=0), accumulate(rows, initial=0))
    for rollout, (prompt, row) in zip(wide, befores):
        rollout.prompt_index, rollout.parents = rollout.prompt_index + prompt, rollout.parents + row
    names = [f.name for f in fields(Rollout) if f.name != "cache"]
    joined = {name: torch.cat([getattr(rollout, name) for rollout in wide]) for name in names}
    return Rollout(**joined, cache=None)
