"""The kernels for CUDA against the plain path, in Triton's interpreter (conftest.py); the
bookkeeping of CUDA graphs with the capture replaced. Skipped without Triton."""

import ctypes
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

pytest.importorskip("triton")
pytest.importorskip("fast.fused")
import sampler as sampler_module  # noqa: E402
from conftest import PROMPTS, TINY, build, check, equal, three_turns  # noqa: E402
from fast import cuda_draw, cuda_kernels, cuda_step, fused, paths  # noqa: E402
from sampler import Sampler  # noqa: E402
from sampling import steps  # noqa: E402
from sampling.attention import KVCache, attention_is, ragged_mask  # noqa: E402
from sampling.draws import sample  # noqa: E402
from training import distributed, loop, lora  # noqa: E402
from training.models import cast  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="written for the interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, of 0 / 0
]
FAMILIES = ("llama", "llama_mha", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes a while for each."""
    monkeypatch.setattr(cuda_kernels, "PROGRAMS", 1)


def attend_both_ways(lengths, heads, kv_heads, size, dtype, done):
    """(by the kernel, by the plain path, what each leaves in the cache) for random tensors."""
    torch.manual_seed(0)
    n, capacity, group = len(lengths), (max(lengths) // 8 + 2) * 8, heads // kv_heads
    positions = torch.tensor(lengths)[:, None] - 1
    angle = torch.rand(n, 1, size // 2).repeat(1, 1, 2)  # the same for both halves, as always
    stores = [torch.randn(n, kv_heads, capacity, size).to(dtype) for _ in "kv"]
    joined = torch.randn(n, heads + 2 * kv_heads, size).to(dtype)  # of which rows are views
    q, k, v = joined.split([heads, kv_heads, kv_heads], 1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    one, two = KVCache(n, capacity, "cpu"), KVCache(n, capacity, "cpu")
    one.layers = {1: [store.clone() for store in stores]}
    two.layers = {1: [store.double() for store in stores]}
    for store in one.layers[1]:  # what a row has not, it must not read
        hidden = (torch.arange(one.capacity) >= positions) | done[:, None]
        store.masked_fill_(hidden[:, None, :, None], torch.nan)
    one.layers[0] = stores  # not this layer's
    table = torch.zeros(5, dtype=torch.int64)
    cuda_kernels.fill(table, one)
    place = (cos[:, 0], sin[:, 0], positions[:, 0], done, 0.3)
    fast = cuda_kernels.attend(table, 1, q, k, v, *place)
    two.aim(0, positions, [capacity])
    signed = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)[:, :, None].double()
    mask = ragged_mask(positions, two.width, group, None, torch.float64)
    wide = [x[:, None].double() for x in (q, k, v)]
    slow = fused._attention(two, cos[:, :, None].double(), signed, mask, 0.3, 1, *wide)[:, 0]
    return fast, slow, one.layers[1], two.layers[1]


SIZES = [(64, 7, 1), (128, 4, 2), (64, 1, 1), (24, 8, 1), (80, 20, 1)]  # size, heads, kv_heads
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.003)]


@pytest.mark.parametrize("dtype, error", DTYPES)
@pytest.mark.parametrize("size, heads, kv_heads", SIZES)
@pytest.mark.parametrize("lengths", [(1, 700), (64, 65, 66, 1, 2, 129, 9)])
def test_attention_is_that_of_the_plain_path_and_reads_no_further_than_its_own_row(
    lengths, size, heads, kv_heads, dtype, error
):
    done = torch.arange(len(lengths)) == 4
    fast, slow, written, expected = attend_both_ways(lengths, heads, kv_heads, size, dtype, done)
    torch.testing.assert_close(fast[~done].double(), slow[~done], atol=error, rtol=error)
    assert fast.dtype == dtype and not fast[done].any()
    for store, right in zip(written, expected, strict=True):
        assert store[done].isnan().all()  # nothing written
        store, right = store[~done].double(), right[~done]
        there = ~store.isnan()
        torch.testing.assert_close(store[there], right[there], atol=error, rtol=error)
        assert there[..., 0].sum(2).tolist() == [
            [length] * kv_heads for length, over in zip(lengths, done, strict=True) if not over
        ]


@pytest.mark.parametrize("programs", [1, 64])
def test_a_rows_keys_are_cut_into_parts_or_not_with_the_same_outcome(programs, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "PROGRAMS", programs)
    assert cuda_kernels.parts_of(4) == max(1, programs // 4)
    done = torch.tensor([False, True])
    fast, slow, *_ = attend_both_ways((700, 3), 4, 2, 64, torch.float32, done)
    torch.testing.assert_close(fast[0].double(), slow[0], atol=1e-5, rtol=1e-5)
    assert not fast[1].any()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("size", [5, 64, 1100])
def test_what_stands_between_products_is_what_torch_makes_of_it(size, dtype, error):
    torch.manual_seed(0)
    x, y, weight = (torch.randn(*shape).to(dtype) for shape in ((3, size), (3, size), (size,)))
    total = x + y
    normed = cuda_kernels.add_norm(x, y, weight, 1e-3)
    torch.testing.assert_close(x, total, atol=error, rtol=error)  # the interpreter cuts off
    right = F.rms_norm(total.double(), (size,), weight.double(), 1e-3)
    torch.testing.assert_close(normed.double(), right, atol=error, rtol=error)
    gate_up = torch.randn(3, 2 * size).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    gated = cuda_kernels.gated(gate_up)
    torch.testing.assert_close(gated.double(), F.silu(gate) * up, atol=error, rtol=error)
    assert normed.dtype == gated.dtype == dtype


def drawn_both_ways(logits, temperature, u):
    """(tokens, log-probs) of the kernels and of sampling/draws.py."""
    return cuda_draw.sample(logits, temperature, u), sample(logits, temperature, u)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("words", [3, 256, 257, 5000])
def test_tokens_are_those_of_torchs_draws_with_their_log_probs(words, temperature):
    g = torch.Generator().manual_seed(words)
    logits = 4 * torch.randn(24, words, generator=g)
    ours, right = drawn_both_ways(logits, temperature, torch.rand(24, generator=g))
    assert torch.equal(ours[0], right[0]) and ours[0].dtype == torch.int64
    torch.testing.assert_close(ours[1], right[1], atol=1e-5, rtol=1e-5)


def test_nothing_impossible_is_drawn_at_the_ends_of_the_distribution():
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, [300, 301, 700]] = torch.tensor([0.0, -3.0, 2.0])
    u = torch.tensor([0.0, 1 - 2**-23, 0.5, 1.0])  # the last one as if rounding had lifted it
    (tokens, logprobs), right = drawn_both_ways(logits, 1.0, u)
    assert tokens[0] == 300 and set(tokens.tolist()) <= {300, 301, 700}
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close((tokens, logprobs), right)


def test_of_logits_that_are_no_numbers_a_word_is_drawn_that_exists_and_its_log_prob_tells():
    logits = torch.randn(2, 300)
    logits[0, 7], logits[1, 9] = torch.nan, torch.inf
    tokens, logprobs = cuda_draw.sample(logits, 1.0, torch.full((2,), 0.5))
    assert (tokens < 300).all() and not logprobs.isfinite().any()


def with_kernels(model, tokenizer, **options):
    """A sampler that decodes with them, which on CPU none does by itself."""
    sampler = Sampler(model, tokenizer, **options)
    assert sampler.fused and not sampler.kernels and not sampler.graphs
    sampler.kernels = True
    return sampler


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_samples_with_kernels_what_it_does_without(tiny, tokenizer, name):
    def two_turns(sampler):
        first = sampler.generate(PROMPTS[:2], 2, max_new_tokens=[1, 4, 3, 2])
        return first, sampler.extend(first, [[3, 7]], rows=[2], max_new_tokens=3)

    plain = two_turns(Sampler(tiny(name), tokenizer, max_batch=3, block=3))
    assert all(
        map(equal, plain, two_turns(with_kernels(tiny(name), tokenizer, max_batch=3, block=3)))
    )


def test_a_first_step_needs_no_cache_to_be_there(tiny, tokenizer):
    ask = {"prompt_ids": [[5]], "max_new_tokens": 4}
    plain = Sampler(tiny("llama"), tokenizer).generate(**ask)
    assert equal(plain, with_kernels(tiny("llama"), tokenizer).generate(**ask))


def step_error(model, adapters=None):
    """Largest difference of a step's logits from the fused forward pass's, by the largest logit."""
    ids = torch.tensor([[5, 6, 7, 8]]).repeat(3, 1) + torch.arange(3)[:, None]
    last, logits = torch.full((3,), 3), []
    for kernels in (True, False):
        cache, forward = KVCache(3, 8, "cpu"), fused.fuse(model, adapters)
        cache.aim(0, torch.arange(3).repeat(3, 1), [3])
        forward(cache, ids[:, :3], torch.arange(3).repeat(3, 1))
        if kernels:
            step = cuda_step.step_of(model, adapters, {})
            step.aim(cache)
            logits.append(step.run(ids[:, 3], last, torch.zeros(3, dtype=torch.bool)))
        else:
            cache.aim(0, last[:, None], [4])
            logits.append(forward(cache, ids[:, 3:], last[:, None]))
    return ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()


@pytest.mark.parametrize("config_class", [tf.LlamaConfig, tf.Qwen3Config])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_step_handles_biases_norms_adapters_and_bfloat16(config_class, dtype, error):
    more = {"mlp_bias": True} if config_class is tf.LlamaConfig else {}
    with torch.no_grad():
        model = build(config_class, attention_bias=True, initializer_range=0.1, **more)
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        cast(model, dtype)
        adapters = lora.make(model, 3, seed=0)
        plain = fused.fuse(model)
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.3)
        assert step_error(model) < error and step_error(model, adapters) < error
        cache, ids = KVCache(1, 2, "cpu"), torch.arange(2)[None]
        cache.aim(0, ids, [2])
        changed = fused.fuse(model, adapters)(cache, ids, ids) - plain(cache, ids, ids)
        assert changed.abs().max() > 0.1  # so adapters count


def test_weights_are_joined_where_they_are_and_once(tmp_path):
    model, reference = build(tf.Qwen2Config), build(tf.Qwen2Config)
    cuda_step.step_of(model, None, {})
    attention = model.model.layers[1].self_attn
    q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    assert q.data_ptr() + q.nbytes == k.data_ptr() and k.data_ptr() + k.nbytes == v.data_ptr()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)
    where = [parameter.data_ptr() for parameter in model.parameters()]
    for parameter in reference.parameters():
        parameter.data.mul_(2)
    distributed.gather_weights(reference, model)  # as after an update
    assert step_error(model) < 1e-5
    assert where == [parameter.data_ptr() for parameter in model.parameters()]
    model.save_pretrained(tmp_path)
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for one, other in zip(saved.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


def attend_in_torch(table, layer, query, key, value, cos, sin, position, idle, scale):
    """`cuda_kernels.attend`, by the same addresses, and faster than the interpreter. float32."""
    out, (heads, size), kv_heads = torch.zeros_like(query), query.shape[1:], key.shape[1]
    capacity = int(table[-1])
    half = size // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], 1)[:, None]
    query, key = (x * cos[:, None] + x.roll(half, -1) * sin for x in (query, key))
    for row in (~idle).nonzero()[:, 0].tolist():
        stores, place = [], int(position[row])
        for address, new in zip(
            table[2 * layer : 2 * layer + 2].tolist(), (key, value), strict=True
        ):
            floats = kv_heads * capacity * size
            memory = (ctypes.c_float * floats).from_address(address + 4 * floats * row)
            store = torch.frombuffer(memory, dtype=torch.float32).view(kv_heads, capacity, size)
            store[:, place] = new[row]
            stores.append(store[:, : place + 1].repeat_interleave(heads // kv_heads, 0))
        scores = (scale * query[row, :, None] @ stores[0].mT).softmax(-1)
        out[row] = (scores @ stores[1])[:, 0]
    return out.flatten(1)


def add_norm_in_torch(x, y, weight, eps):
    return F.rms_norm(x.add_(y), weight.shape, weight, eps)


def gated_in_torch(gate_up):
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up


@pytest.fixture
def in_torch(monkeypatch):
    for name in ("attend", "add_norm", "gated"):
        monkeypatch.setattr(cuda_step, name, globals()[f"{name}_in_torch"])


@contextmanager
def captured(sampler, monkeypatch):
    """Steps as a CUDA graph has them: replayed with what was at hand when they were captured.

    Yields the numbers of rows of what was captured, and of how many replays each has had.
    """
    rows, replays = [], []

    def capture(_, step):
        then, number = (sampler.fast_step, sampler.is_stop), len(rows)
        rows.append(len(step.args[-1].done))
        replays.append(0)

        def replay():
            now = sampler.fast_step, sampler.is_stop
            sampler.fast_step, sampler.is_stop = then
            step()
            sampler.fast_step, sampler.is_stop = now
            replays[number] += 1

        return replay

    with monkeypatch.context() as patch:
        patch.setattr(steps.Graphs, "capture", capture)
        sampler.graphs = True
        yield rows, replays


LONG = {"prompt_ids": [[5, 7] * 55, [6] * 90], "max_new_tokens": [40, 20, 30, 9], "group_size": 2}


@pytest.mark.parametrize("max_batch", [3, 256])
def test_steps_that_are_replayed_sample_the_same_from_any_cache(
    tokenizer, max_batch, monkeypatch, in_torch
):
    """All of it but the graphs: rows that are none, one place for a state, caches that grow."""
    monkeypatch.setattr(cuda_step, "sample", sample)  # drawn by torch: a thousand draws take long
    monkeypatch.setattr(sampler_module, "room_for", lambda tokens, limit: tokens)
    model = build(tf.LlamaConfig, max_position_embeddings=400)
    sampler = with_kernels(model, tokenizer, max_batch=max_batch, block=5)
    sampler.is_stop[:], sampler.kernels = False, False
    plain = [*three_turns(sampler), sampler.generate(**LONG), sampler.generate(**LONG)]
    sampler.kernels = True
    with captured(sampler, monkeypatch) as (rows, replays):
        again = [*three_turns(sampler), sampler.generate(**LONG)]
        first = len(rows)
        again.append(sampler.generate(**LONG))
    assert all(map(equal, plain, again)) and len(rows) == first  # the second time nothing is
    assert all(replays) and {*rows} <= {1, 8, 16} and len({*rows}) == len(rows)


def test_what_occurs_once_is_not_captured(tiny, tokenizer, monkeypatch, in_torch):
    sampler = with_kernels(tiny("llama"), tokenizer, block=8)
    sampler.is_stop[:] = False
    with captured(sampler, monkeypatch) as (rows, replays):
        sampler.generate([[5, 6]], max_new_tokens=8)
        assert rows == []
        sampler.generate([[5, 6]], max_new_tokens=3)
        sampler.generate([[5, 6]], max_new_tokens=3, temperature=0)  # another graph
        assert rows == [1] and replays == [3]


def test_graphs_follow_weights_and_adapters_and_go_where_these_have_moved(
    tokenizer, monkeypatch, in_torch
):
    model = build(tf.LlamaConfig)
    sampler, ask = with_kernels(model, tokenizer, block=5), {"prompt_ids": [[5, 6]]}
    ask["max_new_tokens"] = 5
    sampler.adapters = lora.make(model, 2, seed=0)

    def fresh():
        other = Sampler(model, tokenizer)
        other.adapters = sampler.adapters
        return other.generate(**ask)

    with captured(sampler, monkeypatch) as (rows, _), torch.no_grad():
        sampler.generate(**ask)
        assert equal(sampler.generate(**ask), before := fresh()) and rows == [1]
        for adapter in sampler.adapters.values():
            adapter.B.normal_()
        assert equal(sampler.generate(**ask), fresh()) and not equal(before, fresh())
        model.model.layers[1].mlp.up_proj.weight.neg_()
        assert equal(sampler.generate(**ask), fresh()) and rows == [1]
        model.model.norm.weight.data = -model.model.norm.weight.data
        assert equal(sampler.generate(**ask), fresh()) and rows == [1]  # as it is, to warm up
        assert equal(sampler.generate(**ask), fresh()) and rows == [1, 1]


@pytest.mark.parametrize("what", ["adapters off", "another rank", "stops"])
def test_graphs_go_where_anything_that_they_read_is_another(tokenizer, what, monkeypatch, in_torch):
    model = build(tf.LlamaConfig)
    sampler, ask = with_kernels(model, tokenizer, block=5), {"prompt_ids": [[5, 6]]}
    ask["max_new_tokens"] = 5
    sampler.adapters, sampler.is_stop[:] = lora.make(model, 2, seed=0), False
    for adapter in sampler.adapters.values():
        torch.nn.init.normal_(adapter.B)

    def fresh():
        other = Sampler(model, tokenizer)
        other.adapters, other.is_stop = sampler.adapters, sampler.is_stop
        return other.generate(**ask)

    def change():
        if what == "adapters off":
            sampler.adapters = None
        elif what == "another rank":
            sampler.adapters = lora.make(model, 3, seed=1)
        else:
            sampler.is_stop = torch.ones_like(sampler.is_stop)

    with captured(sampler, monkeypatch) as (rows, _), torch.no_grad():
        for _ in range(2):
            sampler.generate(**ask)
        before, _ = fresh(), change()
        assert rows == [1] and equal(sampler.generate(**ask), fresh())
        assert equal(again := sampler.generate(**ask), fresh()) and not equal(before, again)


def test_a_step_that_can_not_be_captured_is_run_as_it_is_and_it_says_so(tiny, tokenizer, in_torch):
    sampler, ask = with_kernels(tiny("llama"), tokenizer), {"prompt_ids": [[5]]}
    plain = Sampler(tiny("llama"), tokenizer).generate(**ask, max_new_tokens=9)
    sampler.graphs = True  # without a GPU
    with pytest.warns(UserWarning, match="can't be a CUDA graph, and is launched each time"):
        assert equal(plain, sampler.generate(**ask, max_new_tokens=9))


def test_blocks_may_change_their_length_while_there_are_graphs(
    tiny, tokenizer, monkeypatch, in_torch
):
    sampler, ask = with_kernels(tiny("llama"), tokenizer, block=2), {"prompt_ids": [[5]]}
    plain = Sampler(tiny("llama"), tokenizer).generate(**ask, max_new_tokens=9)
    with captured(sampler, monkeypatch):
        for sampler.block in (2, 5, 2):
            assert equal(plain, sampler.generate(**ask, max_new_tokens=9))


def test_rows_are_rounded_up_to_few_sizes():
    sizes = {1: 1, 2: 8, 8: 8, 9: 16, 33: 64, 64: 64, 65: 96, 97: 128, 129: 192, 193: 256, 257: 384}
    assert {rows: steps.Graphs.rounded(rows) for rows in sizes} == sizes


@pytest.mark.parametrize("reason", [None, "it is Tuesday"])
def test_on_a_gpu_kernels_and_graphs_are_taken_or_it_says_why_not(reason, tokenizer, monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(fused, "why_not", lambda model: None)
    monkeypatch.setattr(fused, "why_wrong", lambda *arguments: None)
    monkeypatch.setattr(paths, "why_no_kernels", lambda *arguments: reason)
    paths._warn.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert paths.tried(gpu, None, None) == (True, reason is None)
    start = "decoding with SimpleNamespace is slower, without kernels and CUDA graphs: "
    assert [str(w.message) for w in said] == ([start + reason] if reason else [])
    monkeypatch.setattr(Sampler, "_try_out", lambda self: (True, reason is None))
    sampler = Sampler(build(tf.LlamaConfig), tokenizer)
    assert sampler.fused and sampler.kernels == sampler.graphs == (reason is None)


@pytest.mark.parametrize("graphs", [True, False])
def test_an_update_leaves_weights_where_graphs_find_them(graphs, monkeypatch):
    monkeypatch.setattr(distributed, "together", lambda: True)
    monkeypatch.setattr(loop, "hand_over", lambda scorer, sampler: None)
    sampler = SimpleNamespace(model=build(tf.LlamaConfig), graphs=graphs)
    with loop.given_up(SimpleNamespace(adapters=None), sampler):
        assert all(parameter.numel() > 0 for parameter in sampler.model.parameters()) == graphs


def test_attention_of_cudnn_is_off_while_a_model_attends_by_ours_and_no_longer():
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with attention_is(build(tf.LlamaConfig), "ragged"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_model_with_a_window_has_no_kernels(tiny, tokenizer):
    config_class, options = TINY["qwen2_window"]
    sampler = Sampler(build(config_class, **options), tokenizer)
    sampler.kernels = True  # asked for, and not to be had
    check(sampler.model, three_turns(sampler)[2])


def whats_wrong(model):
    ids = torch.arange(2)[None]
    with torch.no_grad():
        return paths.why_no_kernels(model, ids, model(ids).logits[:, -1])


def test_kernels_that_are_wrong_or_fail_are_not_taken_and_it_says_why(tiny, monkeypatch):
    model = tiny("llama")
    assert whats_wrong(model) is None
    wrong = "fast/cuda_kernels.py computes something else than the model itself"
    for factor in (1.5, float("nan")):
        monkeypatch.setattr(cuda_step, "gated", lambda x, f=factor: f * cuda_kernels.gated(x))
        assert whats_wrong(model) == wrong
    monkeypatch.setattr(cuda_step, "gated", cuda_kernels.gated)
    own, wrong = cuda_draw.sample, "fast/cuda_draw.py draws something else than sampling/draws.py"
    for change in ((1, 0.0), (0, 0.1)):  # of tokens, of log-probs
        monkeypatch.setattr(
            cuda_step, "sample", lambda *a, c=change: [x + y for x, y in zip(own(*a), c)]
        )
        assert whats_wrong(model) == wrong
    monkeypatch.setattr(cuda_step, "gated", lambda x: 1 / 0)
    said = "a kernel of fast/ for CUDA fails: ZeroDivisionError: division by zero"
    assert whats_wrong(model) == said
    monkeypatch.setitem(sys.modules, "fast.cuda_step", None)
    assert whats_wrong(model).startswith("Triton, which comes with torch for CUDA, can't be")


COMPILE = r"""
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fast import cuda_draw as draw, cuda_kernels as kernels, cuda_loss as loss
from fast import cuda_update as update

def compiled(kernel, arguments, **constants):
    types = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for number, kind in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
    shapes = dict(KV_HEADS=2, GROUP=7, HALF=32, PARTS=4, HEADS=16, TILE=32, WIDE=64, BLOCK=32)
    shapes["KIND"] = kind
    pointers = {k: f"*{number}" for k in ("query", "key", "value", "cos", "sin")}
    pointers |= {"position": "*i64", "idle": "*i1", "table": "*i64", "out": "*fp32"}
    numbers = {k: "i32" for k in ("query_row", "key_row", "value_row", "layer", "layers")}
    pointers |= {"weight": "*fp32", "scale": "fp32"}
    ptx = compiled(kernels._attend, pointers | numbers, **shapes)
    print(number, *sorted({*re.findall(r"cp\.async\.c\S+ .*, (0x\w+),", ptx)}))
    row = {"SIZE": 896, "WIDE": 1024}
    parts = {"answers": "*fp32", "weights": "*fp32", "out": f"*{number}"}
    compiled(kernels._join, parts, **row, PARTS=4)
    four = {k: f"*{number}" for k in ("x", "y", "weight", "out")}
    compiled(kernels._add_norm, four | {"eps": "fp32"}, **row)
    compiled(kernels._gated, {"gate_up": f"*{number}", "out": f"*{number}"}, **row)
    flat = {**dict.fromkeys(("gate", "up", "out"), f"*{number}"), "size": "i32"}
    compiled(update._gate, flat, BLOCK=1024)
    five = dict.fromkeys(("gate", "up", "grad", "of_gate", "of_up"), f"*{number}")
    compiled(update._gate_gradient, five | {"size": "i32"}, BLOCK=1024)
    for reference in (True, False):
        logits = dict.fromkeys(("logits", "ref_logits"), "*fp32") | {"tokens": "*i64"}
        numbers = {"count": "i32", "temperature": "fp32", "V": "i32"}
        sizes = {"REFERENCE": reference, "BLOCK": loss.BLOCK}
        compiled(loss._score_row, logits | {"out": "*fp32"} | numbers, **sizes)
        slopes = dict.fromkeys(("out", "of_logprob", "of_kl"), "*fp32") | {"grad": f"*{number}"}
        compiled(loss._gradient, logits | slopes | numbers, **sizes)

numbers = {"temperature": "fp32", "V": "i32", "blocks": "i32"}
blocks = dict.fromkeys(("logits", "peaks", "masses"), "*fp32")
compiled(draw._weigh, blocks | numbers, SIZE=256, TOGETHER=16)
blocks |= {"draws": "*fp32", "tokens": "*i64", "logprobs": "*fp32"}
for greedy in (True, False):
    compiled(draw._pick, blocks | numbers, SIZE=256, WIDE=1024, GREEDY=greedy)
"""


def test_the_compiler_takes_them_for_a_gpu_and_reads_the_cache_in_wide_words():
    """What the interpreter lets pass need not compile; and words of 16 bits are slow to read."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "bf16 0x10\nfp32 0x10\n", done.stderr[-2000:]
