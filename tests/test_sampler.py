"""The sampler against a plain forward pass: no cache, no batch, no padding."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import sampler as sampler_module
from conftest import EOS, PROMPTS, TINY, VOCAB, build, check, equal, plain_logits, three_turns
from sampler import Sampler
from sampling.attention import KVCache
from sampling.draws import sample, uniform
from sampling.rollout import Rollout, rollout_of

TENSORS = [f.name for f in fields(Rollout) if f.name != "cache"]


def test_each_row_has_its_own_token_limit(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer, max_batch=3, block=2)
    sampler.is_stop[:] = False
    limits = [3, 1, 7, 2, 5, 5, 1, 9, 4, 6]
    first = sampler.generate(PROMPTS, 2, max_new_tokens=limits)
    assert first.action_mask.sum(1).tolist() == limits
    second = sampler.extend(first, [[4], [5, 6]], 2, rows=[3, 0], max_new_tokens=limits[:4])
    assert (second.action_mask & (second.turn == 1)).sum(1).tolist() == limits[:4]
    assert sampler.generate(PROMPTS, max_new_tokens=torch.tensor(3)).lengths.max() == 11 + 3
    with pytest.raises(ValueError, match="max_new_tokens is 2.5: it must be a whole number"):
        sampler.generate(PROMPTS, max_new_tokens=2.5)
    with pytest.raises(ValueError, match="max_new_tokens has 3 numbers, need 1 or 10"):
        sampler.generate(PROMPTS, 2, max_new_tokens=[1, 2, 3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", TINY)
def test_logprobs_equal_a_plain_forward_pass_in_every_turn(tiny, tokenizer, name, temperature):
    model = tiny(name)
    sampler = Sampler(model, tokenizer, max_batch=4, block=3, prefill_tokens=8)
    rollouts = three_turns(sampler, temperature)
    for rollout in rollouts:
        check(model, rollout, temperature)
    assert 0 < rollouts[-1].stopped.float().mean() < 1  # so both ways of ending were seen
    assert len(set(rollouts[0].lengths.tolist())) > 3  # and rows left the batch at different times


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_row_depends_on_its_own_seed_only(tiny, tokenizer, name):
    seeds = torch.arange(10) * 1000 + 7
    reference = three_turns(Sampler(tiny(name), tokenizer, max_batch=64), seeds=seeds)
    for max_batch, block, prefill_tokens in ((1, 4, 1), (7, 1, 16), (64, 5, 4096)):
        sampler = Sampler(tiny(name), tokenizer, max_batch, block, prefill_tokens)
        assert all(map(equal, reference, three_turns(sampler, seeds=seeds)))
    alone = Sampler(tiny(name), tokenizer).generate([PROMPTS[3]], max_new_tokens=9, seeds=[7007])
    assert alone.ids[0].tolist() == reference[0].ids[7, : alone.lengths[0]].tolist()
    other = three_turns(sampler, seeds=seeds + 1)
    assert not equal(reference[0], other[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_window"])
def test_greedy_equals_generate(tiny, tokenizer, name):
    model = tiny(name)
    sampler = Sampler(model, tokenizer, max_batch=2, block=3)
    rollout = sampler.generate(PROMPTS, max_new_tokens=12, temperature=0)
    rollout = sampler.extend(rollout, [[4, 6]] * 5, max_new_tokens=12, temperature=0)
    check(model, rollout)
    for turn in (0, 1):
        sampled = rollout.action_mask & (rollout.turn == turn)
        starts = sampled.long().argmax(1)
        answers = rollout.completion_ids(turn)
        for row, start, answer in zip(rollout.ids, starts, answers, strict=True):
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            expected = model.generate(row[None, :start], **options)[0, start:].tolist()
            assert answer == (expected[:-1] if expected[-1] == EOS else expected)


def test_rows_are_prompt_completion_stop_instruction_completion(tiny, tokenizer):
    first, second, _ = three_turns(Sampler(tiny("llama"), tokenizer, max_batch=3, block=2))
    one, two, before = second.completion_ids(0), second.completion_ids(1), first.completion_ids(0)
    assert second.parents.tolist() == [8, 8, 0, 0, 3, 3, 4, 4, 9, 9, 3, 3]
    assert first.parents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for r, parent in enumerate(second.parents.tolist()):
        end = [[EOS] * int(stop) for stop in second.stopped[r]]
        instruction = [4, 5, 6, 2 + r // 2][: r // 2 + 1]
        expected = PROMPTS[parent // 2] + one[r] + end[0] + instruction + two[r] + end[1]
        assert second.ids[r, : second.lengths[r]].tolist() == expected
        assert one[r] == before[parent]
        assert (second.ids[r, second.lengths[r] :] == EOS).all()  # the pad id


def test_padding_is_never_inferred_from_token_values(tiny, tokenizer):
    other = SimpleNamespace(eos_token_id=EOS, pad_token_id=0)
    neither = SimpleNamespace(eos_token_id=EOS, pad_token_id=None)
    pads, results = (EOS, 0, EOS), []
    for tok, pad in zip((tokenizer, other, neither), pads, strict=True):
        rollout = three_turns(Sampler(tiny("llama"), tok))[1]
        check(tiny("llama"), rollout)
        assert (rollout.ids[rollout.turn < 0] == pad).all()
        results.append(rollout)
    for rollout in results:
        rollout.ids = rollout.ids.where(rollout.turn >= 0, -1)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_stop_and_pad_ids_inside_a_prompt_change_nothing(tiny, tokenizer):
    rollout = Sampler(tiny("llama"), tokenizer).generate([[EOS, 0, EOS, EOS]], 8, max_new_tokens=6)
    check(tiny("llama"), rollout)
    assert (rollout.lengths > 4).all() and not rollout.action_mask[:, :4].any()


def test_all_stop_ids_of_the_generation_config_and_tokenizer_stop(tokenizer):
    model = build(tf.LlamaConfig)
    model.generation_config.eos_token_id = [3, 4]
    rollout = Sampler(model, tokenizer).generate(PROMPTS, 32, max_new_tokens=12)
    last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    assert set(last[rollout.stopped[:, 0]].tolist()) == {EOS, 3, 4}
    ends = sum(rollout.ids[rollout.action_mask] == i for i in (EOS, 3, 4))
    assert ends.sum() == rollout.stopped.sum()
    model.generation_config.eos_token_id = None
    none = SimpleNamespace(eos_token_id=None, pad_token_id=None)
    assert not Sampler(model, none).generate(PROMPTS, 4, max_new_tokens=12).stopped.any()


def test_autocast_and_a_model_changed_between_turns_corrupt_no_memory(tokenizer):
    model = build(tf.LlamaConfig)
    with torch.autocast("cpu", torch.bfloat16):
        assert three_turns(Sampler(model, tokenizer))[2].logprobs.isfinite().all()
    sampler = Sampler(model.bfloat16(), tokenizer)
    rollout = sampler.generate(PROMPTS, max_new_tokens=4)
    model.float()
    with pytest.raises((ValueError, RuntimeError)):
        sampler.extend(rollout, [[4]] * len(PROMPTS), max_new_tokens=4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_unlike_length_read_no_more_of_the_cache_than_their_neighbours_need(
    tiny, tokenizer, name, monkeypatch
):
    used, aim = [], KVCache.aim
    spy = lambda cache, *a: aim(cache, *a) or used.append(cache.spans)  # noqa: E731
    monkeypatch.setattr(KVCache, "aim", spy)
    sampler = Sampler(tiny(name), tokenizer, max_batch=35, block=3)
    prompts = [[5 + i % 7] * (2 + 47 * (i % 13 == 0) + i) for i in range(26)]
    rollout = sampler.generate(prompts, 2, max_new_tokens=12)
    check(tiny(name), rollout)
    check(tiny(name), sampler.extend(rollout, [[4, 6]] * 52, max_new_tokens=8))
    assert any(len(spans) > 1 and spans[0][2] > 2 * spans[-1][2] for spans in used)


def count_tokens(model):
    """A list that grows by the number of tokens of each forward pass, and the hook that does it."""
    fed = []
    hook = lambda module, args, inputs: fed.append(inputs["input_ids"].numel())  # noqa: E731
    return fed, model.register_forward_pre_hook(hook, with_kwargs=True)


def test_no_token_is_fed_twice(tokenizer):
    model = build(tf.LlamaConfig)
    sampler = Sampler(model, tokenizer, block=1, prefill_tokens=1)  # so no row is fed in vain
    fed, _ = count_tokens(model)
    first = sampler.generate(PROMPTS, 4, max_new_tokens=8)
    sampled = int(first.action_mask.sum())
    # each prompt once for its group of 4
    assert sum(fed) == sum(len(p) - 1 for p in PROMPTS) + sampled
    fed.clear()
    second = sampler.extend(first, [[4, 5, 6]] * 3, 4, rows=[2, 5, 11], max_new_tokens=8)
    sampled = int((second.action_mask & (second.turn == 1)).sum())
    # what was pending and the instruction but for its last token
    assert sum(fed) == 3 * 3 + sampled


@pytest.mark.parametrize("config_class", [tf.LlamaConfig, tf.Gemma3TextConfig])
def test_what_all_prompts_begin_with_is_fed_once_and_changes_no_sample(
    tokenizer, config_class, monkeypatch
):
    prompts = [[7, 3, 9, 2, 11, 4, *rest] for rest in ([5], [6, 2], [5], [3, 3, 3, 8])]
    model, runs, counts = build(config_class), [], []
    fed, hook = count_tokens(model)
    sampler = Sampler(model, tokenizer, prefill_tokens=1)  # so no row is fed in vain
    for shared in (6, 7):  # they have six in common
        monkeypatch.setattr(sampler_module, "SHARED", shared)
        fed.clear()
        first = sampler.generate(prompts, 2, max_new_tokens=6)
        runs.append((first, sampler.extend(first, [[4, 6]] * 8, max_new_tokens=6)))
        counts.append(sum(fed))
    hook.remove()
    check(model, runs[0][1])
    assert counts[1] - counts[0] == 3 * 5  # the sixth is each row's own pending token
    for one, two in zip(*runs):
        names = [name for name in TENSORS if name != "logprobs"]
        assert all(torch.equal(getattr(one, n), getattr(two, n)) for n in names)


def test_a_rollout_can_be_branched_from_again(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer, max_batch=3, block=2)
    first, second, _ = three_turns(sampler)
    before = {name: getattr(first, name).clone() for name in TENSORS}
    layers = [store.clone() for stores in first.cache.layers.values() for store in stores]
    check(tiny("llama"), sampler.extend(first, [[8, 2]] * 10, 3, max_new_tokens=20))
    # needs no larger cache
    check(tiny("llama"), sampler.extend(first, [[8]] * 10, max_new_tokens=1))
    assert all(torch.equal(before[name], getattr(first, name)) for name in TENSORS)
    now = [store for stores in first.cache.layers.values() for store in stores]
    assert all(map(torch.equal, layers, now))
    check(tiny("llama"), sampler.extend(second, [[8, 2]], rows=[1], max_new_tokens=2))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_that_grows_with_its_rows_samples_the_same(tiny, tokenizer, name, monkeypatch):
    sampler, grown, grow = Sampler(tiny(name), tokenizer, max_batch=4, block=3), [], KVCache.grow
    spy = lambda cache, *sizes: grown.append(sizes) or grow(cache, *sizes)  # noqa: E731
    monkeypatch.setattr(KVCache, "grow", spy)
    at_once = three_turns(sampler, max_new_tokens=24)
    assert not grown  # short rows have room for their limit from the start
    monkeypatch.setattr(sampler_module, "room_for", lambda tokens, limit: tokens)
    by_and_by = three_turns(sampler, max_new_tokens=24)
    assert all(map(equal, at_once, by_and_by)) and len(grown) > 5
    assert max(capacity for capacity, _ in grown) <= max(r.ids.shape[1] for r in by_and_by) + 2


def test_memory_goes_with_what_rows_need_and_not_with_their_limit(tokenizer, cache_bytes):
    sampler = Sampler(build(tf.LlamaConfig, max_position_embeddings=4000), tokenizer)
    rollout = sampler.generate(PROMPTS, 8, max_new_tokens=3000)
    a_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32
    longest, rows = rollout.ids.shape[1], len(rollout.ids)
    assert 64 < longest < 300
    # and, as it grows, a quarter of the cache before: the keys or values of one of two layers
    most = rows * (longest + 64) * a_token
    assert rows * longest * a_token <= cache_bytes.peak < 1.25 * most


@pytest.mark.parametrize("rows", [None, [4, 0, 7, 4]])
def test_a_cache_given_up_is_freed_as_it_is_copied_and_the_turn_is_the_same(
    tiny, tokenizer, rows, cache_bytes
):
    sampler, more = Sampler(tiny("llama"), tokenizer), [[4, 6]] * len(rows or range(10))
    first, again = (sampler.generate(PROMPTS, 2, max_new_tokens=6) for _ in "ab")
    with pytest.raises(ValueError, match="none may be below 1"):
        sampler.extend(first, more, rows=rows, max_new_tokens=0, free=True)
    kept = sampler.extend(again, more, 2, rows=rows, max_new_tokens=6)  # so it is still there
    again.cache = None
    before, cache_bytes.peak = cache_bytes.now, 0
    freed = sampler.extend(first, more, 2, rows=rows, max_new_tokens=6, free=True)
    assert equal(kept, freed) and first.cache is None
    old = before - sum(s.nbytes for stores in kept.cache.layers.values() for s in stores)
    new = cache_bytes.now - (before - old)
    assert 0 < old and cache_bytes.peak <= before - old + max(old, new) + max(old, new) / 4
    with pytest.raises(ValueError, match="cache was freed: keep it until the last turn, or give"):
        sampler.extend(first, more, rows=rows, max_new_tokens=6)


def test_another_models_cache_that_is_given_up_is_freed_before_all_is_encoded_anew(
    tokenizer, cache_bytes
):
    maker, sampler = (Sampler(build(tf.LlamaConfig), tokenizer) for _ in "ab")
    limits = {"seeds": range(10), "max_new_tokens": 6}
    peaks = []
    for free in (False, True):
        first, cache_bytes.peak = maker.generate(PROMPTS, 2, max_new_tokens=6), 0
        second = sampler.extend(first, [[4, 6]] * 10, free=free, **limits)
        peaks.append(cache_bytes.peak)
        assert (first.cache is None) == free
        del first, second
    none = maker.generate(PROMPTS, max_new_tokens=6)
    sampler.extend(none, [], rows=[], max_new_tokens=6, free=True)
    assert none.cache is None and peaks[1] < peaks[0]


def test_children_of_a_row_differ(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer)
    first = sampler.generate([PROMPTS[1]], max_new_tokens=4)
    second = sampler.extend(first, [[4, 5]], 16, max_new_tokens=12)
    assert len({tuple(c) for c in second.completion_ids(1)}) > 12
    third = sampler.extend(second, [[4]] * 16, 50, max_new_tokens=1)
    assert len({0, *second.seeds.tolist(), *third.seeds.tolist()}) == 1 + 16 + 800


def test_what_was_before_is_restored_even_after_an_error(tokenizer):
    model = build(tf.Phi3Config, resid_pdrop=0.5)
    model.train()
    model.model.layers[0].eval()  # as someone who freezes a part may do
    modes = [m.training for m in model.modules()]
    sampler = Sampler(model, tokenizer)

    def same():
        now = [m.training for m in model.modules()]
        return model.config._attn_implementation == "eager" and now == modes

    rollout = sampler.generate(PROMPTS, max_new_tokens=4)
    assert same() and torch.is_grad_enabled()
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.generate(PROMPTS, max_new_tokens=4)
    handle.remove()
    assert same() and torch.is_grad_enabled()
    check(model.eval(), rollout)  # dropout was off
    weight = torch.ones((), requires_grad=True)
    (weight * rollout.logprobs).sum().backward()  # no inference tensors


def test_generation_config_has_no_say_but_for_stop_ids(tiny, tokenizer):
    model = build(tf.LlamaConfig)
    options = {"repetition_penalty": 9.0, "temperature": 0.1, "top_k": 1, "suppress_tokens": [5, 6]}
    model.generation_config.update(**options)
    one, two = (three_turns(Sampler(m, tokenizer))[2] for m in (model, tiny("llama")))
    assert equal(one, two)


def test_bfloat16_stays_close_to_a_plain_forward_pass(tokenizer):
    model = build(tf.LlamaConfig, initializer_range=0.1).to(torch.bfloat16)
    rollout = three_turns(Sampler(model, tokenizer, max_batch=4, block=3))[2]
    assert {s.dtype for stores in rollout.cache.layers.values() for s in stores} == {torch.bfloat16}
    for r, length in enumerate(rollout.lengths.tolist()):
        logprobs = plain_logits(model, rollout.ids[r, :length]).log_softmax(-1)
        expected = logprobs[:-1].gather(1, rollout.ids[r, 1:length, None])[:, 0]
        ratio = (expected - rollout.logprobs[r, 1:length]).exp()[rollout.action_mask[r, 1:length]]
        assert ((ratio > 0.9) & (ratio < 1.1)).all()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("prompt 1 is empty", {"prompt_ids": [[3], []]}),
        ("prompt 1 has an id outside", {"prompt_ids": [[3], [VOCAB]]}),
        ("prompt 0 has an id outside", {"prompt_ids": [[-1], [3]]}),
        ("prompt 1: 0 old tokens \\+ 90 .* 96 positions", {"prompt_ids": [[3], [3] * 90]}),
        ("max_new_tokens=0", {"max_new_tokens": 0}),
        ("group_size=0", {"group_size": 0}),
        ("temperature is -1", {"temperature": -1}),
        ("seeds must be 4 integers", {"seeds": [1, 2, 3], "group_size": 2}),
        ("seeds must be 2 integers", {"seeds": [0.5, 0.7]}),
    ],
)
def test_errors_of_generate(tiny, tokenizer, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments = {"prompt_ids": [[3], [4]], "max_new_tokens": 7, **arguments}
        Sampler(tiny("llama"), tokenizer).generate(**arguments)


def test_a_rank_without_prompts_has_a_rollout_without_rows(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer)
    first = sampler.generate([], 4, max_new_tokens=7, seeds=[])
    second = sampler.extend(first, [], 2, max_new_tokens=7)
    assert second.ids.shape == second.action_mask.shape == (0, 1) and second.stopped.shape == (0, 2)
    assert second.last_ids() == second.completion_ids(1) == []


def test_a_row_keeps_the_index_of_the_prompt_that_it_began_with(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer)
    first, second, third = three_turns(sampler)
    assert first.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert second.prompt_index.tolist() == [4, 4, 0, 0, 1, 1, 2, 2, 4, 4, 1, 1]
    assert third.prompt_index.tolist() == second.prompt_index.tolist()
    assert third.parents.tolist() == list(range(12))
    given = rollout_of([[[5, 6], [7, EOS]]] * 3, 1, sampler, torch.tensor([2, 0, 0]), [7, 8, 9])
    assert given.prompt_index.tolist() == [2, 0, 0]
    more = sampler.extend(given, [[4]] * 2, 2, rows=[1, 0], max_new_tokens=3, seeds=range(4))
    assert more.prompt_index.tolist() == [0, 0, 2, 2] and more.parents.tolist() == [1, 1, 0, 0]
    assert sampler.generate([], max_new_tokens=3).prompt_index.tolist() == []


@pytest.mark.parametrize("turns", [1, 2])
def test_without_a_cache_of_its_own_a_conversation_is_encoded_anew(tokenizer, turns):
    """Against `generate` on the whole conversation, whose bookkeeping is of one turn."""
    model, other = (build(tf.LlamaConfig, initializer_range=r) for r in (0.2, 0.3))
    maker, sampler = Sampler(model, tokenizer, max_batch=3, block=2), Sampler(other, tokenizer)
    before, limits = three_turns(maker)[turns - 1], {"max_new_tokens": 5, "temperature": 0.8}
    rows, more, seeds = [4, 0, 7, 4], [[4], [5, 6], [7, 8, 9], [4]], [*range(100, 108)]
    said = [before.row_ids()[row] + ids for row, ids in zip(rows, more, strict=True)]
    plain = sampler.generate(said, 2, seeds=seeds, **limits)
    freed = replace(before, cache=None)
    for rollout in (before, freed):
        after = sampler.extend(rollout, more, 2, rows=rows, seeds=seeds, **limits)
        for name in ("ids", "action_mask", "logprobs", "lengths", "seeds"):
            assert torch.equal(getattr(after, name), getattr(plain, name))
        parents = torch.tensor(rows).repeat_interleave(2)
        assert torch.equal(after.parents, parents)
        assert torch.equal(after.prompt_index, before.prompt_index[parents])
        stopped = torch.cat([before.stopped[parents], plain.stopped], 1)
        assert torch.equal(after.stopped, stopped) and stopped.shape == (8, turns + 1)
        for r, parent in enumerate(parents.tolist()):
            old, length = before.lengths[parent], after.lengths[r]
            assert torch.equal(after.turn[r, :old], before.turn[parent, :old])
            assert (after.turn[r, old:length] == turns).all() and (after.turn[r, length:] < 0).all()
            assert after.action_mask[r].nonzero()[0] == old + len(more[r // 2])
        for seed, row in zip(seeds, after.completion_ids(turns), strict=True):
            assert row == plain.completion_ids(0)[seed - 100]
        # with a cache of its own it goes on as any other
        one, two = (sampler.extend(r, [[6, 10]] * 8, **limits) for r in (after, plain))
        for name in ("ids", "action_mask", "logprobs", "lengths", "seeds"):
            assert torch.equal(getattr(one, name), getattr(two, name))
    sampled = sampler.extend(before, more, rows=rows, seeds=seeds[:4], max_new_tokens=1)
    assert sampled.stopped.shape == (4, turns + 1)  # no row as long as the longest one before


def test_a_cache_belongs_to_a_model_and_with_ones_own_seeds_derive_from_the_parents(tokenizer):
    model, limits = build(tf.LlamaConfig), {"max_new_tokens": 5}
    first = Sampler(model, tokenizer).generate(PROMPTS, 2, **limits)
    assert first.cache.owner is model
    more = [[4, 6]] * 10
    once = Sampler(model, tokenizer).extend(first, more, **limits)
    again = Sampler(model, tokenizer).extend(first, more, seeds=[0] * 10, **limits)
    assert equal(once, again) and once.cache.owner is model
    with pytest.raises(ValueError, match="cache is another model's: give `seeds`, one for each"):
        Sampler(build(tf.LlamaConfig), tokenizer).extend(first, more, **limits)
    freed = replace(first, cache=None)
    with pytest.raises(ValueError, match="seeds must be 10 integers"):
        Sampler(model, tokenizer).extend(freed, more, seeds=[1, 2], **limits)
    with pytest.raises(ValueError, match="prompt 3 is empty"):
        more = [*more[:3], [], *more[4:]]
        Sampler(model, tokenizer).extend(freed, more, seeds=range(10), **limits)
    none = Sampler(model, tokenizer).extend(freed, [], rows=[], **limits)
    assert none.ids.shape == (0, 1) and none.stopped.shape == (0, 2)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("more_prompt_ids has 1", {"more_prompt_ids": [[3]]}),
        ("has rows 0..1 only", {"rows": [0, 2]}),
        ("has rows 0..1 only", {"rows": [0, -1]}),
        ("prompt 1 is empty", {"more_prompt_ids": [[3], []]}),
        ("prompt 0: .* 96 positions", {"more_prompt_ids": [[3] * 84, [3]]}),
        ("max_new_tokens=0", {"max_new_tokens": 0}),
        (
            "cache was freed: keep it until the last turn, or give `seeds`, one",
            {"rollout": "freed"},
        ),
    ],
)
def test_errors_of_extend(tiny, tokenizer, message, arguments):
    sampler = Sampler(tiny("llama"), tokenizer)
    rollout = sampler.generate([[3], [4]], max_new_tokens=7)
    if "rollout" in arguments:
        arguments, rollout.cache = {}, None
    with pytest.raises(ValueError, match=message):
        sampler.extend(rollout, **{"more_prompt_ids": [[3], [4]], "max_new_tokens": 7, **arguments})


def test_the_last_position_can_be_used(tiny, tokenizer):
    sampler = Sampler(tiny("llama"), tokenizer)
    rollout = sampler.generate([[3] * 86, [4]], 8, max_new_tokens=10)
    check(tiny("llama"), rollout)
    assert rollout.lengths.max() == 96


WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
MOE["moe_intermediate_size"] = 16
UNTOLD = WINDOWED | MOE | {"use_sliding_window": True}
CHUNKED = {"attention_chunk_size": 4, "intermediate_size_mlp": 16}
REFUSED = {
    "softcap": (tf.Gemma2Config, WINDOWED),
    "s_aux": (tf.GptOssConfig, WINDOWED | MOE),
    "chunked_attention": (tf.Llama4TextConfig, CHUNKED | MOE),
    "is not told its sliding window": (tf.Qwen2MoeConfig, UNTOLD),
    "bidirectional": (tf.Gemma3TextConfig, {"use_bidirectional_attention": True}),
    "recurrent": (tf.MambaConfig, {}),
    "keeps to its own": (tf.BloomConfig, {"n_head": 4}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_it_would_be_wrong_for_is_refused(tokenizer, reason):
    config_class, options = REFUSED[reason]
    model = build(config_class, **options)
    with pytest.raises(ValueError, match=f"(can't be sampled from|is not supported).*{reason}"):
        Sampler(model, tokenizer)
    assert model.config._attn_implementation == "eager"


def test_an_encoder_decoder_is_refused(tokenizer):
    config = tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = tf.T5ForConditionalGeneration(config)
    message = "T5ForConditionalGeneration can't .*: it is an encoder-decoder"
    with pytest.raises(ValueError, match=message):
        Sampler(model, tokenizer)


def test_longrope_is_refused_where_one_row_would_change_another(tokenizer):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["rope_theta"] = 1e4
    model = build(tf.Phi3Config, rope_parameters=rope, original_max_position_embeddings=32)
    sampler = Sampler(model, tokenizer)
    check(model, sampler.generate([[3] * 20, [4]], 4, max_new_tokens=12))
    with pytest.raises(ValueError, match="exceed 32 positions"):
        sampler.generate([[3] * 20, [4]], max_new_tokens=13)


def test_uniforms_are_uniform_and_independent_across_seeds_and_positions():
    u = uniform(torch.arange(-500, 500)[:, None], torch.arange(1000))
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() > 900_000
    for bins in (u, u.T):  # each seed's and each position's own thousand
        counts = torch.stack([torch.histc(row, 20, 0, 1) for row in bins])
        chi2 = ((counts - 50) ** 2 / 50).sum(1)  # 19 degrees of freedom: mean 19, sd 6.2
        assert abs(chi2.mean() - 19) < 1 and chi2.max() < 60
    z = (u - 0.5) * 12**0.5
    lags = [z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z[1:, 1:] * z[:-1, :-1], z[1:, :-1] * z[:-1, 1:]]
    assert all(abs(lag.mean()) < 5e-3 for lag in lags)  # 5 sigma
    tenth = (u * 10).long()
    cells = (tenth[:, :-1] * 10 + tenth[:, 1:]).flatten().bincount(minlength=100)
    assert ((cells - 9990) ** 2 / 9990).sum() < 99 + 5 * 200**0.5
    bits = (u * 2**23).long()[..., None] >> torch.arange(23) & 1
    assert (bits.float().mean((0, 1)) - 0.5).abs().max() < 3e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature):
    logits = torch.tensor([2.0, -1.0, 0.0, 1.5, -torch.inf, 0.7, -3.0, 0.1])
    n = 200_000
    u = uniform(torch.arange(n), torch.full((n,), 17))
    token, logprob = sample(logits.expand(n, -1), temperature, u)
    exact = (logits / temperature).softmax(-1)
    counts, expected = token.bincount(minlength=8), exact * n
    assert counts[4] == 0
    assert ((counts - expected) ** 2 / expected)[expected > 0].sum() < 30  # 6 degrees of freedom
    assert torch.allclose(logprob, exact.log()[token], atol=1e-6)


@pytest.mark.parametrize("V", [24, 256, 257, 1000])
def test_the_two_level_search_finds_the_word_of_a_plain_cdf(V):
    logits = torch.randn(300, V, generator=torch.Generator().manual_seed(V)) * 3
    u = torch.rand(300, generator=torch.Generator().manual_seed(1))
    cdf = (logits.double() / 0.8).softmax(-1).cumsum(-1)
    token, logprob = sample(logits, 0.8, u)
    low, high = (x.gather(1, token[:, None])[:, 0] for x in (F.pad(cdf, (1, 0)), cdf))
    assert (low - 1e-6 <= u).all() and (u <= high + 1e-6).all()
    expected = (logits / 0.8).log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)


def test_a_zero_probability_token_is_never_drawn():
    u = torch.tensor([0.0, 2.0**-23, 0.5, 1 - 2.0**-23, 1.0])  # 1: as if the CDF were rounded down
    for possible in ([0], [7], [3], [2, 5], [1, 2, 6]):
        logits = torch.full((5, 8), -torch.inf)
        logits[:, possible] = torch.randn(len(possible))
        for temperature in (1.0, 0.3, 0.0):
            token, logprob = sample(logits, temperature, u)
            assert set(token.tolist()) <= set(possible) and logprob.isfinite().all()
            if temperature:
                assert token[0] == possible[0] and token[3] == possible[-1]


def test_nan_logits_give_nan_logprobs_and_no_id_outside_the_vocabulary():
    token, logprob = sample(torch.full((2, 8), torch.nan), 1.0, torch.tensor([0.0, 0.9]))
    assert (token < 8).all() and logprob.isnan().all()


def test_turns_sampled_tokens_follow_the_models_distribution(tiny, tokenizer):
    """The first token after an instruction, over many children, against the exact probabilities."""
    model = tiny("llama")
    sampler = Sampler(model, tokenizer)
    first = sampler.generate([PROMPTS[1]], max_new_tokens=3)
    second = sampler.extend(first, [[4, 5]], 4000, max_new_tokens=1)
    context = second.ids[0, : second.lengths[0] - 1]
    expected = plain_logits(model, context)[-1].softmax(-1) * 4000
    counts = second.ids[:, -1].bincount(minlength=VOCAB)
    big = expected > 5
    assert ((counts - expected) ** 2 / expected)[big].sum() < big.sum() + 5 * (2 * big.sum()) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_hook_is_told_every_sampled_token_once_and_in_order(tiny, tokenizer, temperature):
    sampler, heard = Sampler(tiny("llama"), tokenizer, max_batch=4, block=3), {}

    def hear(rows, ids):
        for row, new in zip(rows, ids, strict=True):
            heard.setdefault(row, []).extend(new)

    sampler.on_tokens = hear
    limits = [9, 4, 7, 1, 12, 2]
    rollout = sampler.generate(PROMPTS[:3], 2, max_new_tokens=limits, temperature=temperature)
    said = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.action_mask, strict=True)]
    assert [heard[row] for row in range(6)] == said
