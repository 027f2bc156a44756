"""SCoRe's own arithmetic, and short whole runs on a randomly initialised model."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

import evaluate
import helpers
import score
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training import batches, checkpoint, models
from training import loop as training

run_score = functools.partial(helpers.from_command_line, "score.py")


def train_here(model_dir, out, *flags):
    few = "--problems 2 --group_size 2 --second_attempts 2".split()
    return helpers.train_here(score, model_dir, out, *few, *flags)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.mark.parametrize("r1, r2, reward", [(0, 1, 11), (1, 1, 1), (0, 0, 0), (1, 0, -10)])
def test_the_bonus_has_the_papers_sign_and_size(r1, r2, reward):
    verdicts = torch.tensor([[1.0 * r1]]), torch.tensor([[[1.0 * r2]]])
    first, second = score.returns(*verdicts, 2, score.Config())
    assert (first, second) == (r1, reward)
    first, second = score.returns(*verdicts, 1, score.Config())
    assert (first, second) == (0, r2)  # Stage I: no reward for y1, no bonus for y2


def test_stage_1_holds_the_first_attempt_and_stage_2_does_not():
    config = score.Config(beta1=0.05, beta2=1.0)
    assert score.turn_kl_coefs(1, 1.0, config) == [1.0, 0.05]
    assert score.turn_kl_coefs(2, 1.0, config) == [0.05, 0.05]


def test_second_attempts_are_compared_within_one_first_attempt_and_firsts_within_a_problem():
    config = score.Config(normalise="none", alpha=1.0)
    r1 = torch.tensor([[1.0, 0.0]])
    r2 = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    expected = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(score.turn_advantages(r1, r2, 2, config), expected)
    flat = score.turn_advantages(r1, r2[..., :1], 2, config)  # y2 gets r2 + (r2 - r1) = 1 and 2
    torch.testing.assert_close(flat, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


NORMALISE = [("none", True), ("joint", True), ("per_turn", False)]


@pytest.mark.parametrize("normalise, alpha_matters", NORMALISE)
def test_per_turn_normalisation_cancels_alpha_as_its_help_says(normalise, alpha_matters):
    generator = torch.Generator().manual_seed(0)
    r1 = torch.randint(2, (4, 4), generator=generator).float()
    r2 = torch.randint(2, (4, 4, 4), generator=generator).float()
    configs = [score.Config(normalise=normalise, alpha=alpha) for alpha in (1.0, 10.0)]
    one, ten = (score.turn_advantages(r1, r2, 2, config) for config in configs)
    assert torch.allclose(one, ten, atol=1e-5) != alpha_matters


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("normalise, keys", [
    ("none", ["advantage_std"]), ("joint", ["advantage_std"]),
    ("per_turn", ["advantage_std_t1", "advantage_std_t2"]),
])  # fmt: skip
def test_advantage_std_is_what_advantages_were_divided_by(normalise, keys, stage):
    generator = torch.Generator().manual_seed(0)
    r1 = torch.randint(2, (4, 4), generator=generator).float()
    r2 = torch.randint(2, (4, 4, 4), generator=generator).float()
    config = score.Config(normalise=normalise)
    raw = score.raw_advantages(r1, r2, stage, config)
    found = score.deviations(raw, config)
    assert list(found) == keys
    advantages = score.turn_advantages(r1, r2, stage, config)
    stds = torch.tensor([*found.values()] if normalise != "none" else [1.0])
    torch.testing.assert_close(advantages * stds, raw)
    if stage == 1 and normalise != "per_turn":  # the turn that is not trained doesn't count
        assert found["advantage_std"] == pytest.approx(float(raw[:, 1].std(correction=0)))


def test_a_baseline_within_one_first_attempt_turns_the_bonus_into_a_weight():
    generator = torch.Generator().manual_seed(0)
    r1 = torch.randint(2, (4, 4), generator=generator).float()
    r2 = torch.randint(2, (4, 4, 4), generator=generator).float()
    configs = [score.Config(normalise="none", alpha=alpha) for alpha in (0.0, 10.0)]
    plain, bonus = (score.turn_advantages(r1, r2, 2, config) for config in configs)
    torch.testing.assert_close(bonus[:, 1], 11 * plain[:, 1])
    torch.testing.assert_close(bonus[:, 0], plain[:, 0])


def adapted(kls, **flags):
    """beta2 after each step whose first attempts had this KL; None: offline, they have none."""
    config = score.Config(**{"kl_target": 0.1, "warmup": 0, **flags})
    state, found = {"beta2": config.beta2, "calm": 0}, []
    for step, kl in enumerate(kls):
        state["last"] = {"step": step} | ({} if kl is None else {"kl_t1": kl})
        score.adapt_beta2(state, config)
        found.append(state["beta2"])
    return found


def test_beta2_rises_at_once_and_falls_after_ten_calm_steps_in_a_row():
    assert adapted([0.2, 0.2, 0.14, 0.07]) == [1.5, 2.25, 2.25, 2.25]
    low, within = 0.06, 0.1
    assert adapted([low] * 21) == [1.0] * 9 + [1 / 1.5] * 10 + [1 / 1.5 / 1.5] * 2
    assert adapted([low] * 9 + [within] + [low] * 9) == [1.0] * 19  # not in a row
    assert adapted([low] * 9 + [0.2] + [low] * 10) == [1.0] * 9 + [1.5] * 10 + [1.0]
    assert adapted([low] * 5 + [None] * 9 + [low] * 5) == [1.0] * 18 + [1 / 1.5]
    assert adapted([low] * 40, kl_target=None) == [1.0] * 40


def test_the_kl_of_zero_that_a_run_starts_with_does_not_let_go_of_beta2():
    assert adapted([0.0] * 17, warmup=7) == [1.0] * 16 + [1 / 1.5]
    assert adapted([0.2] * 3, warmup=7) == [1.5, 1.5**2, 1.5**3]  # too much is too much


def test_beta2_stays_within_a_hundredth_and_a_hundred_times_what_was_given():
    assert adapted([9.0] * 30, beta2=2.0)[-1] == 200
    assert adapted([0.0] * 300, beta2=2.0)[-1] == 0.02


def test_a_run_writes_its_directory_and_its_update_is_on_policy(model_dir, tmp_path):
    flags = "--stage1_steps 2 --stage2_steps 2".split()
    rows = train_here(model_dir, tmp_path / "run", *flags)
    assert [(r["stage"], r["step"]) for r in rows] == [(1, 0), (1, 1), (2, 2), (2, 3)]
    assert all(r["ratio_error"] < 1e-4 for r in rows)  # sampler and scorer agree: the ratio is 1
    assert rows[0]["kl_t1"] == pytest.approx(0, abs=1e-6) and rows[3]["kl_t1"] > 0
    assert "eval_acc_t2" in rows[1] and "eval_acc_t2" not in rows[0]
    written = sorted(p.name for p in (tmp_path / "run").iterdir())
    files = "checkpoint config.json curves.png metrics.jsonl results.json rollouts.html"
    assert written == [".lock", *files.split(), "rollouts.jsonl", "states", "transcripts.txt"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    names = results["base"]["greedy"].keys()
    assert names == results["trained"]["sampled"].keys() >= {"n", "acc_t1", "delta_se"}
    models.load_model(str(tmp_path / "run" / "checkpoint"))


@pytest.mark.parametrize("flags", [
    "--stage1_steps 2 --stage2_steps 4 --reference stage1 --kl_target 0.001",
    "--stage1_steps 6 --stage2_steps 0 --kl_target 1000 --warmup 0",  # cut while it counts
])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(flags, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "CALM", 2)
    flags = flags.split()
    whole = train_here(model_dir, tmp_path / "whole", *flags)
    if "1000" in flags:
        lets_go = [1, 1, 1 / 1.5, 1 / 1.5, 1 / 1.5 / 1.5, 1 / 1.5 / 1.5]
        assert [row["beta2"] for row in whole] == lets_go

    logged = training.log

    def stop_at_6(run, row, text):
        logged(run, row, text)
        if row["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "log", stop_at_6)
        with pytest.raises(KeyboardInterrupt):
            train_here(model_dir, tmp_path / "cut", *flags)
    resumed = train_here(model_dir, tmp_path / "cut", *flags, "--resume")
    assert helpers.without_times(resumed) == helpers.without_times(whole)
    for name in ("results.json", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_single_turn_trains_first_attempts_alone(model_dir, tmp_path):
    flags = "--single_turn --stage1_steps 0 --stage2_steps 2".split()
    rows = train_here(model_dir, tmp_path / "run", *flags)
    assert "acc_t2" not in rows[0] and "kl_t2" not in rows[0] and rows[0]["stage"] == 2


def test_first_attempts_that_the_data_gives_are_no_measure_of_the_model_and_get_no_gradient(
    model_dir, tmp_path, monkeypatch
):
    task = dataclasses.replace(TASKS["tiny"], given=lambda problem: "1 + 1 = 2")
    monkeypatch.setitem(TASKS, "tiny", task)
    flags = "--stage1_steps 1 --stage2_steps 2".split()
    rows = train_here(model_dir, tmp_path / "run", *flags)
    assert not any("acc_t1" in row or "kl_t1" in row for row in rows)
    assert all(row["reward"] == row["acc_t2"] for row in rows)
    assert (tmp_path / "run" / "checkpoint").is_dir()


def test_a_run_on_first_attempts_that_the_data_gives_is_resumed_with_its_own_flags(
    model_dir, tmp_path, monkeypatch, capsys
):
    task = dataclasses.replace(TASKS["tiny"], given=lambda problem: "1 + 1 = 2")
    monkeypatch.setitem(TASKS, "tiny", task)
    flags = "--stage1_steps 1 --stage2_steps 1".split()
    monkeypatch.setattr(training, "update", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(model_dir, tmp_path / "run", *flags)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["offline_ratio"] == 0
    monkeypatch.undo()
    monkeypatch.setitem(TASKS, "tiny", task)
    with pytest.raises(SystemExit):
        train_here(model_dir, tmp_path / "run", *flags, "--resume", "--offline_ratio", "0.5")
    assert "--offline_ratio was 0.0, is 0.5" in capsys.readouterr().err
    rows = train_here(model_dir, tmp_path / "run", *flags, "--resume")
    assert [row["reward"] for row in rows] == [row["acc_t2"] for row in rows]
    places = "--model", model_dir, "--output_dir", tmp_path / "other", "--single_turn"
    said = helpers.refusal(score, capsys, *places)  # there is no second attempt to train
    assert "--offline_ratio" in said and not (tmp_path / "other").exists()


def test_stage_2_can_refer_to_the_result_of_stage_1(model_dir, tmp_path):
    kl = {}
    for reference in ("base", "stage1"):
        flags = f"--stage1_steps 3 --stage2_steps 1 --reference {reference} --lr 0.01".split()
        kl[reference] = train_here(model_dir, tmp_path / reference, *flags)[3]["kl_t1"]
    assert kl["stage1"] == pytest.approx(0, abs=1e-6) and kl["base"] > 1e-3


def test_training_at_another_temperature_scores_at_that_temperature(model_dir, tmp_path):
    flags = "--stage1_steps 0 --stage2_steps 2 --temperature 0.5".split()
    rows = train_here(model_dir, tmp_path / "run", *flags)
    assert all(r["ratio_error"] < 1e-4 for r in rows)


def test_the_kept_checkpoint_is_that_of_the_best_window_of_the_last_stage(
    model_dir, tmp_path, monkeypatch
):
    rewards = [9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 0.0, 0.0]  # three of Stage I; windows of two
    saved, made, save_model = [], score.make_batch, checkpoint.save_model

    def scripted(*arguments):
        batch = made(*arguments)
        batch.figures["reward"] = rewards.pop(0)
        return batch

    def saving(*arguments):
        saved.append(len(rewards))
        save_model(*arguments)

    monkeypatch.setattr(score, "make_batch", scripted)
    monkeypatch.setattr(checkpoint, "save_model", saving)
    train_here(model_dir, tmp_path / "run", *"--stage1_steps 3 --stage2_steps 5".split())
    assert saved == [4, 2]  # after step 4 (mean 1) and 6 (mean 2.5); never for Stage I's 9s


def test_a_run_killed_before_its_first_save_can_be_resumed(model_dir, tmp_path, monkeypatch):
    flags = "--stage2_steps 2 --stage1_steps 0".split()
    monkeypatch.setattr(training, "update", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(model_dir, tmp_path / "run", *flags)
    monkeypatch.undo()
    rows = train_here(model_dir, tmp_path / "run", *flags, "--resume")
    assert [row["step"] for row in rows] == [0, 1]


def test_resuming_with_another_flag_is_refused(model_dir, tmp_path, capsys):
    train_here(model_dir, tmp_path / "run", *"--stage1_steps 0 --stage2_steps 1".split())
    flags = ("--model", model_dir, "--output_dir", tmp_path / "run", "--resume", "--alpha", "1")
    said = helpers.refusal(score, capsys, *flags)
    assert "--alpha was 10.0, is 1.0" in said


def test_offline_first_attempts_come_from_the_base_and_get_no_gradient(model_dir):
    model, tokenizer = models.load_model(model_dir)
    base, _ = models.load_model(model_dir)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    config = score.Config(problems=2, group_size=2, second_attempts=2, offline_ratio=0.5)
    assert [score.is_offline(step, config) for step in (0, 1)] == [False, True]
    env = Env(TASKS["tiny"], tokenizer)
    problems = env.task.generate("train", 0)[:2]
    ours, theirs = (Sampler(m, tokenizer) for m in (model, base))
    own = score.roll_out(env, ours, batches.share_of(problems, 0, 0), config)
    assert set(own.rollout.turn[own.rollout.action_mask].tolist()) == {0, 1} and not own.offline
    attempts = score.roll_out(env, ours, batches.share_of(problems, 0, 1), config, theirs)
    offline = attempts.rollout
    assert len(attempts.v1.right) == 4 and len(attempts.v2.right) == 8
    assert set(offline.turn[offline.action_mask].tolist()) == {1}
    assert offline.stopped.shape == (8, 2) and attempts.offline
    seeds = batches.row_seeds(4, "first", 0, 1)
    firsts = theirs.generate(env.prompts(problems), 2, seeds=seeds, max_new_tokens=16)
    for row in range(8):
        width = int(firsts.lengths[row // 2])
        assert offline.ids[row, :width].tolist() == firsts.ids[row // 2, :width].tolist()
        assert not offline.action_mask[row, :width].any()
    batch = score.make_batch(attempts, 1, 1.0, config)
    assert "reward" not in batch.figures and not batch.kl_coef[~offline.action_mask].any()


def test_offline_steps_are_the_share_that_was_asked_for_and_count_second_attempts_alone(
    model_dir, tmp_path
):
    flags = "--stage1_steps 2 --stage2_steps 2 --offline_ratio 0.5".split()
    rows = train_here(model_dir, tmp_path / "run", *flags)
    assert ["acc_t1" in row for row in rows] == [True, False, True, False]
    lengths = [row["tokens"] / row["response_length"] for row in rows]
    assert lengths == pytest.approx([16, 8, 16, 8])  # attempts: 8 rows, of both turns or one


def test_first_attempts_whose_cache_is_lost_are_not_taken_for_somebody_elses(model_dir):
    model, tokenizer = models.load_model(model_dir)
    env, sampler = Env(TASKS["tiny"], tokenizer), Sampler(model, tokenizer)
    first = env.first_attempts

    def freed(*arguments, **limits):
        rollout = first(*arguments, **limits)
        rollout.cache = None
        return rollout

    env.first_attempts = freed
    mine = batches.share_of(env.task.generate("train", 0)[:2], 0, 0)
    with pytest.raises(ValueError, match="cache was freed"):
        score.roll_out(env, sampler, mine, score.Config())


def test_the_picture_is_drawn_anew_at_every_saved_state(model_dir, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        evaluate, "plot_curves", lambda run: drawn.append(checkpoint.states(run)[0])
    )
    train_here(model_dir, tmp_path / "run", *"--stage1_steps 2 --stage2_steps 3".split())
    assert [path.name for path in drawn] == ["step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize("flags, message", [
    (["--task", "sudoku"], "unknown task 'sudoku'"),
    (["--alpha", "lots"], "argument --alpha: invalid float value: 'lots'"),
    (["--model", "./nowhere"], "--model ./nowhere: no config.json"),
    (["--max_new_tokens", "200"], "the model's context of 192"),
    (["--kl", "k9"], "argument --kl: invalid choice"),
    (["--group_size", "1"], "--group_size 1"),
    (["--temperature", "0"], "--temperature"),
    (["--data", "problems.jsonl"], "makes its own problems"),
    (["--alhpa", "3"], "unknown flag --alhpa"),
    (["--stage1_steps", "0", "--stage2_steps", "0"], "nothing to train"),
    (["--problems", "0"], "--problems 0: must be at least 1"),
    (["--single_turn", "--offline_ratio", "0.5"], "--offline_ratio"),
    (["--offline_ratio", "1.5"], "--offline_ratio 1.5"),
    (["--single_turn", "--reference", "stage1"], "--reference stage1"),
    (["--stage1_steps", "0", "--reference", "stage1"], "--reference stage1"),
    (["--group_size", "1", "--baseline", "group_mean"], "--group_size 1"),
    ("--problems 1 --group_size 1 --second_attempts 1 --baseline none".split(), "--normalise none"),
    (["--kl_target", "0"], "--kl_target 0: must be above 0"),
    (["--kl_target", "0.1", "--stage1_steps", "0"], "--kl_target adapts Stage I"),
    (["--kl_target", "0.1", "--single_turn"], "--kl_target adapts Stage I"),
    (["--kl_target", "0.1", "--beta2", "0"], "--kl_target multiplies --beta2"),
    (["--kl_target", "0.1", "--offline_ratio", "1"], "--kl_target is about"),
])  # fmt: skip
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    flags, message, model_dir, tmp_path, capsys
):
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(score, capsys, *places, *flags)
    assert said.count("\n") == 1 and message in said and not (tmp_path / "run").exists()


def test_a_model_directory_without_weights_is_named(model_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((Path(model_dir) / "config.json").read_text())
    said = helpers.refusal(score, capsys, "--model", bare, "--output_dir", tmp_path / "run")
    assert "no weights there" in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_damaged_weights_are_named(model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    places = "--model", tmp_path / "cut", "--output_dir", tmp_path / "run"
    said = helpers.refusal(score, capsys, *places)
    assert "can't be loaded" in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_name_that_nobody_knows_is_asked_for_once(monkeypatch, tmp_path, capsys):
    def refuse(name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    said = helpers.refusal(score, capsys, "--model", "nobodys", "--output_dir", tmp_path / "run")
    assert "--model nobodys can't be loaded: no such directory here, and the hub: Conn" in said
    assert said.count("\n") == 1


def test_an_output_directory_in_use_is_left_as_it_is(model_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = run_score("--model", model_dir, "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "is in use" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
