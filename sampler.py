"""Multi-turn sampling from a causal LM with one ragged key-value cache: token ids in, token ids out.

    rollout = sampler.generate(prompt_ids, group_size=8, max_new_tokens=256)
    rollout = sampler.extend(rollout, instruction_ids, max_new_tokens=256)  # the next turn

Slot j of a cache row holds the token at position j: every row starts at position 0 and has its own length, and
nothing is padded on the left. After every call the cache holds all tokens of a row but the last, which is pending:
whatever is fed next starts with it, be it a decoding step or the next turn's instruction. Rows that are done leave
the batch and waiting rows take their place. A row's random numbers depend on its seed and the position alone.

Left out: top-k, top-p and penalties (a policy gradient needs the log-probs of what was sampled from, which is
softmax(logits / temperature) and nothing else), paged memory (rows have a known bound) and CUDA graphs.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

GOLDEN, MIX1, MIX2 = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
CHILD = 0x632BE59BD9B4E019  # sets the stream of child seeds apart from the streams of uniforms


class KVCache:
    """Keys and values of all rows, (rows, capacity, kv_heads, head_dim) a layer; slot == position.

    transformers takes it for its own cache; `aim` says which rows and positions the next forward pass writes.
    """

    def __init__(self, rows, capacity, device):
        self.capacity = -(-capacity // 8) * 8  # widths are multiples of 8, as attention kernels like them
        self.slots = torch.arange(rows, device=device)  # (B,) where each row of the rollout lives
        self.layers = {}

    def aim(self, first, positions, width):
        """Write the next tokens of rows first, first + 1, ... at positions (n, Q); read slots [0, width)."""
        self.rows = slice(first, first + len(positions))
        self.width = min(-(-width // 8) * 8, self.capacity)
        row = torch.arange(first, first + len(positions), device=positions.device)
        self.flat = (row[:, None] * self.capacity + positions).flatten()  # (n * Q,)

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Store key and value (n, kv_heads, Q, head_dim); return their rows as (n, kv_heads, width, head_dim)."""
        if layer_idx not in self.layers:  # zeros, since 0 * NaN would leak through a masked slot
            shape = (len(self.slots), self.capacity, key.shape[1])
            self.layers[layer_idx] = [key.new_zeros(*shape, new.shape[-1]) for new in (key, value)]
        for store, new in zip(self.layers[layer_idx], (key, value), strict=True):
            store.flatten(0, 1).index_copy_(0, self.flat, new.transpose(1, 2).flatten(0, 1))
        return tuple(store[self.rows, : self.width].transpose(1, 2) for store in self.layers[layer_idx])

    def get_seq_length(self, layer_idx=0):
        return 0  # models ask only to make up position ids, and ours are given

    def gather(self, slots, capacity, used):
        """A new cache whose rows are copies of the first `used` positions of `slots` (rows,)."""
        new = KVCache(len(slots), capacity, slots.device)
        for layer, stores in self.layers.items():
            new.layers[layer] = [s.new_zeros(len(slots), new.capacity, *s.shape[2:]) for s in stores]
            for source, target in zip(stores, new.layers[layer], strict=True):
                target[:, :used] = source[slots, :used]
        return new

    def move(self, before, after, used):
        """Reorder rows: slot s held row before[s] and shall hold row after[s] (host lists)."""
        where = {row: slot for slot, row in enumerate(before)}
        moves = [(slot, where[row]) for slot, row in enumerate(after) if before[slot] != row]
        if moves:
            target, source = torch.tensor(moves, device=self.slots.device).T
            for store in (s for stores in self.layers.values() for s in stores):
                store[target, :used] = store[source, :used]


def _mask(positions, width, window, groups, dtype):
    """What each query may see, as an additive mask: slot j iff j <= position and within the window."""
    masks = positions.__dict__.setdefault("masks", {})  # all layers of one forward pass share their masks
    if (width, window) not in masks:
        slot, position = torch.arange(width, device=positions.device), positions[:, :, None]
        visible = slot <= position  # (n, Q, width)
        if window is not None:
            visible &= slot > position - window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        masks[width, window] = mask.masked_fill_(~visible, -torch.inf).repeat(1, groups, 1)[:, None]
    return masks[width, window]  # (n, 1, groups * Q, width)


def _refusal(module, attention_mask, window, kwargs):
    """Why `ragged_attention` can't do what this layer asks for; None if it can. What is unknown is refused."""
    known = ("position_ids", "is_causal", "use_cache", "output_hidden_states", "cache_position")
    unknown = [name for name, value in kwargs.items() if name not in known and value not in (None, False)]
    kinds, layer = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if unknown:
        return f"its attention asks for {', '.join(unknown)}"
    if attention_mask is not None:
        return "it makes its own attention mask"
    if kwargs.get("position_ids") is None:
        return "it hides position_ids from its attention function"
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "its attention is bidirectional"
    if kinds and layer is not None and kinds[layer] == "sliding_attention" and window is None:
        return "it hides its sliding window from its attention function"


def ragged_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention over a KVCache: query (n, heads, Q, D), key and value (n, kv_heads, K, D) -> (n, Q, heads, D)."""
    kwargs.pop("dropout", None)
    if reason := _refusal(module, attention_mask, sliding_window, kwargs):
        raise ValueError(f"{type(module).__name__} can't be sampled from with a ragged cache: {reason}")
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    mask = _mask(kwargs["position_ids"], key.shape[2], sliding_window, groups, query.dtype)
    # Heads that share a KV head become queries of it: no expanded copy, and any kernel will do (at Q = 1 a view).
    query = query.unflatten(1, (-1, groups)).flatten(2, 3)  # (n, kv_heads, groups * Q, D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.unflatten(2, (groups, length)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register("ragged", ragged_attention)


@contextmanager
def _sampling_mode(model):
    """Evaluation mode, no gradients and ragged attention; afterwards everything is as it was."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        for config, _ in before:  # the public setter would also overwrite nested configs
            config._attn_implementation_internal = "ragged"
        with torch.no_grad():  # not inference_mode: its tensors can't enter a loss later
            yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module in training:
            module.training = True


def _mix(x):
    """splitmix64's finaliser on int64; >> is arithmetic there, hence the masks."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(seeds, positions):
    """A float32 in [0, 1) for each seed and position, int64. 23 bits, so that u * total < total in float32."""
    bits = _mix(_mix(seeds + GOLDEN) + positions * GOLDEN) >> 41
    return (bits & (2**23 - 1)).float() * 2.0**-23


def child_seeds(seeds, group_size):
    """Seeds (B,) -> (B * group_size,): each child has its own stream, also apart from its parent's."""
    child = torch.arange(1, group_size + 1, device=seeds.device)
    return _mix(_mix(seeds + CHILD)[:, None] + child * GOLDEN).flatten()


def sample(logits, temperature, u):
    """Draw from softmax(logits / temperature) by inverting its CDF at u (n,); temperature 0 takes the argmax.

    logits (n, V) -> tokens (n,) int64 and their log-probs (n,) float32 (at temperature 1 if greedy).
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (n, V)
    token = best = logprobs.argmax(-1, keepdim=True)
    if temperature > 0:
        cdf = logprobs.exp().cumsum(-1)
        drawn = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
        # A parallel cumsum is monotone only up to rounding: make sure that no impossible token slips through.
        token = torch.where(logprobs.gather(1, drawn) > -100, drawn, best)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


@dataclass
class Rollout:
    """Token sequences of B rows over one or more turns; tensors are trimmed to T, the longest row."""

    ids: torch.Tensor  # (B, T) int64, right-padded with the pad id
    action_mask: torch.Tensor  # (B, T) bool, True = sampled, the stop token included
    turn: torch.Tensor  # (B, T) int64, a turn's prompt and completion share its number; -1 = padding
    logprobs: torch.Tensor  # (B, T) float32, of sampled tokens at the temperature used (greedy: 1), else 0
    lengths: torch.Tensor  # (B,) int64
    stopped: torch.Tensor  # (B, turns) bool, ended by a stop token rather than by max_new_tokens
    parents: torch.Tensor  # (B,) int64, row of the rollout extended, or index of the prompt
    seeds: torch.Tensor  # (B,) int64
    cache: KVCache | None  # set it to None to free the memory; the rollout can't be extended then

    def completion_ids(self, turn):
        """The ids sampled in a turn (0-based), a list for each row, without the stop token."""
        ids, sampled = self.ids.cpu(), (self.action_mask & (self.turn == turn)).cpu()
        rows = [row[mask].tolist() for row, mask in zip(ids, sampled, strict=True)]
        return [row[: len(row) - stop] for row, stop in zip(rows, self.stopped[:, turn].tolist(), strict=True)]

    def _take(self, index, width, pad_id):
        """Rows `index`, made `width` wide by padding or cutting, without a cache."""
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "cache"}
        for name, fill in (("ids", pad_id), ("action_mask", False), ("turn", -1), ("logprobs", 0.0)):
            tensors[name] = F.pad(tensors[name], (0, width - tensors[name].shape[1]), value=fill)
        return Rollout(**tensors, cache=None)


class Sampler:
    """Samples from a transformers causal LM with standard attention; ValueError for any other model.

    max_batch: rows decoded together; block: steps between two looks at which rows are done (a host sync each);
    prefill_tokens: tokens of prompts fed in one forward pass. Stop tokens are the tokenizer's eos and those of
    model.generation_config, of which nothing else is used. The constructor runs the model on two tokens.
    """

    def __init__(self, model, tokenizer, max_batch=256, block=16, prefill_tokens=8192):
        self.model, self.max_batch, self.block = model, max_batch, block
        self.prefill_tokens = prefill_tokens
        config = model.config.get_text_config()
        self.vocab_size, self.limit = config.vocab_size, config.max_position_embeddings
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond, one long row would change the others' rope
            self.limit = min(self.limit, rope["original_max_position_embeddings"])
        eos = model.generation_config.eos_token_id
        stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self.is_stop = torch.zeros(self.vocab_size, dtype=torch.bool, device=model.device)  # (V,)
        self.is_stop[sorted(stops)] = True
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
        self._probe()

    def _probe(self):
        """Refuse a model for which the cache can't be right, by what it says of itself and a short run."""
        config, cache = self.model.config.get_text_config(), KVCache(1, 2, self.model.device)
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        ids = torch.arange(2, device=self.model.device)[None]
        try:
            if self.model.config.is_encoder_decoder:
                raise TypeError("it is an encoder-decoder")
            if kinds or getattr(self.model, "_is_stateful", False):
                raise TypeError(f"it has layers other than full or sliding-window attention {sorted(kinds)}")
            if not getattr(self.model, "_supports_attention_backend", False):
                raise TypeError("it has no exchangeable attention function (_supports_attention_backend)")
            with _sampling_mode(self.model):
                self._forward(cache, 0, ids, ids.clone(), 2)
            if len(cache.layers) != config.num_hidden_layers:
                raise TypeError("not every layer keeps keys and values of its own in the cache")
        except (AttributeError, TypeError, NotImplementedError) as error:
            name = type(self.model).__name__
            raise ValueError(f"{name} can't be sampled from with a ragged cache: {error}") from error

    def generate(self, prompt_ids, group_size=1, *, max_new_tokens, temperature=1.0, seeds=None):
        """Sample group_size completions of each prompt; row i belongs to prompt i // group_size.

        prompt_ids: a list of lists of token ids; temperature 0 is greedy; seeds: (B,) ints, by default 0..B-1, so
        that the same call gives the same samples. Returns a Rollout. Before any work, ValueError if a prompt is
        empty, holds an unknown id or leaves no room for max_new_tokens, or if a number makes no sense.
        """
        count, device = len(prompt_ids), self.model.device
        self._check(prompt_ids, [0] * count, group_size, max_new_tokens, temperature)
        rows = torch.arange(count, device=device)
        seeds = torch.as_tensor(range(count * group_size) if seeds is None else seeds, device=device)
        if seeds.shape != (count * group_size,) or seeds.is_floating_point():
            raise ValueError(f"seeds must be {count * group_size} integers, got {tuple(seeds.shape)} {seeds.dtype}")
        empty, cache = rows.new_zeros(count, 0), KVCache(count, 0, device)
        start = Rollout(empty, empty.bool(), empty, empty.float(), rows * 0, empty.bool(), rows, rows, cache)
        return self._turn(start, rows, prompt_ids, group_size, max_new_tokens, temperature, seeds.long())

    def extend(self, rollout, more_prompt_ids, group_size=1, *, max_new_tokens, temperature=1.0, rows=None):
        """Append more_prompt_ids[i] to row rows[i] (default: all rows) and sample group_size completions of each.

        Only the new tokens are fed. Returns a new Rollout of len(rows) * group_size rows with a turn more, whose
        seeds derive from their parents'; the old one stays as it is. ValueError as for `generate`, and if the
        cache was freed.
        """
        total = len(rollout.lengths)
        rows = list(range(total)) if rows is None else [int(r) for r in rows]
        if rollout.cache is None:
            raise ValueError("this rollout's cache was freed: keep it until the last turn is sampled")
        if len(more_prompt_ids) != len(rows):
            raise ValueError(f"more_prompt_ids has {len(more_prompt_ids)} lists, but there are {len(rows)} rows")
        if rows and not 0 <= min(rows) <= max(rows) < total:
            raise ValueError(f"rows has {min(rows)}..{max(rows)}, but the rollout has rows 0..{total - 1}")
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        self._check(more_prompt_ids, rollout.lengths[index].tolist(), group_size, max_new_tokens, temperature)
        seeds = child_seeds(rollout.seeds[index], group_size)
        return self._turn(rollout, index, more_prompt_ids, group_size, max_new_tokens, temperature, seeds)

    def _check(self, prompts, lengths, group_size, max_new_tokens, temperature):
        if max_new_tokens < 1 or group_size < 1 or not prompts:
            raise ValueError(f"{len(prompts)} prompts, {group_size=}, {max_new_tokens=}: none may be below 1")
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}: it must be positive, or 0 for greedy")
        for i, (prompt, old) in enumerate(zip(prompts, lengths, strict=True)):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: give it at least one token (a BOS, say)")
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise ValueError(f"prompt {i} has an id outside the vocabulary of {self.vocab_size}")
            if old + len(prompt) + max_new_tokens > self.limit:
                sizes = f"{old} old tokens + {len(prompt)} of the prompt + {max_new_tokens} new ones"
                raise ValueError(f"prompt {i}: {sizes} exceed {self.limit} positions: lower max_new_tokens")

    def _turn(self, base, index, prompts, group_size, max_new_tokens, temperature, seeds):
        """Rows `index` (R,) of base plus a prompt each -> prefilled, branched, decoded, as a new Rollout."""
        device, turn = index.device, base.stopped.shape[1]
        old = base.lengths[index].tolist()
        total = [o + len(p) for o, p in zip(old, prompts, strict=True)]
        capacity = max(total) + max_new_tokens
        rollout = base._take(index, capacity, self.pad_id)
        rollout.lengths = torch.tensor(total, device=device)
        column, end = torch.arange(capacity, device=device), rollout.lengths[:, None]
        fresh = (column >= base.lengths[index, None]) & (column < end)  # (R, capacity)
        rollout.ids.masked_scatter_(fresh, torch.tensor(list(chain(*prompts)), device=device))
        rollout.turn.masked_fill_(fresh, turn)
        with _sampling_mode(self.model):
            order = self._prefill(rollout, base.cache, base.cache.slots[index], old, total)
            if group_size > 1:
                child = torch.arange(len(seeds), device=device) // group_size
                cache = rollout.cache.gather(rollout.cache.slots[child], capacity, max(total))
                rollout, order = rollout._take(child, capacity, self.pad_id), list(range(len(seeds)))
                rollout.cache, index = cache, index[child]
            rollout.seeds, rollout.parents = seeds, index
            self._decode(rollout, order, turn, max_new_tokens, temperature)
        last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)  # (B, 1)
        rollout.stopped = torch.cat([rollout.stopped, self.is_stop[last]], 1)
        width = int(rollout.lengths.max())
        for name in ("ids", "action_mask", "turn", "logprobs"):
            setattr(rollout, name, getattr(rollout, name)[:, :width].contiguous())
        return rollout

    def _prefill(self, rollout, cache, slots, old, total):
        """Copy the cached rows at `slots` (R,) and feed what they lack of their first total - 1 tokens.

        Sets rollout.cache. Returns the order of its rows, longest feed first, so that a chunk is a range of them.
        """
        cached = [max(o - 1, 0) for o in old]
        order = sorted(range(len(old)), key=lambda i: cached[i] - total[i])
        rows = torch.tensor(order, device=slots.device)
        rollout.cache = cache.gather(slots[rows], rollout.ids.shape[1], max(cached))
        rollout.cache.slots = rows.argsort()
        start = torch.tensor(cached, device=rows.device)[rows, None]
        first = 0
        while first < len(order) and (feed := total[order[first]] - 1 - cached[order[first]]) > 0:
            chunk = slice(first, first + max(1, self.prefill_tokens // feed))
            last = rollout.lengths[rows[chunk], None] - 1  # (n, 1)
            width = max(total[i] for i in order[chunk])
            for begin in range(0, feed, self.prefill_tokens):  # one row may exceed the budget alone
                step = torch.arange(begin, min(begin + self.prefill_tokens, feed), device=rows.device)
                # Shorter rows end in copies of their pending token at its own position: no padding at all.
                positions = torch.minimum(start[chunk] + step, last)  # (n, Q)
                ids = rollout.ids[rows[chunk], None].gather(2, positions[:, None])[:, 0]
                self._forward(rollout.cache, first, ids, positions, width)
            first += len(last)
        return order

    def _decode(self, rollout, order, turn, max_new_tokens, temperature):
        """Sample until all rows are done; slot s holds row order[s], and slots are [active | waiting | done]."""
        lengths = rollout.lengths.tolist()
        ends, end = [n + max_new_tokens for n in lengths], rollout.lengths + max_new_tokens
        unfinished = len(order)
        while unfinished:
            active = order[: min(self.max_batch, unfinished)]
            longest = max(lengths[r] for r in active)
            steps = min(self.block, max(ends[r] - lengths[r] for r in active))
            rows = torch.tensor(active, device=end.device)
            state = self._decode_block(rollout, rows, end[rows], longest, steps, turn, temperature)
            state, before = state.tolist(), list(order)  # the one host sync of the block
            for slot in reversed(range(len(active))):
                lengths[order[slot]], done = state[slot]
                if done:
                    unfinished -= 1
                    order[slot], order[unfinished] = order[unfinished], order[slot]
            rollout.cache.move(before, order, max(lengths))
        rollout.cache.slots = torch.tensor(order, device=end.device).argsort()

    def _decode_block(self, rollout, rows, end, longest, steps, turn, temperature):
        """Up to `steps` tokens for cache rows [0, n), which hold rows (n,). Returns (n, 2): length, done."""
        start = rollout.lengths[rows]  # (n,)
        position, done = start - 1, torch.zeros_like(rows, dtype=torch.bool)
        token, logprob = rollout.ids[rows, position], torch.zeros(len(rows), device=rows.device)
        fresh = start[:, None] + torch.arange(steps, device=rows.device)  # (n, steps) positions to fill
        u, history = uniform(rollout.seeds[rows, None], fresh), []
        for step in range(steps):
            logits = self._forward(rollout.cache, 0, token[:, None], position[:, None], longest + step)
            new_token, new_logprob = sample(logits, temperature, u[:, step])
            # A row that is done feeds its last token at its own place again, which changes nothing.
            token, logprob = torch.where(done, token, new_token), torch.where(done, logprob, new_logprob)
            position = position + ~done
            done = self.is_stop[token] | (position + 1 == end)
            history.append((token, logprob))
        fresh = torch.minimum(fresh, position[:, None])
        for name, values in zip(("ids", "logprobs"), zip(*history, strict=True), strict=True):
            getattr(rollout, name)[rows[:, None], fresh] = torch.stack(values, 1)
        rollout.action_mask[rows[:, None], fresh], rollout.turn[rows[:, None], fresh] = True, turn
        rollout.lengths[rows] = position + 1
        return torch.stack([position + 1, done], 1)

    def _forward(self, cache, first, ids, positions, width):
        """Feed ids (n, Q) at positions (n, Q) to cache rows first, ...; logits (n, V) of the last column."""
        cache.aim(first, positions, width)
        positions.masks = {}
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]
