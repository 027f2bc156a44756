"""Adapters: their gradient, that they change nothing before an update, their files, whole runs."""

import copy
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import helpers
import loss
import score
import tiny as embedded
from sampler import Sampler
from sampling.adapters import ALPHA, adapted
from test_policy import made_up_rollout, small_llama
from training import announce, checkpoint, distributed, lora, models, policy
from training.fitting import speaks_as_embedded
from training.flags import parse_args
from training.scorer import Scorer

RANK = 3
RATE = ("--lora_rank", f"{RANK}", "--lr", "0.03", "--warmup", "1")


def filled(model, rank=RANK, seed=1):
    """Adapters that add something: B is zero no longer."""
    adapters, generator = lora.make(model, rank, seed), torch.Generator().manual_seed(seed)
    for adapter in adapters.values():
        adapter.B.data.normal_(std=0.1, generator=generator)
    return adapters


def merged_copy(model, adapters):
    model = copy.deepcopy(model)
    for name, weight in lora.merged(model, dict(adapters.named_parameters())):
        model.get_parameter(name).data.copy_(weight)
    return model


def made_up_batch():
    rollout, generator = made_up_rollout(), torch.Generator().manual_seed(0)
    per_turn = torch.randn(len(rollout.ids), 2, generator=generator, dtype=torch.float64)
    coef = torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(len(per_turn), 2)
    spread = (loss.spread(x, rollout) for x in (per_turn, coef))
    return policy.Batch(rollout, *spread, len(per_turn), {})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_all_weights_projected_on_the_adapters(checkpointing):
    """dL/dA = s B^T G and dL/dB = s G A^T, with G = dL/dW at W + s B A."""
    model, batch, config = small_llama().double(), made_up_batch(), score.Config()
    adapters = filled(model).double()
    full = copy.deepcopy(model)
    for layer, adapter in adapters.by_layer(full).items():
        layer.weight.data += ALPHA / RANK * adapter.B.data @ adapter.A.data
    whole = Scorer(full, copy.deepcopy(model), chunk=5)
    beside = Scorer(model, model, adapters, chunk=5, checkpointing=checkpointing)
    expected, found = (policy.accumulate_gradients(s, batch, config)[1] for s in (whole, beside))
    assert found == pytest.approx(expected, abs=1e-10)
    for layer, adapter in adapters.by_layer(full).items():
        G, s = layer.weight.grad, ALPHA / RANK
        torch.testing.assert_close(adapter.A.grad, s * adapter.B.T @ G, atol=1e-10, rtol=0)
        torch.testing.assert_close(adapter.B.grad, s * G @ adapter.A.T, atol=1e-10, rtol=0)
        assert adapter.A.grad.abs().max() > 1e-4
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_any_update_policy_and_reference_are_equal_bit_for_bit(dtype):
    model, rollout = random_model().to(dtype), made_up_rollout()
    scorer = Scorer(model, model, lora.make(model, RANK, 0))
    scores = scorer(rollout.ids, rollout.action_mask)
    assert torch.equal(scores.logprobs, scores.ref_logprobs) and not scores.kl.any()
    plain = Scorer(model)(rollout.ids, rollout.action_mask)
    assert torch.equal(scores.logprobs, plain.logprobs) and plain.logprobs.any()


def random_model():
    torch.manual_seed(0)
    return embedded.build_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_no_product_for_its_gradient(dtype):
    M, H, V = 6, 8, 40
    hidden = torch.randn(M, H, dtype=dtype, requires_grad=True)
    flops = []
    for trained in (True, False):
        head = torch.randn(V, H, dtype=dtype, requires_grad=trained)
        logits = loss.logits_of(hidden, head).sum()
        with FlopCounterMode(display=False) as counter:
            logits.backward()
        flops.append(counter.get_total_flops())
    assert flops == [2 * 2 * M * V * H, 2 * M * V * H]


def test_weights_beside_adapters_are_frozen_without_a_reference_too():
    model = random_model()
    scorer = Scorer(model, None, filled(model))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(weight.requires_grad for weight in scorer.trained.parameters())


def test_held_adapters_are_the_reference_and_do_not_move():
    model, rollout = random_model(), made_up_rollout()
    scorer = Scorer(model, model, filled(model), lora.make(model, RANK, 0))
    before = scorer(rollout.ids, rollout.action_mask)
    scorer.hold()
    after = scorer(rollout.ids, rollout.action_mask)
    assert before.kl.abs().max() > 1e-4 and not after.kl.any()
    assert torch.equal(after.ref_logprobs, after.logprobs)
    after.logprobs.sum().backward()
    assert all(weight.grad is None for weight in scorer.ref_adapters.parameters())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_the_sampler_samples_from_the_weights_with_their_adapters(tiny, tokenizer, name, fast):
    model = tiny(name)
    adapters = filled(model)
    samplers = [Sampler(m, tokenizer) for m in (model, merged_copy(model, adapters))]
    for sampler in samplers:
        sampler.fused = sampler.fused and fast
    samplers[0].adapters = adapters
    (ours, merged) = (two_turns(sampler) for sampler in samplers)
    assert torch.equal(ours.ids, merged.ids)
    torch.testing.assert_close(ours.logprobs, merged.logprobs, atol=1e-4, rtol=0)
    samplers[0].adapters = None
    assert (two_turns(samplers[0]).logprobs - ours.logprobs).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_fast_path_has_the_adapters_of_the_plain_one_in_bfloat16_too(tiny, tokenizer, name):
    model = copy.deepcopy(tiny(name)).to(torch.bfloat16)
    sampler = Sampler(model, tokenizer)
    sampler.adapters, found = filled(model), []
    for fused in (sampler.fused, False):
        sampler.fused = fused
        found.append(sampler.generate([[5], [7, 3, 9]], 3, max_new_tokens=1, temperature=0.0))
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, atol=0.05, rtol=0)


def two_turns(sampler):
    first = sampler.generate([[5], [7, 3, 9]], 3, max_new_tokens=8)
    return sampler.extend(first, [[4, 6]] * 6, 2, max_new_tokens=8)


def test_adapters_do_not_go_on_from_the_cache_of_the_model_without_them(tiny, tokenizer):
    model = tiny("llama")
    sampler, base = Sampler(model, tokenizer), Sampler(model, tokenizer)
    sampler.adapters = filled(model)
    first = base.generate([[5], [7, 3, 9]], max_new_tokens=8)
    with pytest.raises(ValueError, match="another model's"):
        sampler.extend(first, [[4], [4]], max_new_tokens=4)
    again = sampler.extend(first, [[4], [4]], max_new_tokens=4, seeds=[1, 2])
    assert not (again.action_mask & (again.turn == 0)).any()


# Their files


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def saved(base_dir, tmp_path_factory):
    """(a directory of adapters, the base model, the adapters)"""
    model, _ = models.load_model(base_dir)
    adapters, path = filled(model), tmp_path_factory.mktemp("adapters") / "checkpoint"
    tensors = {name: weight.detach() for name, weight in adapters.named_parameters()}
    lora.save(tensors, path, base_dir, models.fingerprint(model))
    return path, model, adapters


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


def test_peft_loads_what_is_saved_and_has_the_same_logits(saved, base_dir):
    peft = pytest.importorskip("peft")
    path, model, adapters = saved
    theirs = peft.PeftModel.from_pretrained(models.load_model(base_dir)[0], path)
    with adapted(model, adapters):
        ours = logits_of(model)
    torch.testing.assert_close(logits_of(theirs), ours, atol=1e-5, rtol=0)
    assert (ours - logits_of(model)).abs().max() > 0.1


def test_a_directory_of_adapters_is_a_model_with_its_tokenizer(saved, base_dir):
    path, model, adapters = saved
    loaded, tokenizer = models.load_model(str(path))
    with adapted(model, adapters):
        torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)
    assert tokenizer.get_vocab() == models.load_model(base_dir)[1].get_vocab()


def test_a_base_that_moved_is_named_and_another_one_is_refused(saved, base_dir, tmp_path):
    path = tmp_path / "travelled"
    shutil.copytree(saved[0], path)
    config = json.loads((path / lora.CONFIG).read_text())
    gone = str(tmp_path / "gone")
    (path / lora.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": gone}))
    with pytest.raises(ValueError, match=f"adapters of {gone}; give --base DIR"):
        models.load_model(str(path))
    loaded, _ = models.load_model(str(path), base=base_dir)
    assert torch.equal(logits_of(loaded), logits_of(models.load_model(str(saved[0]))[0]))
    with pytest.raises(ValueError, match="belongs to another base model"):
        models.load_model(str(path), base="models/tiny")


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"peft_type": "LOHA"},
    {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}},
    {"init_lora_weights": "pissa"},
])  # fmt: skip
def test_adapters_of_another_kind_are_refused(saved, tmp_path, change):
    path = tmp_path / "other"
    shutil.copytree(saved[0], path)
    config = json.loads((path / lora.CONFIG).read_text())
    (path / lora.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="not supported, merge it with peft"):
        models.load_model(str(path))


def test_a_config_that_is_none_is_refused_by_name(saved, tmp_path):
    path = tmp_path / "broken"
    shutil.copytree(saved[0], path)
    for text in ("{", "[]", '{"peft_type": "LORA"}'):
        (path / lora.CONFIG).write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json is not one of adapters"):
            models.load_model(str(path))


def test_weights_that_are_missing_cut_or_of_another_size_are_refused_by_name(
    saved, base_dir, tmp_path
):
    path, (_, model, adapters) = tmp_path / "broken", saved
    shutil.copytree(saved[0], path)
    whole = (path / lora.WEIGHTS).read_bytes()
    (path / lora.WEIGHTS).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="adapter_model.safetensors can't be read: .*Error"):
        models.load_model(str(path))
    (path / lora.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors can't be read: FileNotFound"):
        models.load_model(str(path))
    tensors = {name: w.detach() for name, w in adapters.named_parameters()}
    first = next(iter(tensors))
    wider = torch.cat([tensors[first]] * 2, 1)
    for changed in (tensors | {first: wider}, {k: w for k, w in tensors.items() if k != first}):
        lora.save(changed, path, base_dir, models.fingerprint(model))
        with pytest.raises(ValueError, match="does not fit this model: the adapters of model.lay"):
            models.load_model(str(path))


def test_adapters_speak_the_words_of_their_base(saved, base_dir):
    assert speaks_as_embedded(str(saved[0])) and speaks_as_embedded(base_dir)
    other = str(Path(base_dir).parent)  # no model at all
    assert not speaks_as_embedded(str(saved[0]), other)


def test_adapters_for_layers_that_the_model_lacks_are_refused(saved, base_dir, tmp_path):
    model, _ = models.load_model(base_dir)
    tensors = {name: w.detach() for name, w in filled(model).named_parameters()}
    tensors = {name.replace("q_proj", "x_proj"): weight for name, weight in tensors.items()}
    lora.save(tensors, tmp_path / "other", base_dir, models.fingerprint(model))
    with pytest.raises(ValueError, match="no layer of this model: .*x_proj"):
        models.load_model(str(tmp_path / "other"))


def test_a_model_whose_blocks_have_other_weights_than_linear_layers_is_refused(tiny):
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[0].mlp.extra = torch.nn.Embedding(3, 4)
    with pytest.raises(ValueError, match="mlp.extra.weight is no linear layer"):
        lora.make(model, RANK, 0)
    model.get_decoder().layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="its blocks have no linear layers"):
        lora.make(model, RANK, 0)


@pytest.mark.parametrize("flags, said", [
    ("--lora_merged", "--lora_merged: there are no adapters to be merged: give --lora_rank"),
    ("--lora_rank 2 --cpu_offload", "--cpu_offload: leave it out"),
    ("--lora_rank 0", "--lora_rank 0: must be at least 1"),
    ("--base models/tiny", "--base models/tiny: "),
])  # fmt: skip
def test_flags_of_adapters_that_make_no_sense_are_refused(
    flags, said, base_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distributed, "start", lambda config: None)
    places = "--model", base_dir, "--output_dir", tmp_path / "run"
    assert said in helpers.refusal(score, capsys, *places, *flags.split())
    assert not (tmp_path / "run").exists()


# Whole runs


@pytest.fixture(scope="module")
def whole_run(base_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    rows = helpers.train_here(score, base_dir, out, *helpers.FEW["score"], *RATE)
    return out, rows


def test_adapters_alone_are_trained_and_saved_and_a_state_is_small(whole_run, base_dir):
    out, rows = whole_run
    assert rows[0]["kl_t1"] == rows[0]["kl_t2"] == 0 < rows[-1]["kl_t2"]
    assert max(row["ratio_error"] for row in rows) < 1e-4
    names = {path.name for path in (out / "checkpoint").iterdir()}
    assert names == {lora.CONFIG, lora.WEIGHTS, "README.md"}
    model, _ = models.load_model(base_dir)
    trained = lora.count(model, RANK)
    config = score.Config(lora_rank=RANK)
    assert announce.trained(config, model) == (trained, 4 * trained)
    assert trained == sum(w.numel() for w in lora.make(model, RANK, 0).parameters())
    (state,) = (s for s in checkpoint.states(out) if s.name == "step_000002")
    kept = 12 * trained + 2048 * 4 * len([*lora.make(model, RANK, 0).parameters()])
    assert sum(p.stat().st_size for p in (state / "tensors").iterdir()) < kept
    adapters, scale = lora.read(out / "checkpoint", model, models.fingerprint(model))
    assert scale == ALPHA / RANK
    assert all(adapter.B.abs().max() > 1e-3 for adapter in adapters.values())


def test_the_final_table_is_of_the_adapters_that_are_saved(whole_run, base_dir):
    """The run does not load again what it has; evaluating what it saved has the same figures."""
    out, _ = whole_run
    results = json.loads((out / "results.json").read_text())
    for name, model in (("base", base_dir), ("trained", str(out / "checkpoint"))):
        flags = ["--model", model, "--max_new_tokens", "4", "--limit", "4"]
        config = parse_args(evaluate.Config, [*flags, "--temperature", "1"])
        with pytest.MonkeyPatch.context() as patch:
            task = helpers.dataclasses.replace(
                helpers.TASKS["tiny"], verify=helpers.arbitrary_verdict
            )
            patch.setitem(helpers.TASKS, "tiny", task)
            figures, *_ = evaluate.evaluate_by(config, None)
        assert figures == results[name]["sampled"]


def test_a_run_with_merged_checkpoints_saves_an_ordinary_model(whole_run, base_dir, tmp_path):
    flags = [*helpers.FEW["score"], *RATE, "--lora_merged"]
    helpers.train_here(score, base_dir, tmp_path / "run", *flags)
    ours, apart = (
        models.load_model(str(run / "checkpoint"))[0] for run in (tmp_path / "run", whole_run[0])
    )
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
    torch.testing.assert_close(logits_of(ours), logits_of(apart), atol=1e-5, rtol=0)


def test_a_run_in_bfloat16_ends_and_merges_into_weights_that_are_not_rounded(base_dir, tmp_path):
    flags = (*RATE, "--dtype", "bfloat16")
    for more in ((), ("--lora_merged",)):
        out = tmp_path / f"run{len(more)}"
        assert helpers.run("score", base_dir, out, *flags, *more) == [0]
        assert json.loads((out / "results.json").read_text())["trained"]
        trained, base = (models.load_model(str(p))[0] for p in (out / "checkpoint", base_dir))
        embeddings = [model.get_input_embeddings().weight for model in (trained, base)]
        assert torch.equal(*embeddings)
        assert not torch.equal(*(m.model.layers[0].mlp.up_proj.weight for m in (trained, base)))


def test_what_is_trained_on_top_of_adapters_is_saved_as_a_model(saved, tmp_path):
    out = tmp_path / "run"
    helpers.train_here(score, str(saved[0]), out, *helpers.FEW["score"], *RATE)
    assert (out / "checkpoint" / "model.safetensors").exists()
    models.load_model(str(out / "checkpoint"))


def test_a_killed_run_goes_on_bit_for_bit_with_its_reference(base_dir, tmp_path):
    flags = (*RATE, "--stage2_steps", "4")
    assert helpers.run("score", base_dir, tmp_path / "whole", *flags) == [0]
    harm = partial(helpers.die_after_save, 4)
    killed = helpers.run("score", base_dir, tmp_path / "killed", *flags, harm=harm)
    assert killed == [-signal.SIGKILL]
    assert helpers.run("score", base_dir, tmp_path / "killed", *flags, "--resume") == [0]
    whole, resumed = (tmp_path / name for name in ("whole", "killed"))
    assert helpers.metrics(whole) == helpers.metrics(resumed)
    name = Path("checkpoint") / lora.WEIGHTS
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert (whole / "results.json").read_text() == (resumed / "results.json").read_text()
    assert helpers.metrics(whole)[-1]["kl_t1"] > 0


@pytest.mark.parametrize("script", ["rrr", "baselines"])
def test_every_training_script_has_adapters(script, base_dir, tmp_path):
    module = helpers.import_module(script)
    rows = helpers.train_here(module, base_dir, tmp_path / "run", *helpers.FEW[script], *RATE)
    assert all(row["skipped"] == 0 for row in rows)
    assert (tmp_path / "run" / "checkpoint" / lora.WEIGHTS).exists()
    assert (tmp_path / "run" / "results.json").exists()
