"""Several ranks on CPU (gloo): the same results as one process, whatever is spread how."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import helpers
import rrr
import score
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training import batches, distributed, models, policy
from training.distributed import exchange, rank

SIZES = {"max_new_tokens": 6, "problems": 4, "group_size": 2, "second_attempts": 2}
EPISODES = {"group": "episode", "group_size": 2, "retries": 2}
EPISODES |= {"max_new_tokens": 5, "max_reflection_tokens": 6}
WAYS = {  # name: flags of a step
    "whole": {},
    "small pieces": {"token_budget": 64},
    "blocks again": {"checkpointing": True, "token_budget": 100},
    "copies": {"hsdp": 0},  # 0: as many as ranks
    "offloaded": {"cpu_offload": True},
    "adapters": {"lora_rank": 2},
    "adapters, blocks again": {"lora_rank": 2, "checkpointing": True, "token_budget": 100},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


def by_length(verify, texts, *rest):
    return [len(text) % 2 == 0 for text in texts]


def one_step(script, model_dir, config):
    """A rollout of all ranks and its gradient: (rows of ids, rewards, loss, {name: gradient})."""
    model, tokenizer = models.load_model(model_dir, dtype=models.compute_dtype(config))
    env = Env(TASKS["tiny"], tokenizer)
    mine = batches.share_of(env.task.generate("train", 0)[:4], config.seed, 0)
    sampler, scorer = Sampler(model, tokenizer), models.make_scorer(model, config)
    moved = scorer.reference if scorer.adapters is None else scorer.adapters
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(0.9).add_(0.01 * (config.lora_rank or 0))  # else the KL has no gradient
    models.hand_over(scorer, sampler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.env.verify_batch", by_length)
        if script == "score":
            attempts = score.roll_out(env, sampler, mine, config)
            rewards = [attempts.v1.right, attempts.v2.right]
            batch = score.make_batch(attempts, 2, 1.0, config)
            assert torch.equal(batch.rewards[:, 1], rewards[1])  # this rank's
        else:
            episodes = rrr.roll_out_episodes(env, sampler, mine, config)
            rewards = [episodes.retries.right, episodes.present]
            batch = rrr.make_batch(episodes, config)
    rollout = batch.rollout
    if distributed.together() and not config.lora_rank:
        distributed.drop_weights(model)
    _, loss = policy.accumulate_gradients(scorer, batch, config)
    gradients = {name: parameter.grad for name, parameter in scorer.trained.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    rows = [row[:n] for row, n in zip(rollout.ids.tolist(), rollout.lengths.tolist(), strict=True)]
    rows = [row for part in exchange(rows) for row in part]
    rewards = [distributed.gather(r).flatten().tolist() for r in rewards]
    return rows, rewards, sum(exchange(loss)), whole


def all_steps(model_dir, out):
    distributed.start()
    if rank():  # only the first one may read the files
        AutoModelForCausalLM.from_pretrained = AutoTokenizer.from_pretrained = None
    steps = {}
    for name, flags in WAYS.items():
        if not distributed.together() and name in ("copies", "offloaded"):
            continue
        if "hsdp" in flags:
            flags = {"hsdp": distributed.world()}
        config = score.Config(model=model_dir, **SIZES, **flags)
        steps[f"score, {name}"] = one_step("score", model_dir, config)
        if name in ("whole", "small pieces"):
            config = rrr.Config(model=model_dir, **EPISODES, **flags)
            steps[f"rrr, {name}"] = one_step("rrr", model_dir, config)
    if rank() == 0:
        torch.save(steps, out)
    distributed.finish()


@pytest.fixture(scope="module")
def steps(model_dir, tmp_path_factory):
    """{number of ranks: of `all_steps`}; 0 is one process without torchrun."""
    out = tmp_path_factory.mktemp("steps")
    for world in (0, 1, 2, 3):
        processes = helpers.start(all_steps, model_dir, out / f"{world}", world=world)
        assert set(helpers.finish(processes)) == {0}
    return {world: torch.load(out / f"{world}") for world in (0, 1, 2, 3)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_rollouts_rewards_loss_and_gradients(steps, world):
    for name, (rows, rewards, loss, gradients) in steps[world].items():
        script, way, *_ = name.split(", ")
        same = steps[0][f"{script}, {'adapters' if way == 'adapters' else 'whole'}"]
        expected_rows, expected_rewards, expected_loss, expected = same
        assert rows == expected_rows and rewards == expected_rewards, name
        assert 0 < sum(rewards[0]) < len(rewards[0])
        assert loss == pytest.approx(expected_loss, abs=1e-5), name
        assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
        near = {"atol": 1e-6, "rtol": 1e-5}
        for weight, gradient in expected.items():
            where = f"{name}: {weight}"
            torch.testing.assert_close(gradients[weight], gradient, **near, msg=where)


def test_under_torchrun_a_single_rank_equals_a_plain_process_bit_for_bit(steps):
    for name, (*expected_figures, expected) in steps[0].items():
        *figures, gradients = steps[1][name]
        assert figures == expected_figures, name
        assert all(torch.equal(gradients[weight], expected[weight]) for weight in expected), name


def assert_alike(rows, expected):
    """Metrics of runs whose arithmetic is in another order.

    Some are rough: Adam makes steps of full size of the smallest gradients.
    """
    rough, fine = {"rel": 0.01, "abs": 1e-5}, {"rel": 1e-5}
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key in row:
            close = rough if key.startswith(("kl", "grad", "ratio")) else fine
            assert row[key] == pytest.approx(other[key], **close), (row["step"], key)


@pytest.mark.parametrize("script", ["score", "rrr"])
def test_whole_runs_of_2_and_3_ranks_end_in_the_table_of_one_and_go_on_at_another_size(
    script, model_dir, tmp_path
):
    assert helpers.run(script, model_dir, tmp_path / "0") == [0]
    expected = json.loads((tmp_path / "0" / "results.json").read_text())
    sizes = ((0, 3), (2, 0)) if script == "score" else ((3, 2),)
    for first, then in sizes:
        out = tmp_path / f"{first}{then}"
        harm = partial(helpers.die_after_save, 2)
        assert set(helpers.run(script, model_dir, out, world=first, harm=harm)) == {-9}
        assert set(helpers.run(script, model_dir, out, "--resume", world=then)) == {0}
        assert_alike(helpers.metrics(out), helpers.metrics(tmp_path / "0"))
        assert json.loads((out / "results.json").read_text()) == expected


def test_a_run_of_two_ranks_trains_the_adapters_of_one_and_goes_on_as_one(model_dir, tmp_path):
    flags = ("--lora_rank", 2, "--lr", 1e-3)
    assert helpers.run("score", model_dir, tmp_path / "0", *flags) == [0]
    out, harm = tmp_path / "20", partial(helpers.die_after_save, 2)
    assert set(helpers.run("score", model_dir, out, *flags, world=2, harm=harm)) == {-9}
    assert helpers.run("score", model_dir, out, *flags, "--resume") == [0]
    assert_alike(helpers.metrics(out), helpers.metrics(tmp_path / "0"))
    results = [(tmp_path / name / "results.json").read_text() for name in ("0", "20")]
    assert results[0] == results[1]


def shares(counts):
    distributed.start()
    for count in counts:
        mine = [*distributed.share(count)]
        assert [i for part in exchange(mine) for i in part] == [*range(count)]
        assert max(exchange(len(mine))) - min(exchange(len(mine))) <= 1
        rows = torch.tensor(mine, dtype=torch.long)[:, None]
        assert distributed.gather(rows).flatten().tolist() == [*range(count)]
        assert torch.equal(distributed.own(distributed.gather(rows), len(rows)), rows)
    with pytest.raises(ValueError, match="of the first"):
        distributed.on_first(int, "of the first")
    distributed.finish()


def test_ranks_share_all_things_and_gather_them_in_order():
    assert helpers.finish(helpers.start(shares, [0, 1, 2, 3, 7], world=3)) == [0, 0, 0]


@pytest.mark.parametrize("flags, message", [
    (["--hsdp", "3"], "--hsdp 3 does not divide the 2 ranks"),
    (["--model", "./nowhere"], "--model ./nowhere: no config.json"),
])  # fmt: skip
def test_bad_input_ends_all_ranks_with_one_line_a_node(flags, message, model_dir, tmp_path):
    assert helpers.run("score", model_dir, tmp_path / "run", *flags, world=2) == [2, 2]
    said = [(tmp_path / f"run.log.{rank}").read_text() for rank in range(2)]
    assert message in said[0] and said[0].count("\n") == 1 and not said[1]


def test_what_only_torchrun_can_do_is_refused_without_it(model_dir, tmp_path, capsys):
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(score, capsys, *places, "--hsdp", "2")
    assert "--hsdp 2: needs torchrun" in said and not (tmp_path / "run").exists()


# One process that forms a group by itself


def weights_of(run, step: int, like) -> dict:
    """{name: float32 tensor} of the policy in a saved state."""
    found = {f"scorer.model.{k}": torch.empty_like(v) for k, v in like.named_parameters()}
    dcp.load(found, checkpoint_id=run / "states" / f"step_{step:06d}" / "tensors", no_dist=True)
    return found


@pytest.mark.parametrize("flags", ["--dtype bfloat16", "--cpu_offload"])
def test_alone_a_process_computes_as_a_single_rank_of_torchrun_and_goes_on(
    flags, model_dir, tmp_path
):
    flags, harm = flags.split(), partial(helpers.die_after_save, 2)
    assert helpers.run("score", model_dir, tmp_path / "rank", *flags, world=1) == [0]
    alone = tmp_path / "alone"
    assert helpers.run("score", model_dir, alone, *flags, harm=harm) == [-9]
    assert helpers.run("score", model_dir, alone, "--resume") == [0]  # with the run's own flags
    assert helpers.metrics(alone) == helpers.metrics(tmp_path / "rank")
    said = (tmp_path / "alone.log.0").read_text()
    dtype = "bfloat16" if "bfloat16" in flags else "float32"
    assert f"{dtype} on cpu (1 threads)" in said and "Traceback" not in said
    assert "1 ranks)" in (tmp_path / "rank.log.0").read_text()


def test_weights_stay_float32_where_they_are_computed_with_in_bfloat16(model_dir, tmp_path):
    flags = "--dtype bfloat16 --lr 1e-7 --warmup 0 --keep 9 --save_every 1".split()
    assert helpers.run("score", model_dir, tmp_path / "run", *flags) == [0]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    after = weights_of(tmp_path / "run", 4, model)
    for name, before in model.named_parameters():
        moved = (after[f"scorer.model.{name}"] - before).abs().max()
        assert 0 < moved < 1e-6, name  # less than bfloat16 can tell of most of them
    row = helpers.metrics(tmp_path / "run")[0]
    assert 1e-4 < row["ratio_error"] < 0.2  # bfloat16's, of sampler against scorer


def test_a_group_is_formed_only_where_one_is_needed(monkeypatch):
    needs = distributed.groups_alone
    assert not needs(None) and not needs(score.Config()) and not needs(evaluate.Config())
    assert needs(evaluate.Config(dtype="bfloat16")) and needs(score.Config(cpu_offload=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needs(score.Config()) and needs(evaluate.Config()) and not needs(None)
    assert not needs(score.Config(dtype="float32"))
    assert needs(score.Config(dtype="float32", cpu_offload=True))


def test_a_dtype_that_nobody_started_a_group_for_is_refused_not_ignored():
    with pytest.raises(ValueError, match="--dtype bfloat16: distributed.start"):
        models.compute_dtype(score.Config(dtype="bfloat16"))


def test_copies_in_both_dtypes_have_one_fingerprint_and_another_model_another(model_dir):
    model, _ = models.load_model(model_dir)
    prints = [models.fingerprint(model)]
    prints.append(models.fingerprint(copy.deepcopy(model).to(torch.bfloat16)))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 0.01
    assert prints[0] == prints[1] != models.fingerprint(model)
