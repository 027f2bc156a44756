"""RRR's own arithmetic, its file of failures, and short whole runs on a random model."""

import copy
import dataclasses
import functools
import json
import re

import pytest
import torch

import evaluate
import helpers
import rrr
import test_exactness as exactness
import tiny
from report.tables import format_reflections
from sampler import Sampler
from sampling.turns import first_turn_ids, follow_up_ids
from tasks import TASKS
from tasks.env import Env
from training import batches, checkpoint, controls, models, policy
from training import loop as training
from training.scorer import Scorer
from training.setup import load_sampler

run_rrr = functools.partial(helpers.from_command_line, "rrr.py")
FEW = "--steps 3 --queries 6 --tries 2 --failures_per_step 2 --group_size 2".split()
FEW += "--max_reflection_tokens 6".split()


def train_here(model_dir, out, *flags):
    return helpers.train_here(rrr, model_dir, out, *FEW, *flags)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.mark.parametrize("reward_on", ["reflection", "retry", "both"])
@pytest.mark.parametrize("baseline, V, G, R", [
    ("none", 4, 1, 1), ("leave_one_out", 4, 2, 1), ("leave_one_out", 2, 2, 2),
    ("group_mean", 4, 2, 1),
])  # fmt: skip
def test_expected_gradient_is_that_of_the_retrys_reward_through_the_rewarded_tokens(
    reward_on, baseline, V, G, R
):
    world = exactness.make_world(V)  # y1 is the reflection, y2 the retry
    config = rrr.Config(reward_on=reward_on, baseline=baseline, normalise=False)
    y1, y2 = exactness.every_batch(V, G, R)
    rewards = world.r2[y1[..., None], y2]
    per_turn = rrr.turn_advantages(rewards, torch.ones(y1.shape), config)
    estimate = exactness.expected_loss_gradient(world, y1, y2, per_turn, [0.0, 0.0])

    p1, p2 = (p.exp() for p in exactness.turn_logprobs(world.policy, V))  # (V^2,), (V^2, V^2)
    p1 = p1 if reward_on != "retry" else p1.detach()
    p2 = p2 if reward_on != "reflection" else p2.detach()
    objective = (p1[:, None] * p2 * world.r2).sum()
    objective += 0 * sum(table.sum() for table in world.policy)  # so that each has a gradient
    shrunk = (G * R - 1) / (G * R) if baseline == "group_mean" else 1
    exact = shrunk * exactness.gradient(objective, world)
    torch.testing.assert_close(estimate, exact, atol=exactness.TOLERANCE, rtol=0)


def test_groups_are_compared_within_themselves_and_no_variance_gives_no_gradient():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    adv = rrr.turn_advantages(rewards[..., None], torch.ones(3, 4), rrr.Config())
    root3 = 3**0.5
    expected = torch.tensor([1, -1, -1, 1, 0, 0, 0, 0, -1 / root3, -1 / root3, -1 / root3, root3])
    torch.testing.assert_close(adv[:, 0], expected)
    assert (adv[:, 1] == 0).all()


def test_absent_episodes_count_nowhere():
    rewards = torch.tensor([[1.0, 0.0, 7.0], [1.0, 7.0, 7.0]])
    present = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    adv = rrr.turn_advantages(rewards[..., None], present, rrr.Config())
    torch.testing.assert_close(adv[:, 0], torch.tensor([1.0, -1.0, 0.0]))


def test_advantage_std_is_the_mean_deviation_of_the_groups_that_have_any(model_dir):
    episodes, _, _, config, _ = make_rollout(model_dir, retries=2)
    for right, std in (([1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0], 0.375), ([1, 0] * 6, 0.0)):
        episodes.retries.rewards[:] = torch.tensor(right)
        for normalise in (True, False):
            config.normalise = normalise
            assert rrr.make_batch(episodes, config).figures["advantage_std"] == std


def make_rollout(model_dir, retries=2, reflection_tokens=6):
    model, tokenizer = models.load_model(model_dir)
    sampler, env = Sampler(model, tokenizer), Env(TASKS["tiny"], tokenizer)
    limits = {"max_reflection_tokens": reflection_tokens, "max_new_tokens": 4}
    config = rrr.Config(group_size=2, retries=retries, **limits)
    problems, failures = env.task.generate("train", 0)[:3], []
    for problem, answer in zip(problems, ("1 + 1 = 2 <end>", "3 - 2 <end>", "4 *"), strict=True):
        failure = {"problem": problem, "prompt_ids": env.prompts([problem])[0]}
        failures.append(failure | {"answer_ids": tokenizer(answer).input_ids})
    caches, extend = [], sampler.extend
    sampler.extend = lambda r, *a, **k: (caches.append(r.cache), extend(r, *a, **k))[1]
    episodes = rrr.roll_out(env, sampler, batches.share_of(failures, 0, 0), config)
    return episodes, failures, env, config, caches


def test_the_retry_stands_on_the_exact_ids_of_problem_failure_and_reflection(model_dir):
    (rollout, retries, _, held), failures, env, config, caches = make_rollout(model_dir)
    reflected, retried = caches
    assert reflected is None and retried is not None  # the failure is encoded, the rest goes on
    assert len(retries.right) == len(rollout.ids) == 12
    tokenizer, task = env.tokenizer, env.task
    for row in range(12):
        failure, ids = failures[row // 4], rollout.ids[row].tolist()
        start = failure["prompt_ids"] + failure["answer_ids"]
        start += follow_up_ids(tokenizer, task.reflect, start[-1:])[0]
        assert ids[: len(start)] == start and not rollout.action_mask[row, : len(start)].any()
        reflection = rollout.action_mask[row] & (rollout.turn[row] == 1)
        end = len(start) + int(reflection.sum())
        assert reflection[len(start) : end].all()
        seam = follow_up_ids(tokenizer, task.retry, [ids[end - 1]])[0]
        assert ids[end : end + len(seam)] == seam
        before, answer = len(failure["prompt_ids"]), len(failure["answer_ids"])
        marked = held[row].nonzero().flatten().tolist()
        assert marked == list(range(before, before + answer))
    shared = [rollout.ids[row][rollout.turn[row] < 2].tolist() for row in range(2)]
    assert shared[0] == shared[1]  # R retries after the same reflection


REWARDED = [("reflection", {1}), ("retry", {2}), ("both", {1, 2})]
PENALISED = [("reflection", {1}), ("both", {1, 2}), ("all", {0, 1, 2})]


@pytest.mark.parametrize("reward_on, rewarded", REWARDED)
def test_no_other_token_has_an_advantage(model_dir, reward_on, rewarded):
    episodes, _, _, config, _ = make_rollout(model_dir, retries=1)
    config.reward_on, rollout = reward_on, episodes.rollout
    episodes.retries.rewards[:] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    batch = rrr.make_batch(episodes, config)
    wanted = rollout.action_mask & torch.isin(rollout.turn, torch.tensor(sorted(rewarded)))
    assert ((batch.advantages != 0) == wanted).all()
    judged = [[0, None, right] for right in (1, 0, 0, 1, 1, 0)]  # what the page of rollouts says
    assert [[None if r != r else r for r in row] for row in batch.rewards.tolist()] == judged


@pytest.mark.parametrize("kl_on, turns", PENALISED)
def test_the_kl_covers_what_its_flag_says(model_dir, kl_on, turns):
    episodes, _, _, config, _ = make_rollout(model_dir)
    config.kl_on, rollout = kl_on, episodes.rollout
    batch = rrr.make_batch(episodes, config)
    scored = rollout.action_mask | episodes.held
    assert set(rollout.turn[batch.kl_coef > 0].tolist()) == turns
    assert not (batch.kl_coef[~scored] > 0).any()
    assert (batch.kl_coef[rollout.action_mask & (rollout.turn == 1)] == config.beta).all()


def test_a_reflection_that_hits_the_token_limit_is_closed_and_counted(model_dir):
    (rollout, *_), _, env, *_ = make_rollout(model_dir, reflection_tokens=1)
    cut = ~rollout.stopped[:, 1]
    assert cut.any()
    for row in cut.nonzero().flatten().tolist():
        reflection = (rollout.action_mask[row] & (rollout.turn[row] == 1)).nonzero().flatten()
        assert rollout.ids[row, reflection[-1] + 1] == env.tokenizer.eos_token_id


def test_a_run_writes_its_directory_and_resumes_exactly(model_dir, tmp_path, monkeypatch):
    whole = train_here(model_dir, tmp_path / "whole")
    assert [row["step"] for row in whole] == [0, 1, 2]
    assert all(row["ratio_error"] < 1e-4 for row in whole)
    assert all(whole[0][key] == pytest.approx(0, abs=1e-6) for key in ("kl_t1", "kl_t2", "kl_t3"))
    assert "eval_retry_given_failure" in whole[1]
    written = {p.name for p in (tmp_path / "whole").iterdir()}
    assert written >= {"config.json", "failures.jsonl", "results.json", "reflections.txt"}
    assert written >= {"checkpoint", "curves.png"}
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert len(results["controls"]) == 10 and "retry_given_failure" in results["trained"]["sampled"]

    logged = training.log

    def stop_at_2(run, row, text):
        logged(run, row, text)
        if row["step"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "log", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        train_here(model_dir, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train_here(model_dir, tmp_path / "cut", "--resume")
    assert helpers.without_times(resumed) == helpers.without_times(whole)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """(directory of a run whose checkpoint is another random model, its base)."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    checkpoint.save_model(tiny.build_model(), tiny.build_tokenizer(), run / "checkpoint")
    return run, helpers.save_random_model(run / "base")


@pytest.fixture
def exam(two_models, monkeypatch):
    monkeypatch.setattr(evaluate, "CACHE_TOKENS", 300)  # pieces of a few problems
    task = dataclasses.replace(TASKS["tiny"], verify=helpers.arbitrary_verdict)
    limits = {"max_new_tokens": 4, "max_reflection_tokens": 6}
    config = rrr.Config(model=two_models[1], **limits)
    return evaluate.Exam(Env(task, tiny.build_tokenizer()), config, "reflect_retry")


def test_controls_that_share_first_attempts_have_the_figures_of_each_alone(
    exam, two_models, monkeypatch
):
    run, problems = two_models[0], exam.env.task.generate("validation", 0)[:12]
    asked, first_attempts = [], exam.env.first_attempts
    find = functools.partial(load_sampler, env=exam.env, config=exam.config)
    with monkeypatch.context() as patch:
        patch.setattr(
            exam.env, "first_attempts", lambda s, p, *a, **k: (
                asked.append(len(p)), first_attempts(s, p, *a, **k))[1]
        )  # fmt: skip
        results = controls.with_controls(exam, run, problems, find)
    text = (run / "reflections.txt").read_text()
    assert sum(asked) == 4 * 12 and len(asked) > 4  # two models, two modes
    paths = two_models[1], str(run / "checkpoint")
    base, trained = (load_sampler(path, exam.env, exam.config) for path in paths)
    alone = {"base": (base, exam.method), "trained": (trained, exam.method)}
    for name, way in (alone | controls.controls(base, trained)).items():
        found = {**results, **results["controls"]}[name]
        for mode, T in controls.MODES.items():
            figures, talks = dataclasses.replace(exam, method=way[1])(way[0], problems, T)
            assert found[mode] == figures, (name, mode)
            alone[name, mode] = talks
    pair = [alone[f"{name}, reflect_retry", "sampled"] for name in ("base", "trained")]
    assert text == format_reflections(*pair) and text.count("before: ") > 1
    results.pop("controls")
    exam.config.controls = False
    assert controls.with_controls(exam, run, problems, find) == results
    assert (run / "reflections.txt").read_text() == text


def test_without_controls_the_rest_of_a_run_is_the_same(model_dir, tmp_path):
    for name, flags in (("with", ()), ("without", ("--controls", "False"))):
        train_here(model_dir, tmp_path / name, *flags)
    texts, results = [], []
    for name in ("with", "without"):
        texts.append((tmp_path / name / "reflections.txt").read_text())
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert len(results[0].pop("controls")) == 10 and results[0] == results[1]
    assert texts[0] == texts[1] and "before: " in texts[0]


def test_whole_episodes_as_groups(model_dir, tmp_path):
    rows = train_here(model_dir, tmp_path / "run", "--group", "episode", "--retries", "2")
    assert len(rows) == 3 and "kl_t1" in rows[0]
    assert not (tmp_path / "run" / "failures.jsonl").exists()


def test_an_episode_batch_without_a_failure_teaches_nothing(model_dir, monkeypatch):
    model, tokenizer = models.load_model(model_dir)
    task = dataclasses.replace(TASKS["tiny"], verify=lambda text, problem: True)
    mine = batches.share_of(task.generate("train", 0)[:2], 0, 0)
    config = rrr.Config(group_size=2, baseline="none", normalise=False)
    sampler = Sampler(model, tokenizer)
    episodes = rrr.roll_out_episodes(Env(task, tokenizer), sampler, mine, config)
    batch = rrr.make_batch(episodes, config)
    assert len(episodes.rollout.ids) == 0 and "reward" not in batch.figures
    optimizer, before = torch.optim.AdamW(model.parameters()), copy.deepcopy(model.state_dict())
    done = policy.update(Scorer(model), optimizer, batch, config)
    assert done.norm == 0 and not done.wrong and done.idle and not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_failure_at_all_is_said_before_anything_is_written(
    model_dir, tmp_path, capsys, monkeypatch
):
    task = dataclasses.replace(TASKS["tiny"], verify=lambda text, problem: True)
    monkeypatch.setitem(TASKS, "tiny", task)
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(rrr, capsys, *places, "--probe", 0, *FEW)
    assert "no failure in 2 answers to each of 6 queries" in said
    assert not (tmp_path / "run").exists()


def test_first_attempts_that_the_data_gives_are_the_failures(model_dir, tmp_path, monkeypatch):
    task = dataclasses.replace(TASKS["tiny"], given=lambda problem: "1 + 1 = 2")
    monkeypatch.setitem(TASKS, "tiny", task)
    train_here(model_dir, tmp_path / "run")
    _, *failures = (tmp_path / "run" / "failures.jsonl").read_text().splitlines()
    assert failures and {json.loads(row)["answer"] for row in failures} == {"1 + 1 = 2"}


def test_failures_are_the_models_own_and_are_read_back(model_dir, tmp_path, capsys):
    path = tmp_path / "failures.jsonl"
    flags = ("--model", model_dir, "--collect", "--failures", path)
    assert run_rrr(*flags, "--queries", "5").returncode == 0
    origin, *rows = map(json.loads, path.read_text().splitlines())
    assert origin["origin"].keys() >= {"model", "task", "seed", "success_rate", "fingerprint"}
    assert len(rows) == 5
    model, tokenizer = models.load_model(model_dir)
    for row in rows:
        assert row["prompt_ids"] == first_turn_ids(tokenizer, TASKS["tiny"].prompt(row["problem"]))
        assert tokenizer.decode(row["answer_ids"]).removesuffix(" <end>") == row["answer"]
        assert not TASKS["tiny"].verify(row["answer"], row["problem"])
    env = Env(TASKS["tiny"], tokenizer)
    assert rrr.read_failures(str(path), env, Sampler(model, tokenizer), rrr.Config()) == rows
    assert "does not exist yet" in helpers.refusal(rrr, capsys, *flags)
    assert len(path.read_text().splitlines()) == 6


def test_failures_keep_the_day_they_were_collected_on_for_a_run_on_another(tmp_path, monkeypatch):
    model, path = helpers.save_dated_model(tmp_path / "model"), tmp_path / "failures.jsonl"
    helpers.on_day(monkeypatch, "2031-03-05")
    train = functools.partial(helpers.train_here, rrr, model)
    with pytest.raises(FileNotFoundError):  # no metrics: there is no run yet
        train(tmp_path / "none", *FEW, "--collect", "--failures", str(path))
    helpers.on_day(monkeypatch, "2031-03-06")
    loaded = models.load_model(model)
    env, config = Env(TASKS["tiny"], loaded[1]), rrr.Config(max_reflection_tokens=6)
    with pytest.raises(ValueError, match="line 2: field 'prompt_ids' is not"):
        rrr.read_failures(str(path), env, Sampler(*loaded), config)  # today's prompts are others
    with monkeypatch.context() as patch:
        patch.setattr(training, "update", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "run", *FEW, "--failures", str(path))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["day"] == "2031-03-05T12:00:00"
    helpers.on_day(monkeypatch, "2031-03-07")
    train(tmp_path / "run", *FEW, "--failures", str(path), "--resume")


@pytest.mark.parametrize("change, message", [
    (lambda lines: [lines[0], lines[1], "{"], "line 3: not JSON"),
    (lambda lines: [lines[0], '{"problem": {}}'], "line 2: field 'prompt_ids'"),
    (lambda lines: [lines[0], lines[1].replace("[5, 1]", "[999]")], "line 2: field 'answer_ids'"),
    (lambda lines: [lines[0], lines[1].replace("[5, 1]", "[5" + 99 * ", 5" + "]")],
     "line 2: with 96 tokens after it"),
    (lambda lines: [lines[0], lines[1].replace('"nums"', '"numbers"')],
     "line 2: field 'prompt_ids' is not"),
    (lambda lines: lines[:1], "has no failures"),
    (lambda lines: lines[1:], "line 1: field 'origin'"),
    (lambda lines: [re.sub('"fingerprint": "..', '"fingerprint": "zz', lines[0])],
     "of model there on task tiny"),
    (lambda lines: [lines[0].replace('"task": "tiny"', '"task": "math"')], "on task math"),
])  # fmt: skip
def test_a_bad_failures_file_is_refused_in_one_line(model_dir, tmp_path, change, message):
    model, tokenizer = models.load_model(model_dir)
    sampler, path = Sampler(model, tokenizer), tmp_path / "failures.jsonl"
    origin = {"model": "there", "task": "tiny", "fingerprint": models.fingerprint(model)}
    problem = {"nums": [1, 2, 3], "target": 6}
    prompt_ids = first_turn_ids(tokenizer, TASKS["tiny"].prompt(problem))
    row = {"problem": problem, "answer": "x", "prompt_ids": prompt_ids, "answer_ids": [5, 1]}
    path.write_text("\n".join(change([json.dumps({"origin": origin}), json.dumps(row)])) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        rrr.read_failures(str(path), Env(TASKS["tiny"], tokenizer), sampler, rrr.Config())


@pytest.mark.parametrize("flags, message", [
    (["--group_size", "1"], "--group_size 1"),
    (["--max_reflection_tokens", "150"], "the model's context of 192"),
    (["--failures", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--collect"], "--collect writes a new file"),
    (["--preset", "fast"], "argument --preset: invalid choice"),
])  # fmt: skip
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    flags, message, model_dir, tmp_path, capsys
):
    places = "--model", model_dir, "--output_dir", tmp_path / "run"
    said = helpers.refusal(rrr, capsys, *places, *flags)
    assert said.count("\n") == 1 and message in said and not (tmp_path / "run").exists()
