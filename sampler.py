"""Multi-turn sampling from a causal LM with one ragged key-value cache: token ids in, token ids
out.

Slot j of a cache row holds the token at position j: rows start at position 0 and have their own
lengths, with no padding on the left. Between calls the cache holds all tokens of a row but the
last, the pending one, so whatever is fed next starts with it: a decoding step or the next turn's
instruction. Left out: top-k, top-p and penalties (a policy gradient needs the log-probs of what was
sampled from), paged memory, and reading a group's prompt once for all its rows (it is *computed*
once; bench/README.md has what reading it once would gain).

Speed beyond that is in fused.py, a forward pass without modules for Llama-like models, and in
`_capture`: on CUDA its decoding steps are replayed as graphs.
"""

import os
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fast.fused import fusable, fuse
from sampling.attention import KVCache, attention_is, require
from sampling.draws import child_seeds, sample, uniform
from sampling.rollout import Rollout

ENCODE_ANEW = "give `seeds`, one for each new row, to have the conversation encoded anew"
SHARED = 64  # tokens that all prompts begin with, from which on they are fed once


@contextmanager
def _sampling_mode(model):
    """Evaluation mode, no gradients and ragged attention; afterwards everything is as it was."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        # inference_mode's tensors can't enter a loss later
        with attention_is(model, "ragged"), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class State(NamedTuple):
    """Rows that are decoded together, each tensor (n,)."""

    rows: torch.Tensor  # of the rollout
    end: torch.Tensor  # the length at which a row is cut off
    seeds: torch.Tensor
    position: torch.Tensor  # of the last token, which is fed next
    token: torch.Tensor
    logprob: torch.Tensor
    done: torch.Tensor


def _widths(lengths):
    """How far to read the cache: as far as the longest row, or in runs of 16 rows if that spares a
    fifth of it."""
    count = -(-len(lengths) // 16)
    run = -(-len(lengths) // count)
    widths = [max(lengths[i * run : (i + 1) * run]) for i in range(count)]
    return widths if 5 * sum(widths) < 4 * max(widths) * count else [max(widths)]


def _bucket(active):
    """How many rows to decode together with graphs, each for one number of rows: some idle ones
    come along."""
    power = 1 << (active - 1).bit_length()
    return next(n for n in (power * 3 // 4, power) if n >= active)


class Sampler:
    """Samples from a transformers causal LM with standard attention; ValueError for any other
    model.

    max_batch: rows decoded together; block: steps between two looks at which are done (a host sync
        each; by default
    4 on CPU, where it costs nothing, else 16); prefill_tokens: prompt tokens fed at once. It stops
    at the tokenizer's eos and at those of the model's generation_config, of which nothing else is
    used. The constructor runs the model on two tokens, on both paths. `fused` says whether decoding
    takes the fast path of fused.py, `graphs` whether steps are captured; both may be set to False.
    """

    def __init__(self, model, tokenizer, max_batch=256, block=None, prefill_tokens=8192):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.block = block or (4 if model.device.type == "cpu" else 16)
        self.fused, self._fused = False, None
        self._probe()
        self.graphs = self.fused and model.device.type == "cuda"
        config, eos = model.config.get_text_config(), model.generation_config.eos_token_id
        vocabulary, self.limit = range(config.vocab_size), config.max_position_embeddings
        rope = getattr(config, "rope_parameters", None) or {}
        # beyond, one long row would change the others' rope
        if rope.get("rope_type") == "longrope":
            self.limit = min(self.limit, rope["original_max_position_embeddings"])
        stops = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
        stops = [i for i in stops if i in vocabulary]
        self.is_stop = torch.zeros(len(vocabulary), dtype=torch.bool, device=model.device)  # (V,)
        self.is_stop[stops] = True
        self.pad_id = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i in vocabulary)

    def _probe(self):
        """Refuse a model for which the cache can't be right, by what it says of itself and a short
        run."""
        config, ids = (
            self.model.config.get_text_config(),
            torch.arange(2, device=self.model.device)[None],
        )
        name = f"{type(self.model).__name__} can't be sampled from with a ragged cache"
        cache = KVCache(1, 2, ids.device)
        other = {*(getattr(config, "layer_types", None) or ())} - {
            "full_attention",
            "sliding_attention",
        }
        recurrent = getattr(self.model, "_is_stateful", False)
        pluggable = getattr(self.model, "_supports_attention_backend", False)
        require(not self.model.config.is_encoder_decoder, f"{name}: it is an encoder-decoder")
        require(
            not other and not recurrent, f"{name}: it has recurrent or unknown layers {[*other]}"
        )
        require(pluggable, f"{name}: it keeps to its own attention function")
        try:
            with _sampling_mode(self.model):
                logits = self._forward(cache, 0, ids, ids.clone(), [2])
                self.fused = fusable(self.model) and self._agrees(ids, logits)
        except (AttributeError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{name}: {error}") from error
        require(
            len(cache.layers) == config.num_hidden_layers, f"{name}: some layers keep no keys in it"
        )

    @contextmanager
    def _fast_path(self):
        """For one turn, `_forward` takes the fused path if it applies: its copies of the weights
        are those of now."""
        self._fused = fuse(self.model) if self.fused and fusable(self.model) else None
        try:
            yield
        finally:
            self._fused = None

    def _agrees(self, ids, logits):
        """Whether the fused path, fed ids (1, Q) = 0, 1, ... and the last again, gives the model's
        logits (1, V)."""
        cache, forward, errors = KVCache(1, ids.shape[1], ids.device), fuse(self.model), []
        for positions in (ids, ids[:, -1:].clone()):
            cache.aim(0, positions, [ids.shape[1]])
            errors.append((forward(cache, positions, positions) - logits).abs().max())
        return bool(
            torch.stack(errors).max()
            < (1e-4 if logits.dtype.itemsize > 2 else 0.05) * logits.abs().max()
        )

    def generate(self, prompt_ids, group_size=1, *, max_new_tokens, temperature=1.0, seeds=None):
        """Sample group_size completions of each prompt; row i belongs to prompt i // group_size.

        prompt_ids: lists of token ids; max_new_tokens: one for all, or one for each of the B rows;
            temperature 0 is
        greedy; seeds: (B,) ints, default 0..B-1, so that the same call gives the same samples.
        Returns a Rollout. Raises ValueError, before any work, if a prompt is empty, has an unknown
        id or leaves no room for max_new_tokens, or if a number makes no sense. No prompts give a
        rollout of no rows.
        """
        if not prompt_ids:
            return self._no_rows(turns=1)
        count, total, device = len(prompt_ids), len(prompt_ids) * group_size, self.model.device
        limits = self._check(prompt_ids, [0] * count, group_size, max_new_tokens, temperature)
        seeds = torch.as_tensor(range(total) if seeds is None else seeds, device=device)
        fine = seeds.shape == (total,) and not seeds.is_floating_point()
        require(fine, f"seeds must be {total} integers: got {tuple(seeds.shape)} {seeds.dtype}")
        start, common = self._start(prompt_ids)
        index = torch.zeros(count, dtype=torch.int64, device=device)
        rest = [prompt[common:] for prompt in prompt_ids]
        rollout = self._turn(start, index, rest, group_size, limits, temperature, seeds.long())
        rollout.parents = torch.arange(count, device=device).repeat_interleave(group_size)
        rollout.prompt = rollout.parents
        return rollout

    def _start(self, prompts):
        """What all prompts begin with, fed once: (a rollout of one row and no turn yet, its
        length).

        Few-shot examples, say. Under SHARED tokens, or for one prompt, not worth a pass of its own:
        length 0.
        """
        common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
        common = common if len(common) >= SHARED and len(prompts) > 1 else []
        device = self.model.device
        ids, row = (
            torch.tensor([common], dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        mask, none = (
            torch.zeros_like(ids, dtype=torch.bool),
            torch.zeros(1, 0, dtype=torch.bool, device=device),
        )
        cache, lengths = KVCache(1, 0, device, self.model), row + len(common)
        start = Rollout(
            ids,
            mask,
            torch.full_like(ids, -1),
            torch.zeros(ids.shape, device=device),
            lengths,
            none,
            row,
            row,
            row,
            cache,
        )
        if common:
            with _sampling_mode(self.model), self._fast_path():
                self._prefill(start, cache, cache.slots, [0], [len(common)])
        return start, len(common)

    def extend(
        self,
        rollout,
        more_prompt_ids,
        group_size=1,
        *,
        max_new_tokens,
        temperature=1.0,
        rows=None,
        seeds=None,
    ):
        """Append more_prompt_ids[i] to row rows[i] (default: all) and sample completions of each.

        From a cache that this model has made, only new tokens are fed, and the new rows' seeds
        derive from their parents': `seeds` is then ignored. A rollout without a cache, or with
        another model's, is encoded anew, which needs `seeds`, an int for each of the B new rows;
        what it said before was then not sampled by this model: its action_mask is False, its
        logprobs are 0. Returns a new Rollout with one more turn; the old one stays as it is.
        Raises ValueError as `generate` does.
        """
        if not more_prompt_ids:
            return self._no_rows(rollout.stopped.shape[1] + 1)
        total, count = len(rollout.lengths), len(more_prompt_ids)
        rows = range(total) if rows is None else [int(r) for r in rows]
        own = rollout.cache is not None and rollout.cache.owner is self.model
        freed = "was freed: keep it until the last turn, or" if rollout.cache is None else ""
        fault = freed or "is another model's:"
        require(own or seeds is not None, f"this rollout's cache {fault} {ENCODE_ANEW}")
        require(
            count == len(rows), f"more_prompt_ids has {count} lists, need {len(rows)}: one a row"
        )
        require(
            all(0 <= r < total for r in rows), f"rows: the rollout has rows 0..{total - 1} only"
        )
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.model.device)
        old = rollout.lengths[index].tolist()
        limits = self._check(more_prompt_ids, old, group_size, max_new_tokens, temperature)
        if not own:
            limits = {"max_new_tokens": limits, "temperature": temperature}
            return self._encode_anew(rollout, index, more_prompt_ids, group_size, seeds, limits)
        seeds = child_seeds(rollout.seeds[index], group_size).flatten()
        return self._turn(rollout, index, more_prompt_ids, group_size, limits, temperature, seeds)

    def _encode_anew(self, rollout, index, prompts, group_size, seeds, limits):
        """`extend` without a cache: what was said before becomes part of the prompt."""
        said, turns = rollout.row_ids(), rollout.stopped.shape[1]
        whole = [said[row] + more for row, more in zip(index.tolist(), prompts, strict=True)]
        new = self.generate(whole, group_size, seeds=seeds, **limits)
        new.parents = index[new.parents]
        old = rollout._take(new.parents, new.ids.shape[1], self.pad_id)
        new.turn = torch.where(old.turn < 0, new.turn + turns * (new.turn >= 0), old.turn)
        new.stopped, new.prompt = torch.cat([old.stopped, new.stopped], 1), old.prompt
        return new

    def _no_rows(self, turns):
        rows, columns = (
            torch.empty(0, device=self.model.device),
            torch.empty(0, 1, device=self.model.device),
        )
        shape = (
            columns.long(),
            columns.bool(),
            columns.long(),
            columns,
            rows.long(),
            columns.bool().expand(0, turns),
        )
        cache = KVCache(0, 0, rows.device, self.model)
        return Rollout(*shape, rows.long(), rows.long(), rows.long(), cache)

    def _check(self, prompts, lengths, group_size, max_new_tokens, temperature):
        """ValueError for input that makes no sense; else max_new_tokens of every row, a list of
        B."""
        total, limits = len(prompts) * group_size, torch.as_tensor(max_new_tokens)
        whole = limits.ndim < 2 and not limits.is_floating_point()
        require(
            whole,
            f"max_new_tokens is {max_new_tokens}: it must be a whole number, or one for each row",
        )
        limits = limits.tolist() if limits.ndim else [int(limits)] * total
        require(
            len(limits) == total,
            f"max_new_tokens has {len(limits)} numbers, need 1 or {total}: one a row",
        )
        numbers = f"{len(prompts)} prompts, {group_size=}, {max_new_tokens=}"
        require(min(len(prompts), group_size, *limits) >= 1, f"{numbers}: none may be below 1")
        require(
            temperature >= 0, f"temperature is {temperature}: it must be positive, or 0 for greedy"
        )
        for i, (prompt, old) in enumerate(zip(prompts, lengths, strict=True)):
            known = all(0 <= token < len(self.is_stop) for token in prompt)
            new = max(limits[i * group_size : (i + 1) * group_size])
            sizes = f"{old} old tokens + {len(prompt)} of the prompt + {new} new ones"
            fits = old + len(prompt) + new <= self.limit
            require(len(prompt), f"prompt {i} is empty: give it at least one token (a BOS, say)")
            require(known, f"prompt {i} has an id outside the vocabulary of {len(self.is_stop)}")
            require(
                fits, f"prompt {i}: {sizes} exceed {self.limit} positions: lower max_new_tokens"
            )
        return limits

    def _turn(self, base, index, prompts, group_size, limits, temperature, seeds):
        """Rows `index` (R,) of base plus a prompt each, prefilled, branched and decoded: a new
        Rollout."""
        turn, parent = (
            base.stopped.shape[1],
            torch.arange(len(seeds), device=index.device) // group_size,
        )
        old = base.lengths[index].tolist()
        total = [o + len(p) for o, p in zip(old, prompts, strict=True)]
        capacity = max(total[i // group_size] + new for i, new in enumerate(limits))
        column = torch.arange(capacity, device=index.device)
        rollout = base._take(index, capacity, self.pad_id)
        rollout.lengths = torch.tensor(total, device=index.device)
        # (R, column)
        new = (column >= base.lengths[index, None]) & (column < rollout.lengths[:, None])
        rollout.ids.masked_scatter_(
            new, torch.tensor([t for p in prompts for t in p], device=index.device)
        )
        with _sampling_mode(self.model), self._fast_path():
            self._prefill(rollout, base.cache, base.cache.slots[index], old, total)
            if group_size > 1:
                # neighbours in the cache are alike in length
                order = rollout.lengths[parent].argsort(descending=True)
                cache = rollout.cache.gather(
                    rollout.cache.slots[parent[order]], capacity, max(total)
                )
                cache.slots = order.argsort()
                rollout = rollout._take(parent, capacity, self.pad_id, cache)
            rollout.seeds, rollout.parents, prompted = seeds, index[parent], rollout.lengths.clone()
            self._decode(
                rollout, rollout.lengths + torch.tensor(limits, device=index.device), temperature
            )
        real = column < rollout.lengths[:, None]  # (B, capacity)
        rollout.action_mask |= real & (column >= prompted[:, None])  # what this turn sampled
        rollout.turn.masked_fill_(real & (rollout.turn < 0), turn)
        last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)  # (B, 1)
        rollout.stopped = torch.cat([rollout.stopped, self.is_stop[last]], 1)
        return rollout._take(slice(None), int(rollout.lengths.max()), self.pad_id, rollout.cache)

    def _prefill(self, rollout, cache, slots, old, total):
        """Copy cached rows at `slots` (R,) to rollout.cache and feed what they lack of total - 1
        tokens."""
        cached = [max(o - 1, 0) for o in old]
        # a chunk is a range of rows
        order = sorted(range(len(old)), key=lambda i: (cached[i] - total[i], -total[i]))
        rows = torch.tensor(order, device=slots.device)
        rollout.cache = cache.gather(slots[rows], rollout.ids.shape[1], max(cached))
        rollout.cache.slots = rows.argsort()
        start, first = torch.tensor(cached, device=rows.device)[rows, None], 0
        while first < len(order) and (feed := total[order[first]] - 1 - cached[order[first]]) > 0:
            chunk = slice(first, first + max(1, self.prefill_tokens // feed))
            last = rollout.lengths[rows[chunk], None] - 1  # (n, 1)
            for begin in range(0, feed, self.prefill_tokens):  # one row may exceed the budget alone
                step = torch.arange(
                    begin, min(begin + self.prefill_tokens, feed), device=rows.device
                )
                # Shorter rows end in copies of their pending token at its own place: no padding at
                # all.
                positions = torch.minimum(start[chunk] + step, last)  # (n, Q)
                ids = rollout.ids[rows[chunk]].gather(1, positions)
                self._forward(
                    rollout.cache, first, ids, positions, [max(total[i] for i in order[chunk])]
                )
            first += len(last)

    def _decode(self, rollout, end, temperature):
        """Sample until all rows are done or `end` (B,) long; slot s holds row order[s]: active,
        waiting, then done."""
        lengths, ends = rollout.lengths.tolist(), end.tolist()
        order = rollout.cache.slots.argsort().tolist()
        unfinished, graphs = len(order), {} if self.graphs and self._fused else None
        self._pool = None  # a pool of memory dies with its graphs
        while unfinished:
            active = min(self.max_batch, unfinished)
            steps = min(self.block, max(ends[r] - lengths[r] for r in order[:active]))
            widths = _widths([lengths[r] + steps - 1 for r in order[:active]])
            if graphs is not None:
                widths = [-(-max(widths) // 128) * 128]
            together = active if graphs is None else min(_bucket(active), len(order))
            rows = torch.tensor(order[:together], device=end.device)
            state = self._decode_block(
                rollout, rows, active, end[rows], widths, steps, temperature, graphs
            )
            state, before = state.tolist(), list(order)  # the one host sync of the block
            for slot in reversed(range(active)):
                lengths[order[slot]], done = state[slot]
                if done:  # change places with the last row that isn't
                    unfinished -= 1
                    order[slot], order[unfinished] = order[unfinished], order[slot]
            rollout.cache.move(before, order, max(lengths))
        rollout.cache.slots = torch.tensor(order, device=end.device).argsort()
        rollout.cache.rows = rollout.cache.spot = None  # the last may belong to a graph

    def _decode_block(self, rollout, rows, active, end, widths, steps, temperature, graphs):
        """`steps` steps of rows (n,), in cache rows [0, n), of which the first `active` count: (n,
        2) of length, done.

        With graphs, all that a step reads and writes stays in one place, so that a captured step
        can be replayed.
        """
        position, idle = (
            rollout.lengths[rows] - 1,
            torch.arange(len(rows), device=rows.device) >= active,
        )
        token, logprob = rollout.ids[rows, position], rollout.logprobs[rows, position]
        state, replays = State(rows, end, rollout.seeds[rows], position, token, logprob, idle), {}
        if graphs is not None:
            fixed, replays = graphs.setdefault(len(rows), (state, replays))
            for old, new in zip(fixed, state, strict=True):
                old.copy_(new)
            state = fixed

        def step():
            self._step(rollout, state, widths, temperature)

        for _ in range(steps):
            replays.get(widths[0], step)()
            # after one step as it is, which also warms up
            if graphs is not None and widths[0] not in replays:
                replays[widths[0]] = self._capture(step)
        rollout.lengths[state.rows] = state.position + 1
        return torch.stack([state.position + 1, state.done], 1)

    def _capture(self, step):
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.model.device), torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay

    def _step(self, rollout, state, widths, temperature):
        """One token more for each row that isn't done; the state is changed in place."""
        rows, end, seeds, position, token, logprob, done = state
        logits = self._forward(rollout.cache, 0, token[:, None], position[:, None], widths)
        new_token, new_logprob = sample(logits, temperature, uniform(seeds, position + 1))
        # A row that is done feeds its last token at its own place again, which changes nothing.
        token.copy_(torch.where(done, token, new_token))
        logprob.copy_(torch.where(done, logprob, new_logprob))
        position += ~done
        rollout.ids[rows, position], rollout.logprobs[rows, position] = token, logprob
        done |= self.is_stop[token] | (position + 1 == end)

    def _forward(self, cache, first, ids, positions, widths):
        """Feed ids (n, Q) at positions (n, Q) to cache rows first, ...; returns the last logits (n,
        V)."""
        cache.aim(first, positions, widths)
        if self._fused:
            return self._fused(cache, ids, positions)
        positions.masks, positions.spans = {}, cache.spans
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]
