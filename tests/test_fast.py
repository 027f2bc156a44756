"""The fast path against the plain one, and its C against torch; skipped where fast/ is deleted."""

import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import sampler as sampler_module
from conftest import TINY, VOCAB, build, check, equal, three_turns
from sampler import Sampler
from sampling.attention import KVCache, ragged_mask

fused = pytest.importorskip("fast.fused")
from fast import paths  # noqa: E402
from fast.cpu_kernels import compiled, linear, linear_in_place, one_query  # noqa: E402

FUSED = ("llama", "llama_mha", "qwen2", "qwen3")
needs_compiler = pytest.mark.skipif(compiled(1, 8) is None, reason="needs a C compiler")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("compiler", [True, False])
def test_the_fused_path_is_taken_where_it_applies_and_samples_what_the_general_one_does(
    tiny, tokenizer, name, compiler, monkeypatch
):
    if not compiler:
        monkeypatch.setattr(fused, "compiled", lambda *sizes: None)
    sampler = Sampler(tiny(name), tokenizer, max_batch=4, block=3, prefill_tokens=8)
    assert sampler.fused == (name in FUSED)
    quick = three_turns(sampler)
    sampler.fused = False
    assert all(equal(a, b) for a, b in zip(quick, three_turns(sampler), strict=True))


def test_the_fused_path_handles_biases_and_bfloat16(tokenizer):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(tf.LlamaConfig, attention_bias=True, mlp_bias=True, initializer_range=0.1)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        sampler = Sampler(model.to(dtype), tokenizer)
        assert sampler.fused
        if dtype == torch.float32:
            check(model, three_turns(sampler)[2])


@needs_compiler
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_the_c_is_used_and_no_longer_if_it_is_wrong(tokenizer, factor, told, monkeypatch):
    real, called = fused.one_query, []
    monkeypatch.setattr(fused, "one_query", lambda *a: called.append(1) or real(*a))
    assert Sampler(build(tf.LlamaConfig), tokenizer).fused and called and told() == []
    monkeypatch.setattr(fused, "one_query", lambda *a: real(*a) * factor)
    model = build(tf.LlamaConfig)
    sampler = Sampler(model, tokenizer)
    assert not sampler.fused and told() == [text(model, WRONG_C)]
    check(model, three_turns(sampler)[2])


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="slower, since cpu_kernels.c can't be compiled"):
        assert compiled.__wrapped__(1, 8) is None


@pytest.fixture
def two_threads():
    """The suite has one, on which no two could get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 130, 300])
@pytest.mark.parametrize("N, K", [(1, 5), (48, 96), (121, 32), (200, 33)])
@pytest.mark.parametrize("linear", [linear, linear_in_place])
def test_products_with_weights_in_c_are_those_in_torch(rows, N, K, linear, two_threads):
    torch.manual_seed(0)
    # x is not contiguous
    x, weight, bias = torch.randn(K, rows).T, torch.randn(N, K), torch.randn(N)
    for b in (bias, None):
        slow = F.linear(x.double(), weight.double(), None if b is None else b.double())
        fast = linear(compiled(1, 8), weight, b)(x[:, None])[:, 0]
        torch.testing.assert_close(fast, slow.float(), atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", FUSED)
def test_of_a_large_models_weights_there_is_no_copy(name, tokenizer, monkeypatch):
    config_class, options = TINY[name]
    model = build(config_class, **options)
    before = three_turns(Sampler(model, tokenizer))
    called, real = [], fused.linear_in_place

    def spy(library, weight, bias):
        called.append(weight.data_ptr())
        return real(library, weight, bias)

    monkeypatch.setattr(fused, "LARGE", 0)
    monkeypatch.setattr(fused, "linear_in_place", spy)
    monkeypatch.setattr(fused, "linear", None)
    sampler = Sampler(model, tokenizer)
    called.clear()
    assert sampler.fused and all(map(equal, before, three_turns(sampler)))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {*called} == {m.weight.data_ptr() for m in linears}


@needs_compiler
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 24), (9, 3, 64), (6, 1, 10)])
# the second's exp overflows without its maximum
@pytest.mark.parametrize("scale, error", [(0.3, 1e-5), (10.0, 1e-3)])
def test_attention_in_c_is_that_in_torch_and_reads_no_further_than_its_own_row(
    heads, kv_heads, size, scale, error, two_threads
):
    torch.manual_seed(0)
    n, group, capacity, angle = 5, heads // kv_heads, 40, torch.rand(5, 1, size)
    positions = torch.tensor([[0], [39], [7], [17], [3]])
    stores = [torch.randn(8, kv_heads, capacity, size) for _ in "kv"]
    joined = torch.randn(n, 1, (heads + 2 * kv_heads) * size)  # queries, keys, values are its views
    parts = joined.split([heads * size, kv_heads * size, kv_heads * size], -1)
    new = [t.view(n, 1, -1, size) for t in parts]
    one, two = KVCache(8, capacity, "cpu"), KVCache(8, capacity, "cpu")
    two.layers[0] = [store.double() for store in stores]
    one.layers[0] = [store.clone() for store in stores]
    for store in one.layers[0]:
        store[2:7].masked_fill_((torch.arange(capacity) > positions)[:, None, :, None], torch.nan)
    for cache in (one, two):
        cache.aim(2, positions, [capacity])
    cos, sin = angle.cos(), angle.sin()
    fast = one_query(compiled(group, size), one, cos, sin, positions, scale, 0, *new)
    signed = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)[:, :, None].double()
    mask = ragged_mask(positions, capacity, group, None, torch.float64)
    wide, cosines = [t.double() for t in new], cos[:, :, None].double()
    slow = fused._attention(two, cosines, signed, mask, scale, 0, *wide)
    torch.testing.assert_close(fast, slow.float(), atol=error, rtol=error)
    for written, store in zip(one.layers[0], two.layers[0], strict=True):
        expected = store.float().where(~written.isnan(), 7.0)
        torch.testing.assert_close(written.nan_to_num(7.0), expected)


def test_the_fused_path_follows_the_weights_and_yields_to_hooks_and_changed_layers(tokenizer):
    model = build(tf.LlamaConfig)
    sampler = Sampler(model, tokenizer)
    before = three_turns(sampler)[2]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    check(model, three_turns(sampler)[2])
    assert not equal(before, three_turns(sampler)[2])
    called = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
    assert fused.why_not(model) == "model.layers.0.mlp has a hook"
    assert three_turns(sampler) and called
    hook.remove()


class Adapter(torch.nn.Linear):
    pass


STRANGE = "is not transformers' own but of class"
CHANGES = {  # reason: what is done to a Llama
    f"model.layers.0.mlp.up_proj {STRANGE} Adapter": lambda m: setattr(
        m.model.layers[0].mlp, "up_proj", Adapter(32, 48, bias=False)
    ),
    f"lm_head {STRANGE} Adapter": lambda m: setattr(m, "lm_head", Adapter(32, VOCAB, bias=False)),
    f"model.norm {STRANGE} RMSNorm": lambda m: setattr(m.model, "norm", torch.nn.RMSNorm(32)),
    f"model.layers.1.mlp {STRANGE} Sequential": lambda m: setattr(
        m.model.layers[1], "mlp", torch.nn.Sequential(m.model.layers[1].mlp)
    ),
    "the forward method of model.layers.1.mlp is patched": lambda m: setattr(
        m.model.layers[1].mlp, "forward", m.model.layers[1].mlp.forward
    ),
    "lm_head has a hook": lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
}
KNOWN = "is not one of the families that fast/ knows: Llama, Mistral, Qwen2, Qwen3"
WINDOW = "it has a sliding window"
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
OTHERS = {  # reason: config and options
    f"Gemma3 {KNOWN}": TINY["gemma3"],
    f"Phi3 {KNOWN}": TINY["phi3"],
    WINDOW: TINY["mistral_window"],
    "its rope type is dynamic": (tf.LlamaConfig, DYNAMIC),
    "its activation is gelu, not silu": (tf.LlamaConfig, {"hidden_act": "gelu"}),
}
WRONG_C = "the C of fast/cpu_kernels.c computes something else than torch on this machine"
WRONG = "the fast path of fast/fused.py computes something else than the model itself"


@pytest.fixture
def told(monkeypatch):
    """Warnings since they were last asked for, where a compiler is there or said to be."""
    monkeypatch.setattr(paths, "which", lambda name: f"/usr/bin/{name}")
    paths._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def since():
            texts = [str(warning.message) for warning in caught]
            places = {warning.filename for warning in caught}
            assert places <= {__file__}  # where the sampler was made
            caught.clear()
            return texts

        yield since
    paths._warn.cache_clear()


def text(model, reason):
    return f"sampling from {type(model).__name__} takes the plain path, a slower one: {reason}"


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_llama_takes_the_plain_path_and_says_why(tokenizer, told, reason):
    model = build(tf.LlamaConfig)
    assert fused.why_not(model) is None
    CHANGES[reason](model)
    assert fused.why_not(model) == reason
    sampler = Sampler(model, tokenizer)
    assert told() == [text(model, reason)] and not sampler.fused
    check(model, three_turns(sampler)[2])


@pytest.mark.parametrize("reason", OTHERS)
def test_a_model_that_is_not_known_takes_the_plain_path_and_says_why_once(tokenizer, told, reason):
    config_class, options = OTHERS[reason]
    model = build(config_class, **options)
    assert not Sampler(model, tokenizer).fused and not Sampler(model, tokenizer).fused
    assert told() == [text(model, reason)]


@pytest.mark.parametrize("name", FUSED)
def test_nothing_is_said_of_a_plain_llama_and_its_like(tiny, tokenizer, told, name):
    assert Sampler(tiny(name), tokenizer).fused and told() == []


def test_nothing_is_said_where_no_fast_path_was_to_be_expected(tiny, tokenizer, told, monkeypatch):
    bfloat16 = build(tf.Phi3Config).to(torch.bfloat16)
    assert not Sampler(bfloat16, tokenizer).fused and told() == []
    with monkeypatch.context() as patch:
        patch.setattr(paths, "which", lambda name: None)
        assert not Sampler(tiny("phi3"), tokenizer).fused and told() == []
    monkeypatch.setattr(sampler_module, "fast", None)  # as if the folder were deleted
    for name in ("phi3", "llama"):
        sampler = Sampler(tiny(name), tokenizer)
        assert not sampler.fused and not sampler.graphs and told() == []
        check(tiny(name), three_turns(sampler)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_expected_of_any_dtype(dtype, monkeypatch):
    monkeypatch.setattr(paths, "which", lambda name: None)
    paths._warn.cache_clear()
    model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=tf.BloomConfig())
    with pytest.warns(UserWarning) as caught:
        assert paths.tried(model, None, None) == (False, False)
    said = [str(warning.message) for warning in caught]
    assert said == [text(model, f"SimpleNamespace {KNOWN}")]


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_fast_path_that_is_wrong_is_not_taken(tiny, tokenizer, factor, told, monkeypatch):
    norm = fused._norm
    monkeypatch.setattr(fused, "_norm", lambda module: lambda x: factor * norm(module)(x))
    assert not Sampler(tiny("llama"), tokenizer).fused
    assert told() == [text(tiny("llama"), WRONG)]


def test_what_python_leaves_of_a_deleted_folder_is_no_fast_path(tmp_path, monkeypatch):
    left = types.ModuleType("fast")  # as `fast/__pycache__` makes it, a package of nothing
    left.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "fast", left)
    monkeypatch.delitem(sys.modules, "fast.paths")
    spec = importlib.util.spec_from_file_location("slow", sampler_module.__file__)
    slow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slow)
    assert slow.fast is None and sampler_module.fast is not None


def test_one_place_alone_looks_for_the_folder():
    root = Path(__file__).parents[1]
    paths = [p for depth in ("*", "*/*", "*/*/*") for p in root.glob(f"{depth}.py")]
    paths = [p.relative_to(root) for p in paths]
    own = ("test_fast.py", "test_cuda_kernels.py", "test_cuda_update.py")
    paths = [p for p in paths if not p.parts[0].startswith((".", "fast")) and p.name not in own]
    imports = re.compile(r"^ *(from|import) fast\b", re.MULTILINE)
    found = [p.as_posix() for p in paths if imports.search((root / p).read_text())]
    assert found == ["sampler.py"] and len(paths) > 30
