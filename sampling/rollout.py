"""What the sampler makes and the losses read: token sequences of several turns."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from sampling.attention import KVCache


@dataclass
class Rollout:
    """Token sequences of B rows over one or more turns; tensors are trimmed to T, the longest
    row."""

    ids: torch.Tensor  # (B, T) int64, right-padded with the pad id
    action_mask: torch.Tensor  # (B, T) bool, True = sampled, the stop token included
    # (B, T) int64, a turn's prompt and completion share its number; -1 = padding
    turn: torch.Tensor
    # (B, T) float32, of sampled tokens at the temperature used (greedy: 1), else 0
    logprobs: torch.Tensor
    lengths: torch.Tensor  # (B,) int64
    stopped: torch.Tensor  # (B, turns) bool, ended by a stop token rather than by max_new_tokens
    parents: torch.Tensor  # (B,) int64, row of the rollout extended, or index of the prompt
    seeds: torch.Tensor  # (B,) int64
    prompt: torch.Tensor  # (B,) int64, index of the prompt of `generate` that the row began with
    cache: KVCache | None  # set it to None to free the memory; the rollout can't be extended then

    def completion_ids(self, turn):
        """The ids sampled in a turn (0-based), a list for each row, without the stop token."""
        ids, sampled = self.ids.cpu(), (self.action_mask & (self.turn == turn)).cpu()
        rows = [row[mask].tolist() for row, mask in zip(ids, sampled, strict=True)]
        return [r[: len(r) - s] for r, s in zip(rows, self.stopped[:, turn].tolist(), strict=True)]

    def row_ids(self):
        """The ids of each row, without padding."""
        return [
            ids[:length]
            for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        ]

    def last_ids(self):
        """The last id of each row (B,), a stop token unless the row was cut off."""
        return self.ids.gather(1, self.lengths[:, None] - 1)[:, 0].tolist()

    def _take(self, index, width, pad_id, cache=None):
        """Rows `index`, made `width` wide by padding or cutting, with another cache."""
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "cache"}
        for name, fill in (
            ("ids", pad_id),
            ("action_mask", False),
            ("turn", -1),
            ("logprobs", 0.0),
        ):
            tensors[name] = F.pad(tensors[name], (0, width - tensors[name].shape[1]), value=fill)
        return Rollout(**tensors, cache=cache)


def rollout_of(rows: list[list[list[int]]], turns: int, parents, seeds, sampler) -> Rollout:
    """Conversations that were not sampled here: each row's parts, told and spoken in turn, a spoken
    one with its stop token if it has one. Their `logprobs` are 0, and there is no cache to go on
    from."""
    lengths = torch.tensor([sum(map(len, parts)) for parts in rows], dtype=torch.long)
    ids = torch.full((len(rows), max(lengths.tolist(), default=1)), sampler.pad_id)
    kind = torch.full_like(ids, -2)  # of the part that a token is in: even if told, odd if spoken
    for row, parts in enumerate(rows):
        ids[row, : lengths[row]] = torch.tensor([i for part in parts for i in part])
        kind[row, : lengths[row]] = torch.tensor([k for k, part in enumerate(parts) for _ in part])
    ends = torch.tensor(
        [[part[-1] for part in parts[1::2]] for parts in rows], dtype=torch.long
    ).view(-1, turns)
    tensors = (
        ids,
        kind % 2 == 1,
        kind // 2,
        torch.zeros(ids.shape),
        lengths,
        sampler.is_stop.cpu()[ends],
        parents,
    )
    tensors = (*tensors, torch.as_tensor(seeds), parents)
    return Rollout(*(tensor.to(sampler.model.device) for tensor in tensors), cache=None)
