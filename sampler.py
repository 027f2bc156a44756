"""Multi-turn sampling from a causal LM with one ragged key-value cache: ids in, ids out.

    first = sampler.generate(prompt_ids, 4, max_new_tokens=64)
    second = sampler.extend(first, instruction_ids, max_new_tokens=64)  # on the same cache

Slot j of a cache row holds the token at position j: rows begin at position 0 and have their own
lengths. Ragged, because answers end at different places, and the next turn follows each where it
ended: no padding within a conversation, nothing to cut out or move. None on the left either, where
it would depend on a row's neighbours, as would its positions: so a row samples the same in any
batch, and one mask, j <= position, does for all. Between calls the cache holds all tokens of a row
but the last, the pending one, so whatever is fed next starts with it: a decoding step or the next
turn's instruction.

Memory goes into the cache: 2 * layers * kv_heads * head_dim numbers for every slot of every row
(28 KB for 28 layers with 2 heads of 128 in bfloat16), and each row has as many slots as the longest
so far, and up to a quarter more: the cache grows as rows do, a layer at a time. A turn copies what
it goes on from, so that the old rollout can be branched from again; with `free=True` the old cache
is given up on the way, layer by layer. Before an update free the last one (`rollout.cache = None`).

Left out: top-k, top-p and penalties (a policy gradient needs the log-probs of what was sampled
from), paged memory, and reading a group's prompt once for all its rows (it is *computed* once).
"""

import os
from contextlib import contextmanager
from functools import partial

import torch

from loss import logits_of
from sampling.adapters import adapted
from sampling.attention import KVCache, head_is, require, room_for, sampling_mode
from sampling.checks import check_model, check_request, goes_on_from, position_limit
from sampling.draws import child_seeds, sample
from sampling.rollout import rollout_of
from sampling.steps import Graphs, State, state_of, widths_of, write

try:  # the one place outside fast/ that looks for it: without that folder sampling is only slower
    import fast.paths as fast
except ModuleNotFoundError as error:
    if error.name not in ("fast", "fast.paths"):  # something else is missing, which is no choice
        raise
    fast = None

SHARED = 64  # tokens that all prompts begin with, from which on they are fed once


class Sampler:
    """Samples from a transformers causal LM with standard attention; ValueError for any other.

    max_batch: rows decoded together; block: steps between two looks at which are done (a host sync
    each; by default 4 on CPU, where it costs nothing, else 16); prefill_tokens: prompt tokens fed
    at once. It stops at the tokenizer's eos and at those of the model's generation_config, of which
    nothing else is used. The constructor runs the model on two tokens, on all paths. `fused` says
    whether it takes the fast path (fast/), `kernels` whether decoding takes kernels for CUDA beside
    it, `graphs` whether steps of these are replayed as CUDA graphs; each may be set to False.
    `adapters` (sampling/adapters.py), if set, are sampled with. `on_tokens(rows, ids)`, if set, is
    called after every block with the rows of the call that were decoded and the list of tokens that
    each has got. A token takes `token_bytes` of the cache.
    """

    def __init__(self, model, tokenizer, max_batch=256, block=None, prefill_tokens=8192):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.block = block or (4 if model.device.type == "cpu" else 16)
        self.config = config = model.config.get_text_config()
        self.fast_forward = self.fast_step = None  # set while it samples, by `_sampling`
        self.adapters = self.on_tokens = None
        self.fused, self.kernels = self._try_out()
        self.graphs, self._graphs, self._kept = self.kernels, Graphs(), {}
        vocabulary, eos = range(config.vocab_size), model.generation_config.eos_token_id
        self.limit = position_limit(config)
        stops = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
        stops = [i for i in stops if i in vocabulary]
        self.is_stop = torch.zeros(len(vocabulary), dtype=torch.bool, device=model.device)  # (V,)
        self.is_stop[stops] = True
        self.pad_id = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i in vocabulary)

    def _try_out(self):
        """Whether the fast path is right, and its kernels; ValueError if the plain one isn't."""
        name, layers = check_model(self.model), self.config.num_hidden_layers
        ids = torch.arange(2, device=self.model.device)[None]
        cache = KVCache(1, 2, ids.device, self.model)
        try:
            with sampling_mode(self.model):
                logits = self._forward(cache, 0, ids, ids.clone(), [2])
                paths = fast.tried(self.model, ids, logits) if fast else (False, False)
        except (AttributeError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{name}: {error}") from error
        require(len(cache.layers) == layers, f"{name}: some layers keep no keys in it")
        stores = [store for stores in cache.layers.values() for store in stores]
        self.token_bytes = sum(store.nbytes for store in stores) // cache.capacity
        return paths

    def generate(self, prompt_ids, group_size=1, *, max_new_tokens, temperature=1.0, seeds=None):
        """Sample group_size completions of each prompt; row i belongs to prompt i // group_size.

        prompt_ids: lists of token ids; max_new_tokens: one for all, or one for each of the B rows;
        temperature 0 is greedy; seeds: (B,) ints, default 0..B-1, so that the same call gives the
        same samples. Returns a Rollout; no prompts give one of no rows. Raises ValueError, before
        any work, if a prompt is empty, has an unknown id or leaves no room for max_new_tokens, or
        if a number makes no sense.
        """
        if not prompt_ids:
            return self._no_rows(turns=1)
        count, total, device = len(prompt_ids), len(prompt_ids) * group_size, self.model.device
        old, how = [0] * count, (group_size, max_new_tokens, temperature)
        limits = check_request(self, prompt_ids, old, *how)
        seeds = torch.as_tensor(range(total) if seeds is None else seeds, device=device)
        fine = seeds.shape == (total,) and not seeds.is_floating_point()
        require(fine, f"seeds must be {total} integers: got {tuple(seeds.shape)} {seeds.dtype}")
        start, common = self._start(prompt_ids)
        index = torch.zeros(count, dtype=torch.int64, device=device)
        rest = [prompt[common:] for prompt in prompt_ids]
        rollout = self._turn(start, index, rest, seeds.long(), limits, temperature, free=True)
        rollout.parents = torch.arange(count, device=device).repeat_interleave(group_size)
        rollout.prompt_index = rollout.parents
        return rollout

    def extend(self, rollout, more_prompt_ids, group_size=1, *, max_new_tokens, temperature=1.0,
               rows=None, seeds=None, free=False):  # fmt: skip
        """Append more_prompt_ids[i] to row rows[i] (default: all); sample group_size answers each.

        From a cache that this model has made, only new tokens are fed, and the new rows' seeds
        derive from their parents': `seeds` is then ignored. A rollout without a cache, or with
        another model's, is encoded anew, which needs `seeds`, an int for each of the B new rows;
        what it said before was then not sampled by this model: its action_mask is False, its
        logprobs are 0. Returns a new Rollout with one more turn; the old one stays as it is, but
        with `free` its cache is given up on the way. Raises ValueError as `generate` does.
        """
        if not more_prompt_ids:
            rollout.cache = None if free else rollout.cache
            return self._no_rows(rollout.stopped.shape[1] + 1)
        total, count = len(rollout.lengths), len(more_prompt_ids)
        rows = [*range(total)] if rows is None else [int(row) for row in rows]
        ours = goes_on_from(rollout.cache, self._policy(), seeds)
        lists = f"more_prompt_ids has {count} lists, need {len(rows)}: one a row"
        require(count == len(rows), lists)
        inside = all(0 <= row < total for row in rows)
        require(inside, f"rows: the rollout has rows 0..{total - 1} only")
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        old = rollout.lengths[index].tolist()
        limits = check_request(self, more_prompt_ids, old, group_size, max_new_tokens, temperature)
        if not ours:
            rollout.cache = None if free else rollout.cache
            return self._encode_anew(rollout, index, more_prompt_ids, seeds, limits, temperature)
        seeds = child_seeds(rollout.seeds[index], group_size).flatten()
        return self._turn(rollout, index, more_prompt_ids, seeds, limits, temperature, free)

    def _encode_anew(self, rollout, index, prompts, seeds, limits, temperature):
        """`extend` without a cache: what was said before becomes part of a longer prompt."""
        said, turn = rollout.row_ids(), rollout.stopped.shape[1]
        whole = [said[row] + more for row, more in zip(index.tolist(), prompts, strict=True)]
        options = {"max_new_tokens": limits, "temperature": temperature, "seeds": seeds}
        new = self.generate(whole, len(limits) // len(whole), **options)
        new.parents = index[new.parents]
        old = rollout.take(new.parents, new.ids.shape[1], self.pad_id)
        new.turn = torch.where(old.turn < 0, new.turn + turn * (new.turn >= 0), old.turn)
        new.stopped, new.prompt_index = torch.cat([old.stopped, new.stopped], 1), old.prompt_index
        return new

    def _start(self, prompts):
        """What all prompts begin with, fed once: a rollout of one row and no turn, and its length.

        Few-shot examples, say. Under SHARED tokens, or for one prompt, not worth a pass: length 0.
        """
        common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
        common = common if len(common) >= SHARED and len(prompts) > 1 else []
        start = rollout_of([[common]], 0, self)
        start.cache = KVCache(1, 0, self.model.device, self._policy())
        if common:
            with self._sampling():
                self._prefill(start, start.cache, start.cache.slots, [0], [len(common)], False)
        return start, len(common)

    def _no_rows(self, turns):
        rollout = rollout_of([], turns, self)
        rollout.cache = KVCache(0, 0, self.model.device, self._policy())
        return rollout

    @contextmanager
    def _sampling(self):
        """For one turn: the model only samples, on the fast path if it has one, as it is now."""
        self.fast_forward = fast.forward_of(self.model, self.adapters) if self.fused else None
        if self.fast_forward and self.kernels:
            self.fast_step = fast.step_of(self.model, self.adapters, self._kept)
        hooked = None if self.fast_forward else self.adapters  # the fast path has none
        with sampling_mode(self.model), adapted(self.model, hooked):
            try:
                yield
            finally:
                self.fast_forward = self.fast_step = None

    def _policy(self):
        """Whose keys and values a cache holds."""
        return self.model if self.adapters is None else self.adapters

    def _turn(self, before, index, prompts, seeds, limits, temperature, free):
        """Rows `index` (R,) of `before` plus a turn: prefilled, branched, decoded; a new Rollout.

        prompts: R lists of ids; seeds (B,) and limits, B numbers: row i goes on from i // (B / R).
        free: the cache of `before` is given up.
        """
        group_size, device = len(limits) // len(prompts), index.device
        old = before.lengths[index].tolist()
        total = [o + len(p) for o, p in zip(old, prompts, strict=True)]
        width = max(total[i // group_size] + new for i, new in enumerate(limits))
        rollout, cache = before.append(index, prompts, width, self.pad_id), before.cache
        before.cache = None if free else cache
        parent = torch.arange(len(limits), device=device) // group_size
        with self._sampling():
            # Turn 2 goes on from turn 1's cache here: of all that was said, only the pending token
            # and the instruction are fed. (Turn 1 goes on from what all prompts have in common.)
            self._prefill(rollout, cache, cache.slots[index], old, total, free)
            if group_size > 1:  # only now, so that each prompt was fed once for its group
                rollout = self._branch(rollout, parent, max(total))
            rollout.seeds, rollout.parents, prompted = seeds, index[parent], rollout.lengths.clone()
            self._decode(rollout, prompted + torch.tensor(limits, device=device), temperature)
        column = torch.arange(width, device=device)
        real = column < rollout.lengths[:, None]  # (B, width)
        rollout.action_mask |= real & (column >= prompted[:, None])  # what this turn sampled
        rollout.turn.masked_fill_(real & (rollout.turn < 0), before.stopped.shape[1])
        last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)  # (B, 1)
        rollout.stopped = torch.cat([rollout.stopped, self.is_stop[last]], 1)
        return rollout.take(slice(None), int(rollout.lengths.max()), self.pad_id, rollout.cache)

    def _prefill(self, rollout, cache, slots, old, total, free):
        """Copy cached rows at `slots` (R,) to rollout.cache; feed what they lack of total - 1."""
        cached = [max(o - 1, 0) for o in old]
        # Most to feed first: then a chunk of rows that are fed together is a range in the cache.
        order = sorted(range(len(old)), key=lambda i: (cached[i] - total[i], -total[i]))
        rows = torch.tensor(order, device=slots.device)
        room = room_for(max(total), rollout.ids.shape[1])
        rollout.cache = cache.gather(slots[rows], room, max(cached), free)
        rollout.cache.slots = rows.argsort()
        start, first = torch.tensor(cached, device=rows.device)[rows, None], 0
        while first < len(order) and (feed := total[order[first]] - 1 - cached[order[first]]) > 0:
            chunk = slice(first, first + max(1, self.prefill_tokens // feed))
            last = rollout.lengths[rows[chunk], None] - 1  # (n, 1)
            width = max(total[i] for i in order[chunk])
            for begin in range(0, feed, self.prefill_tokens):  # one row may exceed the budget alone
                end = min(begin + self.prefill_tokens, feed)
                step = torch.arange(begin, end, device=rows.device)
                # Shorter rows end in copies of their pending token at its own place: no padding.
                positions = torch.minimum(start[chunk] + step, last)  # (n, Q)
                ids = rollout.ids[rows[chunk]].gather(1, positions)
                self._forward(rollout.cache, first, ids, positions, [width])
            first += len(last)

    def _branch(self, rollout, parent, used):
        """Row parent[i] (B,) as row i, with a copy of the `used` first slots of its cache."""
        # Neighbours in the cache are alike in length, and then need not read as far as the longest.
        order, cache = rollout.lengths[parent].argsort(descending=True), rollout.cache
        copies = cache.gather(cache.slots[parent[order]], cache.capacity, used, free=True)
        copies.slots = order.argsort()
        return rollout.take(parent, rollout.ids.shape[1], self.pad_id, copies)

    def _decode(self, rollout, end, temperature):
        """Sample until each row is done or `end` (B,) long, a block of steps at a time.

        Slot s of the cache holds row order[s]: first the active ones, then those that wait, then
        those that are done. So a step reads and writes one range of rows, and copies none.
        """
        lengths, ends = rollout.lengths.tolist(), end.tolist()
        order = rollout.cache.slots.argsort().tolist()
        unfinished = len(order)
        while unfinished:
            active = min(self.max_batch, unfinished)
            count = min(self.block, max(ends[r] - lengths[r] for r in order[:active]))
            need = max(min(lengths[r] + count, ends[r]) for r in order[:active])
            if need > rollout.cache.capacity:
                rollout.cache.grow(room_for(need, rollout.ids.shape[1]), max(lengths))
            rows = torch.tensor(order[:active], device=end.device)
            state = state_of(rollout, rows, end, self.block + 1)
            widths = widths_of([lengths[r] + count - 1 for r in order[:active]])
            state = self._steps(rollout.cache, widths, state, temperature, count)
            write(rollout, rows, state)
            told = torch.stack([state.position[:active] + 1, state.done[:active]], 1).tolist()
            before = list(order)
            if self.on_tokens:
                rows, ends_now = before[:active], [end for end, _ in told]
                starts = [lengths[row] for row in rows]
                self.on_tokens(rows, rollout.ids_between(rows, starts, ends_now))
            for slot in reversed(range(active)):
                lengths[order[slot]], done = told[slot]
                if done:  # change places with the last row that isn't
                    unfinished -= 1
                    order[slot], order[unfinished] = order[unfinished], order[slot]
            rollout.cache.move(before, order, max(lengths))
        rollout.cache.slots = torch.tensor(order, device=end.device).argsort()

    def _steps(self, cache, widths, state: State, temperature, count: int) -> State:
        """`count` steps of cache rows 0, 1, ... from a state: where they lead."""
        step = partial(self._step, cache, widths, temperature)
        if self.fast_step:
            self.fast_step.aim(cache)
            if self.graphs:
                reads = self.is_stop.data_ptr(), *self.fast_step.reads
                return self._graphs.run(step, state, temperature, reads, count)
        for _ in range(count):
            step(state)
        return state

    def _step(self, cache, widths, temperature, state: State):
        """One token more for each row that isn't done; the state is changed in place."""
        end, start, position, token, logprob, done, draws, tokens, logprobs = state
        draw = draws.gather(1, (position - start)[:, None])[:, 0]
        if self.fast_step:
            logits = self.fast_step.run(token, position, done)
            new_token, new_logprob = self.fast_step.sample(logits, temperature, draw)
        else:
            logits = self._forward(cache, 0, token[:, None], position[:, None], widths)
            new_token, new_logprob = sample(logits, temperature, draw)
        # A row that is done feeds its last token at its own place again, which changes nothing.
        token.copy_(torch.where(done, token, new_token))
        logprob.copy_(torch.where(done, logprob, new_logprob))
        position += ~done
        column = (position - start)[:, None]
        tokens.scatter_(1, column, token[:, None])
        logprobs.scatter_(1, column, logprob[:, None])
        done |= self.is_stop[token] | (position + 1 == end)

    def _forward(self, cache, first, ids, positions, widths):
        """Feed ids (n, Q) at positions (n, Q) to cache rows first, ...; the last logits (n, V)."""
        cache.aim(first, positions, widths)
        if self.fast_forward:
            return self.fast_forward(cache, ids, positions)
        positions.masks, positions.spans = {}, cache.spans  # the layers hand them to our attention
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache}
        with head_is(self.model, logits_of):  # as the scorer has it
            return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
