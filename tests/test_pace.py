"""What is said of a step's pace: FLOPs as counted of its products, MFU where it is known."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

import helpers
import score
from conftest import build
from training import lora, pace
from training.pace import Done, flops
from training.scorer import Scorer

IDS = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 7, 9, 2], [5, 6, 7, 9, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
NODES, SCORED = 7, 5  # 5 6 7, 8 2, 9 3: without the 2 of the second row; and 7, 8 2, 9 3


def counted(scorer) -> int:
    """FLOPs of all products of two matrices in a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        scores = scorer(IDS, MASK)
        (scores.logprobs + scores.kl).sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    return sum(kinds.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_flops_are_those_of_all_products_but_what_is_computed_again(reference, checkpointing):
    model, other = build(tf.Qwen2Config), build(tf.Qwen2Config) if reference else None
    scorer = Scorer(model, other, checkpointing=checkpointing)
    blocks = [w for name, w in model.model.layers.named_parameters() if name.endswith("weight")]
    W, E = sum(w.numel() for w in blocks if w.ndim == 2), model.lm_head.weight.numel()
    last = sum(block.mlp.down_proj.weight.numel() for block in model.model.layers)
    again = 2 * E * SCORED * (1 + reference)
    again += 2 * (W - last) * NODES * checkpointing  # of a block's last product nothing is kept
    assert counted(scorer) == flops(scorer, NODES, SCORED) + again
    assert (scorer.nodes, scorer.scored) == (NODES, SCORED)


@pytest.mark.parametrize("own", [False, True])
def test_flops_of_adapters_are_those_of_all_products_but_the_first_inputs_gradient(own):
    model = build(tf.Qwen2Config)
    adapters, others = lora.make(model, 2, seed=0), lora.make(model, 2, seed=1) if own else None
    scorer, first = Scorer(model, model, adapters, others), model.model.layers[0].self_attn
    E, readers = model.lm_head.weight.numel(), (first.q_proj, first.k_proj, first.v_proj)
    # 6 n and 4 W of a node have the gradient of what the first block reads, which nobody wants
    spared = sum(2 * 2 * layer.in_features + 2 * layer.weight.numel() for layer in readers) * NODES
    assert counted(scorer) == flops(scorer, NODES, SCORED) + 4 * E * SCORED - spared


def a_batch(drawn: bool = True):
    rollout = SimpleNamespace(
        logprobs=-1.0 * MASK * drawn, action_mask=MASK, lengths=torch.tensor([5, 4, 5])
    )
    return SimpleNamespace(rollout=rollout)


def test_a_step_says_its_rates_and_shares_and_no_mfu_of_a_cpu():
    row = pace.pace(a_batch(), Done(rollout=2.0, update=6.0, flops=10**15))
    assert row.pop("memory_mib") > 10
    assert row == {
        "seconds_rollout": 2.0,
        "seconds_update": 6.0,
        "share_of_time_rollout": 0.25,
        "share_of_time_update": 0.75,
        "tokens_per_second_rollout": 4.0,  # 8 sampled
        "tokens_per_second_update": 14 / 6,
    }
    row = pace.pace(a_batch(drawn=False), Done(2.0, 6.0, 0))
    assert "tokens_per_second_rollout" not in row  # of old samples, which took no time here


@pytest.mark.parametrize("name, mfu", [
    ("NVIDIA H100 80GB HBM3", 0.5), ("NVIDIA H100 PCIe", 989 / 756 / 2), ("Some GPU", None),
])  # fmt: skip
def test_mfu_is_of_all_gpus_and_only_where_their_peak_is_known(name, mfu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    monkeypatch.setattr(pace.distributed, "exchange", lambda x: [x, x])  # two ranks
    row = pace.pace(a_batch(), Done(rollout=1.0, update=4.0, flops=2 * 989 * 10**12))
    assert row.get("mfu") == (None if mfu is None else pytest.approx(mfu))
    assert (row["memory_mib"], row["memory_reserved_mib"]) == (2**10, 2**11)
    assert row["tokens_per_second_update"] == 7.0


def test_a_run_logs_its_pace_and_what_may_differ_is_named_so(tmp_path):
    model = helpers.save_random_model(tmp_path / "model")
    rows = helpers.train_here(score, model, tmp_path / "run", *helpers.FEW["score"])
    for row in rows:
        rates = [row[f"tokens_per_second_{kind}"] for kind in ("rollout", "update")]
        assert rates[0] == pytest.approx(row["tokens"] / row["seconds_rollout"]) and rates[1] > 0
        shares = row["share_of_time_rollout"] + row["share_of_time_update"]
        assert shares == pytest.approx(1) and "mfu" not in row
    again = helpers.train_here(score, model, tmp_path / "again", *helpers.FEW["score"])
    assert helpers.without_times(rows) == helpers.without_times(again)
