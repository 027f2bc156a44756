"""Pair-SFT and STaR: what is kept and imitated, with which gradient and budget; whole runs."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import baselines
import helpers
import score
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training import batches, checkpoint, models, policy
from training import loop as training

FEW = ["--problems", "2", "--group_size", "2", "--second_attempts", "2"]


def train_here(model_dir, out, *flags):
    return helpers.train_here(baselines, model_dir, out, *FEW, *flags)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def loaded(model_dir):
    model, tokenizer = models.load_model(model_dir)
    task = TASKS["tiny"]
    return Env(task, tokenizer), Sampler(model, tokenizer), task.generate("train", 0)[:2]


def trace(number, r1, r2):
    return {"problem": 0, "parts": [[9], [10 + number], [8], [20 + number]], "right": [r1, r2]}


def attempts(traces):
    return [(t["parts"][1][0] - 10, t["parts"][3][0] - 20) for t in traces]


@pytest.mark.parametrize("method, plus, kept", [
    ("star", False, [(0, 0), (5, 5)]),
    ("star", True, [(0, 0), (5, 5), (1, 1)]),
    ("pair_sft", False, [(0, 0), (2, 5), (4, 0), (5, 5)]),  # 2, 4 are wrong twice: others' in turn
    ("pair_sft", True, [(0, 0), (2, 5), (4, 0), (5, 5), (1, 1)]),
])  # fmt: skip
def test_what_is_kept_of_a_problem(method, plus, kept):
    verdicts = (0, 1), (1, 1), (0, 0), (1, 0), (0, 0), (0, 1)
    traces = [trace(i, *rights) for i, rights in enumerate(verdicts)]
    chosen = baselines.choose(traces, baselines.Config(method=method, plus=plus))
    assert attempts(chosen) == kept
    assert all(t["right"][1] == 1 for t in chosen)


def test_a_problem_without_a_correction_has_no_pairs():
    repeats = [trace(0, 0, 0), trace(1, 1, 1)]
    assert attempts(baselines.choose(repeats, baselines.Config(method="pair_sft"))) == []
    for method in ("star", "pair_sft"):
        config = baselines.Config(method=method, plus=True)
        assert baselines.choose([trace(0, 0, 0), trace(1, 1, 0)], config) == []


def test_samples_are_those_that_score_draws_with_the_same_seed(loaded):
    env, sampler, problems = loaded
    mine = batches.share_of(problems, 3, 4)
    sizes = {"problems": 2, "group_size": 2, "second_attempts": 2, "max_new_tokens": 5, "seed": 3}
    found = baselines.roll_out(env, sampler, mine, baselines.Config(**sizes))
    rollout, first, second, _ = score.roll_out(env, sampler, mine, score.Config(**sizes))
    rows = [ids[:n] for ids, n in zip(rollout.ids.tolist(), rollout.lengths.tolist())]
    assert [[i for part in t["parts"] for i in part] for t in found] == rows
    assert [t["right"][1] for t in found] == second.right.tolist()
    assert [t["right"][0] for t in found] == first.right.repeat_interleave(2).tolist()
    assert [t["problem"] for t in found] == [0] * 4 + [1] * 4
    again = baselines.make_batch(found, sampler, {}, baselines.Config(**sizes)).rollout
    for name in ("ids", "action_mask", "turn", "lengths", "stopped"):
        assert torch.equal(getattr(again, name), getattr(rollout, name)), name


@pytest.mark.parametrize("method", ["pair_sft", "star"])
def test_the_gradient_is_that_of_cross_entropy_of_what_is_imitated(method, loaded, model_dir):
    env, sampler, problems = loaded
    sizes = {"problems": 2, "group_size": 2, "second_attempts": 2, "max_new_tokens": 5}
    config = baselines.Config(method=method, **sizes)
    traces = baselines.roll_out(env, sampler, batches.share_of(problems, 0, 0), config)
    traces = [t | {"right": [i % 2, 1]} for i, t in enumerate(traces)]
    batch = baselines.make_batch(traces, sampler, {}, config)
    assert not batch.kl_coef.any() and batch.rewards.tolist() == [t["right"] for t in traces]
    if method == "pair_sft":
        assert not batch.advantages[batch.rollout.turn == 0].any()
    scorer = models.make_scorer(models.load_model(model_dir)[0], config, reference=False)
    scores, _ = policy.accumulate_gradients(scorer, batch, config)

    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    plain.get_input_embeddings().padding_idx = None  # a word as any other, where it is said
    labels = torch.full_like(batch.rollout.ids, -100)
    for row, t in enumerate(traces):
        both = method == "star" and t["right"][0]  # STaR: what is right of both attempts
        learnt = (False, both, False, True)
        spoken = [i if learns else -100 for learns, part in zip(learnt, t["parts"]) for i in part]
        labels[row, : len(spoken)] = torch.tensor(spoken)
    loss = plain(input_ids=batch.rollout.ids, labels=labels).loss
    loss.backward()
    mean = -(scores.logprobs * batch.advantages).sum() / batch.denominator
    torch.testing.assert_close(mean, loss.detach())
    pairs = zip(scorer.model.named_parameters(), plain.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method, starts", [("pair_sft", [0, 7]), ("star", [0, 2, 4, 7])])
def test_rounds_share_the_steps_and_sample_as_much_as_score(method, starts, model_dir, tmp_path):
    config = baselines.Config(method=method, steps=7)
    assert config.starts == starts
    rounds = [baselines.round_of(step, config) for step in range(7)]
    assert [rounds[step] for step in starts[:-1]] == [*range(len(starts) - 1)]
    assert rounds[6] == len(starts) - 2
    rows = train_here(model_dir, tmp_path / "run", "--method", method, "--plus", "--steps", "7")
    assert [row["stage"] - 1 for row in rows] == rounds
    assert sum(row.get("sampled", 0) for row in rows) == 7 * 8  # 8 rows a step, as score.py's
    assert all(("acc_t1" in row) == (row["step"] in starts) and "kl_t1" not in row for row in rows)
    files = sorted((tmp_path / "run").glob("traces_*.jsonl"))
    assert len(files) == len(starts) - 1
    for path, row in zip(files, (row for row in rows if "kept" in row)):
        figures, *kept = map(json.loads, path.read_text().splitlines())
        assert len(kept) == row["kept"] > 0 and {t["right"][1] for t in kept} == {1}


def test_every_step_trains_on_as_many_rows_as_it_samples(loaded, model_dir, tmp_path, monkeypatch):
    seen, made = [], baselines.make_batch

    def counting(traces, *rest):
        seen.append(len(traces))
        return made(traces, *rest)

    monkeypatch.setattr(baselines, "make_batch", counting)
    train_here(model_dir, tmp_path / "run", "--plus", "--steps", "3")
    assert seen == [8, 8, 8]


def test_each_round_of_star_samples_from_the_model_that_the_last_one_left(model_dir, tmp_path):
    first = {}
    for lr in ("1e-3", "0.0"):
        train_here(model_dir, tmp_path / lr, "--plus", "--steps", "6", "--lr", lr)
        first[lr] = [(tmp_path / lr / f"traces_{turn}.jsonl").read_text() for turn in (1, 2)]
    assert first["1e-3"][0] == first["0.0"][0] and first["1e-3"][1] != first["0.0"][1]


@pytest.mark.parametrize("last", [1, 2, 4])  # in the first round, before the second, in the last
def test_a_resumed_run_equals_an_uninterrupted_one(last, model_dir, tmp_path, monkeypatch):
    flags = ("--method", "star", "--plus", "--steps", "6", "--lr", "1e-3")
    whole = train_here(model_dir, tmp_path / "whole", *flags)
    logged = training.log

    def stop_after(run, row, text):
        logged(run, row, text)
        if row["step"] == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "log", stop_after)
    with pytest.raises(KeyboardInterrupt):
        train_here(model_dir, tmp_path / "cut", *flags)
    monkeypatch.undo()
    resumed = train_here(model_dir, tmp_path / "cut", *flags, "--resume")
    assert helpers.without_times(resumed) == helpers.without_times(whole)
    results = [(tmp_path / name / "results.json").read_text() for name in ("cut", "whole")]
    assert results[0] == results[1]


def test_two_ranks_end_in_the_results_of_one(model_dir, tmp_path):
    for world in (0, 2):
        assert set(helpers.run("baselines", model_dir, tmp_path / f"{world}", world=world)) == {0}
    for name in ("results.json", "traces_1.jsonl"):
        assert (tmp_path / "0" / name).read_text() == (tmp_path / "2" / name).read_text()


def test_the_model_kept_is_the_one_with_the_best_second_attempts_of_the_last_round(
    model_dir, tmp_path, monkeypatch
):
    watched = [0.9, 0.1, 0.5, 0.4]  # after steps 2 and 4 of round 1, after 6 and 8 of round 2
    saved, save_model = [], checkpoint.save_model

    def watch(step):
        return {"eval_acc_t2": watched.pop(0)}, ""

    def saving(*arguments):
        saved.append(len(watched))
        save_model(*arguments)

    monkeypatch.setattr(baselines.Exam, "watcher", lambda *rest: watch)
    monkeypatch.setattr(checkpoint, "save_model", saving)
    flags = "--plus --rounds 2 --steps 8 --eval_every 2 --save_every 2".split()
    train_here(model_dir, tmp_path / "run", *flags)
    assert saved == [1]  # after step 6


def test_where_nothing_can_be_imitated_training_stops_and_says_so(
    model_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(baselines, "choose", lambda traces, config: [])
    with pytest.raises(SystemExit) as exit_:
        train_here(model_dir, tmp_path / "run", "--steps", "2", "--rounds", "1")
    assert exit_.value.code == 1
    assert "round 1: of 16 traces none can be imitated" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--method", "dpo"], "argument --method: invalid choice: 'dpo'"),
    (["--rounds", "4", "--steps", "3"], "--rounds 4: there are only --steps 3"),
    (["--temperature", "0"], "--temperature"),
    (["--epochs", "2"], "--epochs is for policy gradients alone"),
    (["--is_cap", "2"], "--is_cap is for policy gradients alone"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--task", "mbpp_r", "--data", "x.jsonl"], "x.jsonl"),
])  # fmt: skip
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    flags, message, model_dir, tmp_path, capsys
):
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(baselines, capsys, *places, *flags)
    assert said.count("\n") == 1 and message in said and not (tmp_path / "run").exists()


def test_first_attempts_that_the_data_gives_are_refused(model_dir, tmp_path, capsys, monkeypatch):
    task = dataclasses.replace(TASKS["tiny"], given=lambda problem: "1 + 1 = 2")
    monkeypatch.setitem(TASKS, "tiny", task)
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(baselines, capsys, *places)
    assert "first attempts are not the model's own" in said and not (tmp_path / "run").exists()
