"""Every method of evaluation, with a sampler of prepared texts; votes, resuming, the probe."""

import dataclasses
import errno
import gc
import json
import os
import random
import signal
import sys
import weakref
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import evaluate
import helpers
import rrr
import score
import tiny
from report import figures
from sampler import Sampler
from tasks import TASKS
from tasks.env import Env
from training import checkpoint, methods, partial, progress, setup
from training.distributed import Stopped


def slow_edit_distance(a, b):
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replace = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, replace)
    return table[-1][-1]


def test_edit_distance_equals_the_textbook_table():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.randrange(3) for _ in range(rng.randrange(9))] for _ in range(2))
        assert figures.edit_distance(a, b) == slow_edit_distance(a, b)


def talks_of(*rows):
    """Conversations of two attempts: their verdicts, and their answers (else one a verdict)."""
    talks, rest = [], {"ids": [1], "stopped": 1}
    for r1, r2, *answers in rows:
        answers = answers or [str(r1), str(r2)]
        ys = [{"answer": a, "right": float(r)} | rest for a, r in zip(answers, (r1, r2))]
        talks.append({"attempts": ys, "values": figures.values_of(ys, [], 2)})
    return talks


def test_standard_errors_treat_samples_of_one_problem_as_related():
    # three problems, two samples each: means 1, 0, 1/2
    talks = talks_of(*((r, r) for r in (1, 1, 0, 0, 1, 0)))
    f = figures.summarize(talks, samples=2)
    assert f["n"] == 3 and f["acc_t1"] == 0.5
    assert f["acc_t1_se"] == pytest.approx(np.std([1, 0, 0.5], ddof=1) / np.sqrt(3))


class ScriptedSampler:
    """Answers each turn with prepared texts instead of a model's, and keeps what it was asked."""

    model, token_bytes = SimpleNamespace(device=torch.device("cpu")), 1
    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, tokenizer, *turns):
        self.turns, self.tokenizer, self.asked = turns, tokenizer, []

    def generate(self, prompts, group_size=1, seeds=None, **limits):
        self.asked.append((prompts, limits))
        return self.rollout(list(range(len(self.turns[0]))), 1)

    def extend(self, rollout, instructions, rows=None, seeds=None, free=False, **limits):
        self.asked.append((instructions, limits))
        rows = range(len(rollout.rows)) if rows is None else rows
        return self.rollout([rollout.rows[row] for row in rows], rollout.stopped.shape[1] + 1)

    def rollout(self, rows, turns):
        scripted = self

        class Rollout:
            stopped = torch.ones(len(rows), turns, dtype=torch.bool)
            seeds = torch.arange(len(rows))
            prompt_index = torch.tensor(rows)

            @staticmethod
            def completion_ids(turn):
                texts = [scripted.turns[turn][row] for row in rows]
                return [scripted.tokenizer(t, add_special_tokens=False).input_ids for t in texts]

            @staticmethod
            def last_ids():
                return [scripted.tokenizer.eos_token_id] * len(rows)

        Rollout.rows = rows
        return Rollout


RIGHT, WRONG, NONSENSE = "19 - 16 = 3 ; 8 * 3 = 24", "16 / 8 = 2 ; 19 + 2 = 21", "19 - 16 = 9"
PROBLEM = {"nums": [8, 19, 16], "target": 24}
LIMITS = {"max_new_tokens": 16, "max_reflection_tokens": 72}


def try_out(sampler, problems, method="self_correct", temperature=1.0, **changes):
    env = Env(TASKS["tiny"], sampler.tokenizer)
    protocol = evaluate.Protocol(method, temperature, **LIMITS | changes)
    return evaluate.evaluate(sampler, env, problems, protocol)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def test_every_figure_of_a_hand_made_evaluation(tokenizer):
    first = [WRONG, WRONG, RIGHT, RIGHT]
    second = ["bad " + RIGHT, "ok " + WRONG, "bad " + NONSENSE, "ok " + RIGHT]
    sampler = ScriptedSampler(tokenizer, first, second)
    f, talks = try_out(sampler, [PROBLEM] * 4, temperature=0.7)
    expected = {
        "n": 4, "acc_t1": 0.5, "acc_t2": 0.5, "delta": 0, "i_to_c": 0.25, "c_to_i": 0.25,
        "changed": 0.5, "well_formed": 7 / 8, "truncated": 0, "failures": 2,
        "retry_given_failure": 0.5,
    }  # fmt: skip
    assert {k: f[k] for k in expected} == pytest.approx(expected)
    ids = [[tokenizer(t).input_ids for t in texts] for texts in (first, second)]
    ratios = [slow_edit_distance(a, b) / (len(a) + len(b)) for a, b in zip(*ids)]
    assert f["edit_ratio"] == pytest.approx(sum(ratios) / 4)
    assert f["tokens"] == sum(len(i) + 1 for texts in ids for i in texts) / 4
    assert [t["attempts"][1]["right"] for t in talks] == [1, 0, 0, 1]
    assert sampler.asked[1][0] == [tokenizer("<user> fix <assistant>").input_ids] * 4
    assert all(limits == {"max_new_tokens": 16, "temperature": 0.7} for _, limits in sampler.asked)


def test_only_failures_reflect_and_retry_and_a_right_answer_stands(tokenizer):
    turns = [WRONG, RIGHT, WRONG], ["got 21", "", "got 21 try"], [RIGHT, "", WRONG]
    sampler = ScriptedSampler(tokenizer, *turns)
    f, talks = try_out(sampler, [PROBLEM] * 3, "reflect_retry")
    expected = {"acc_t1": 1 / 3, "acc_t2": 2 / 3, "c_to_i": 0, "failures": 2}
    expected |= {"retry_given_failure": 0.5, "reflection_tokens": 2.5}
    assert {k: f[k] for k in expected} == pytest.approx(expected)
    assert [t["said"] for t in talks] == [["got 21"], [], ["got 21 try"]]
    for message, asked in zip(("reflect", "retry"), sampler.asked[1:]):
        assert asked[0] == [tokenizer(f"<user> {message} <assistant>").input_ids] * 2
    assert sampler.asked[1][1]["max_new_tokens"] == 72


def test_the_error_of_a_figure_after_failure_takes_a_problems_samples_for_related():
    talks = talks_of((0, 1), (0, 1), (0, 0), (0, 0), (1, 1), (1, 1))
    one, two = (figures.summarize(talks, samples) for samples in (1, 2))
    assert one["retry_given_failure"] == two["retry_given_failure"] == 0.5
    assert one["retry_given_failure_se"] == pytest.approx(0.25 * (6 / 5) ** 0.5)
    assert two["retry_given_failure_se"] == pytest.approx(0.5**1.5 * (3 / 2) ** 0.5)


def test_when_nothing_failed_nobody_retries(tokenizer):
    sampler = ScriptedSampler(tokenizer, [RIGHT])
    f, _ = try_out(sampler, [PROBLEM], "reflect_retry", 0.0)
    assert f["acc_t2"] == 1 and f["failures"] == 0 and "retry_given_failure" not in f


def test_delta_is_what_was_corrected_minus_what_was_broken():
    f = figures.summarize(talks_of(*np.random.default_rng(0).integers(2, size=(50, 2))))
    assert f["delta"] == pytest.approx(f["i_to_c"] - f["c_to_i"]) and f["delta"] != 0


def test_the_majority_wins_no_answer_has_no_vote_and_of_equals_the_first_wins():
    wrong, right, none = (0, 0, "a", "a"), (1, 1, "b", "b"), (0, 0, None, None)
    f = figures.votes(talks_of(wrong, right, right, none) + talks_of(none, none, none, right), 4)
    assert f["vote_parallel_2"] == 0 and f["vote_parallel_4"] == 1
    f = figures.votes(talks_of((0, 1, "a", "b"), wrong, wrong, wrong), 4)
    assert f["vote_corrected_2"] == 1  # one conversation of two answers
    assert f["vote_parallel_2"] == 0  # two of one
    assert f["vote_corrected_4"] == 1 and f["vote_parallel_4"] == 0  # b before a


def test_a_critique_comes_before_every_rewrite_after_right_and_wrong_answers(tokenizer):
    sampler = ScriptedSampler(tokenizer, [WRONG, RIGHT], ["got 21", "got 24"], [RIGHT, WRONG])
    f, talks = try_out(sampler, [PROBLEM] * 2, "self_refine")
    assert (f["i_to_c"], f["c_to_i"]) == (0.5, 0.5)
    assert [t["said"] for t in talks] == [["got 21"], ["got 24"]]
    for message, asked in zip((TASKS["tiny"].critique, TASKS["tiny"].rewrite), sampler.asked[1:]):
        assert asked[0] == [tokenizer(f"<user> {message} <assistant>").input_ids] * 2
    assert sampler.asked[1][1]["max_new_tokens"] == 72


def test_every_further_attempt_follows_the_last_and_a_right_answer_ends_a_retry(tokenizer):
    turns = [WRONG, WRONG, RIGHT], ["bad " + WRONG, RIGHT, "bad " + WRONG], [RIGHT, WRONG, WRONG]
    three = [PROBLEM] * 3
    f, _ = try_out(ScriptedSampler(tokenizer, *turns), three, attempts=3)
    assert [f[f"acc_t{t}"] for t in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    f, talks = try_out(ScriptedSampler(tokenizer, *turns), three, "blind_retry", attempts=3)
    assert [f[f"acc_t{t}"] for t in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [len(t["attempts"]) for t in talks] == [3, 2, 1]


def test_memory_of_first_attempts_is_free_when_the_last_way_has_gone_on_from_them():
    sampler, alive = Sampler(tiny.build_model(), tiny.build_tokenizer()), []
    generate, extend = sampler.generate, sampler.extend

    def first(*rest, **limits):
        rollout = generate(*rest, **limits)
        alive.append(weakref.ref(rollout.cache))
        return rollout

    def later(*rest, **limits):
        alive.append(alive[0]() is not None)
        return extend(*rest, **limits)

    sampler.generate, sampler.extend = first, later
    env = Env(dataclasses.replace(TASKS["tiny"], verify=lambda *_: False), sampler.tokenizer)
    protocol = evaluate.Protocol("self_correct", 1.0, 4, 0, attempts=3)
    ways = dict.fromkeys("ab", ((sampler,) * 3, "self_correct"))
    one, two = methods.converse(ways, env, [PROBLEM] * 2, [1, 2], protocol).values()
    assert alive[1:] == [True, True, True, False] and one == two


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_turn_that_is_the_last_to_go_on_from_another_gives_up_its_cache(method, monkeypatch):
    sampler, held = Sampler(tiny.build_model(), tiny.build_tokenizer()), []
    turn = Sampler._turn

    def spy(sampler, before, *rest, **more):
        rollout = turn(sampler, before, *rest, **more)
        held[:] = [r for r in held if r.cache is not None] + [rollout]
        most.append(len(held))
        return rollout

    monkeypatch.setattr(Sampler, "_turn", spy)
    env = Env(dataclasses.replace(TASKS["tiny"], verify=lambda *_: False), sampler.tokenizer)
    protocol = evaluate.Protocol(method, 1.0, 4, 4, attempts=3)
    for ways, count in (("a", 1), ("ab", 2)):  # with others, the first attempts are held too
        held.clear()
        most = []
        ways = dict.fromkeys(ways, ((sampler,) * 3, method))
        methods.converse(ways, env, [PROBLEM] * 2, [1, 2], protocol)
        assert max(most) == count


def test_an_evaluation_that_was_stopped_goes_on_and_ends_with_the_same_figures(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "CACHE_TOKENS", 1)  # a piece for every problem
    flags = {"limit": 6, "temperature": 1.0, "samples": 2}
    files = [tmp_path / name for name in ("whole.json", "parts.json")]
    whole, parts = (evaluate.Config(**flags, output=str(file)) for file in files)
    evaluate.main(whole)
    converse, calls = evaluate.converse, []

    def stop_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped(signal.SIGINT)
        return converse(*arguments)

    monkeypatch.setattr(evaluate, "converse", stop_at_the_fourth)
    with pytest.raises(SystemExit):
        evaluate.main(parts)
    with open(parts.output + ".partial", "a") as file:
        file.write('{"cut off')
    with pytest.raises(SystemExit):
        evaluate.main(dataclasses.replace(parts, limit=5))
    assert "another limit" in capsys.readouterr().err
    evaluate.main(parts)
    assert len(calls) == 7  # three, one that was stopped, and the three that were left
    a, b = (json.loads(file.read_text()) for file in files)
    assert a == b and len(a["conversations"]) == 12 and not list(tmp_path.glob("*.partial"))


def stop_at(monkeypatch, number: int) -> None:
    """The so many-th piece of an evaluation is the end of it, this once."""
    converse, left = evaluate.converse, [number]

    def stop(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise Stopped(signal.SIGINT)
        return converse(*arguments)

    monkeypatch.setattr(evaluate, "CACHE_TOKENS", 1)  # a piece for every problem
    monkeypatch.setattr(evaluate, "converse", stop)


def stopped_evaluation(tmp_path, monkeypatch, **flags):
    """(config of one that was stopped after two of three problems, its .partial file)."""
    config = evaluate.Config(limit=3, output=str(tmp_path / "e.json"), **flags)
    stop_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        evaluate.main(config)
    return config, tmp_path / "e.json.partial"


@pytest.mark.parametrize("harm, kept", [
    (lambda header, a, b: "", 0),
    (lambda header, a, b: "\n", 0),
    (lambda header, a, b: header[:9], 0),
    (lambda header, a, b: header[:-1], 0),  # all but its newline
    (lambda header, a, b: header[:9] + "\n" + a, 0),
    (lambda header, a, b: "\0" * 99, 0),
    (lambda header, a, b: "[" * 99999 + "\n", 0),
    (lambda header, a, b: header, 0),
    (lambda header, a, b: header + a[:-9], 0),
    (lambda header, a, b: header + a + b[:-1], 1),
    (lambda header, a, b: header + a + "\n" + b, 1),
    (lambda header, a, b: header + a + "\0" * 99, 1),
    (lambda header, a, b: header + a + b, 2),
])  # fmt: skip
def test_an_evaluation_goes_on_from_what_is_whole_of_what_was_left(
    harm, kept, tmp_path, monkeypatch
):
    config, path = stopped_evaluation(tmp_path, monkeypatch)
    path.write_text(harm(*path.read_text().splitlines(keepends=True)))
    said, converse = [], evaluate.converse
    monkeypatch.setattr(evaluate, "converse", lambda *a: said.append(a) or converse(*a))
    evaluate.main(config)
    assert len(said) == 3 - kept and not path.exists()
    assert len(json.loads((tmp_path / "e.json").read_text())["conversations"]) == 3


def test_what_was_left_by_other_problems_or_another_reflector_is_not_gone_on_from(
    tmp_path, monkeypatch, capsys
):
    def put(last):
        rows = [{"nums": [n, 1], "target": n + 1} for n in (1, 2, last)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    data, other = tmp_path / "data.jsonl", tmp_path / "other"
    helpers.save_random_model(other)
    put(3)
    flags = {"task": "countdown", "data": f"test={data}", "split": "test", "max_new_tokens": 4}
    flags |= {"method": "reflect_retry", "reflector": str(other), "max_reflection_tokens": 4}
    config, path = stopped_evaluation(tmp_path, monkeypatch, **flags)
    left = path.read_text()
    model = tiny.build_model()
    model.lm_head.weight.data += 1
    put(4)
    with pytest.raises(SystemExit):
        evaluate.main(config)
    assert f"{path} was left by an evaluation with another test: " in capsys.readouterr().err
    put(3)
    checkpoint.save_model(model, tiny.build_tokenizer(), other)
    with pytest.raises(SystemExit):
        evaluate.main(config)
    assert "with another reflector's weights: " in capsys.readouterr().err
    assert path.read_text() == left


def test_what_was_left_is_there_at_every_moment_of_going_on(tmp_path, monkeypatch):
    config, path = stopped_evaluation(tmp_path, monkeypatch)
    path.write_text(path.read_text() + '{"cut off')
    left = path.read_text()

    def killed(file):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "sync", killed)
    with pytest.raises(SystemExit):
        evaluate.main(config)
    assert path.read_text() == left


def test_an_evaluation_that_goes_on_the_next_day_has_the_prompts_of_the_first(
    tmp_path, monkeypatch
):
    model = helpers.save_dated_model(tmp_path / "model")
    helpers.on_day(monkeypatch, "2031-03-05")
    config, _ = stopped_evaluation(tmp_path, monkeypatch, model=model)
    helpers.on_day(monkeypatch, "2031-03-06")
    said, converse = [], evaluate.converse

    def noting(cast, env, problems, *rest):
        today = Env(env.task, env.tokenizer)
        said.append((env.day, env.prompts(problems) != today.prompts(problems)))
        return converse(cast, env, problems, *rest)

    monkeypatch.setattr(evaluate, "converse", noting)
    evaluate.main(config)
    evaluate.main(dataclasses.replace(config, output=None))
    assert said == [("2031-03-05T12:00:00", True)] + [("2031-03-06T12:00:00", False)] * 3


def other_words(path) -> None:
    """A model's tokenizer with two words at each other's places."""
    file = path / "tokenizer.json"
    core = json.loads(file.read_text())
    words = core["model"]["vocab"]
    words["+"], words["-"] = words["-"], words["+"]
    file.write_text(json.dumps(core))


def one_word_more(path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["maybe"])
    tokenizer.save_pretrained(path)


def another_template(path) -> None:
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def test_a_reflector_reads_the_same_words_in_the_same_ids_or_is_refused(tmp_path, capsys):
    model = helpers.save_random_model(tmp_path / "model")
    flags = "--model", model, "--limit", "2", "--method", "reflect_retry"
    for harm in (other_words, one_word_more):
        other = tmp_path / harm.__name__
        helpers.save_random_model(other)
        harm(other)
        said = helpers.refusal(evaluate, capsys, *flags, "--reflector", other)
        assert f"{other} has another tokenizer than --model {model}" in said
        assert said.count("\n") == 1
    config, tokenizer = evaluate.Config(model=model), tiny.build_tokenizer()
    env = Env(TASKS["tiny"], tokenizer)
    another_template(tmp_path / "model")  # what is said between attempts is of the env's
    assert setup.load_sampler(model, env, config).tokenizer is tokenizer


def test_a_reflector_without_room_for_the_conversation_is_refused(tmp_path, capsys):
    model, short = tiny.build_model(), tmp_path / "short"
    model.config.max_position_embeddings = 50
    checkpoint.save_model(model, tiny.build_tokenizer(), short)
    flags = "--model", helpers.save_random_model(tmp_path / "model"), "--method", "reflect_retry"
    for more in ((), ("--overlong", "drop")):
        said = helpers.refusal(evaluate, capsys, *flags, "--reflector", short, "--limit", 2, *more)
        assert f"error: --reflector {short}: " in said and said.count("\n") == 1
        assert "don't fit the model's context of 50" in said
    said = helpers.refusal(evaluate, capsys, *flags, "--reflector", tmp_path / "nowhere")
    assert f"error: --reflector {tmp_path}/nowhere: " in said and said.count("\n") == 1


def test_a_reflector_that_does_not_stop_at_the_end_of_a_turn_is_refused(tmp_path):
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model()
    tokenizer.eos_token = "<pad>"  # the template still ends a turn with <end>
    env, config = Env(TASKS["tiny"], tokenizer), evaluate.Config()
    for name, stop in (("good", "<end>"), ("endless", "<pad>")):
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
        checkpoint.save_model(model, tokenizer, tmp_path / name)
    setup.load_sampler(str(tmp_path / "good"), env, config)
    with pytest.raises(ValueError, match="ends a turn with '<end>', where the model does not stop"):
        setup.load_sampler(str(tmp_path / "endless"), env, config)


def probed(tokenizer, turns, method, keys):
    config, env = rrr.Config(probe=64, seed=0), Env(TASKS["tiny"], tokenizer)
    exam, sampler = evaluate.Exam(env, config, method), ScriptedSampler(tokenizer, *turns)
    setup.probe(lambda *rest: exam(sampler, *rest), [PROBLEM] * len(turns[0]), config, keys)


def test_training_that_would_have_no_signal_is_refused_with_what_to_try(tokenizer):
    both, retry = ["acc_t1", "acc_t2"], ["retry_given_failure"]
    none = "of 2 training problems at T = 1, acc_t1 0%, acc_t2 0% .* Try --shots 3"
    with pytest.raises(ValueError, match=none):
        probed(tokenizer, [[WRONG] * 2, [WRONG] * 2], "self_correct", both)
    with pytest.raises(ValueError, match="acc_t1 100%, acc_t2 100% .* Try harder data"):
        probed(tokenizer, [[RIGHT] * 2, [RIGHT] * 2], "self_correct", both)
    with pytest.raises(ValueError, match="retry_given_failure 0%"):
        probed(tokenizer, [[WRONG, RIGHT], ["got"] * 2, [WRONG] * 2], "reflect_retry", retry)
    with pytest.raises(ValueError, match="retry_given_failure 100%"):  # nothing failed: no retry
        probed(tokenizer, [[RIGHT] * 2], "reflect_retry", retry)
    wrong, right, mixed = [WRONG] * 2, [RIGHT] * 2, [WRONG, RIGHT]
    for first, second in ((wrong, mixed), (mixed, wrong), (wrong, right)):
        probed(tokenizer, [first, second], "self_correct", both)
    probed(tokenizer, [[WRONG] * 2, ["got"] * 2, [WRONG, RIGHT]], "reflect_retry", retry)


def test_a_probe_of_no_problems_samples_nothing():
    setup.probe(None, [], SimpleNamespace(probe=0))


def test_a_first_attempt_that_the_data_gives_stands_in_the_rollout_as_if_sampled(tokenizer):
    task = dataclasses.replace(TASKS["tiny"], given=lambda problem: WRONG)
    stops = torch.arange(len(tokenizer)) == tokenizer.eos_token_id
    sampler = SimpleNamespace(pad_id=0, is_stop=stops, model=SimpleNamespace(device="cpu"))
    env, problems = Env(task, tokenizer), [PROBLEM, PROBLEM | {"target": 3}]
    prompts = env.prompts(problems)
    assert prompts[0] != prompts[1]
    rollout = env.first_attempts(sampler, problems, 2, [1, 2, 3, 4])
    ids = tokenizer(WRONG).input_ids
    assert rollout.completion_ids(0) == [ids] * 4
    assert rollout.last_ids() == [tokenizer.eos_token_id] * 4
    assert rollout.stopped.tolist() == [[True]] * 4
    for row, prompt in enumerate([prompts[0]] * 2 + [prompts[1]] * 2):
        length = rollout.lengths[row]
        assert rollout.ids[row, :length].tolist() == [*prompt, *ids, tokenizer.eos_token_id]
        assert rollout.turn[row].tolist() == [0] * length + [-1] * (rollout.ids.shape[1] - length)
    assert rollout.prompt_index.tolist() == [0, 0, 1, 1] and rollout.cache is None


def test_a_generic_reflection_stands_in_the_models_own_turn_before_the_retry(tokenizer):
    task, asked = dataclasses.replace(TASKS["tiny"], given=lambda problem: WRONG), []
    stops = torch.arange(len(tokenizer)) == tokenizer.eos_token_id
    sampler = SimpleNamespace(pad_id=0, is_stop=stops, model=SimpleNamespace(device="cpu"))
    env = Env(task, tokenizer)
    sampler.extend = lambda before, more, **rest: asked.append((before.cache, more, rest))
    before = env.first_attempts(sampler, [PROBLEM] * 2, 1, [8, 9])
    before.cache = "one to go on from"
    protocol = evaluate.Protocol("generic_reflection", 1.0, **LIMITS)
    methods.next_attempts((sampler,) * 3, env, before, [1], protocol)
    ((cache, more, rest),) = asked
    said = f"<user> reflect <assistant> {task.generic_reflection} <end> <user> retry <assistant>"
    assert more == [tokenizer(said).input_ids]
    assert cache is None and rest["seeds"].tolist() == [9] and rest["rows"] == [1]
    assert rest["max_new_tokens"] == 16


FEW = {script: [*helpers.FEW[script], "--eval_every", "0"] for script in ("score", "rrr")}


def count_pieces(patch, stop=None) -> list:
    """The pieces of all evaluations from now on; Ctrl-C comes in that of this number."""
    made, converse = [], evaluate.converse

    def counted(*arguments):
        made.append(1)
        if len(made) == stop:
            raise Stopped(signal.SIGINT)
        return converse(*arguments)

    patch.setattr(evaluate, "converse", counted)
    return made


def run_whole(script, tmp_path, name, *flags, stop=None) -> int:
    """A run in which Ctrl-C comes in the so many-th piece; how many pieces it made."""
    module, model = import_module(script), tmp_path / "model"
    if not model.exists():
        helpers.save_random_model(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "CACHE_TOKENS", 50)  # pieces of one or two problems
        made = count_pieces(patch, stop)
        with nullcontext() if stop is None else pytest.raises(SystemExit) as ended:
            helpers.train_here(module, str(model), tmp_path / name, *FEW[script], *flags)
    assert stop is None or ended.value.code == 130
    return len(made)


@pytest.mark.parametrize("script", FEW)
def test_a_final_table_that_was_stopped_goes_on_and_ends_as_if_it_was_not(script, tmp_path, capsys):
    pieces = run_whole(script, tmp_path, "whole")
    assert pieces >= 2 * 4  # four passes
    run, whole = tmp_path / "cut", tmp_path / "whole"
    assert run_whole(script, tmp_path, "cut", stop=pieces // 2) == pieces // 2
    path = run / "results.partial.jsonl"
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"stopped by Ctrl-C: what is done is in {path}: go on with --resume")
    )
    with open(path, "a") as file:
        file.write('{"pass": ["cut off')
    more = run_whole(script, tmp_path, "cut", "--resume", stop=2)  # one that is done
    rest = run_whole(script, tmp_path, "cut", "--resume")
    assert pieces // 2 - 1 + more - 1 + rest == pieces  # each was made once
    names = ["results.json"] + ["reflections.txt"] * (script == "rrr")
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert not path.exists() and not (whole / path.name).exists()


def test_the_table_of_another_checkpoint_is_not_gone_on_from(tmp_path):
    run_whole("score", tmp_path, "run", stop=5)
    run = tmp_path / "run"
    assert len(partial.open_table(run)) == len(partial.open_table(run)) == 4
    helpers.save_random_model(run / "checkpoint")
    assert partial.open_table(run) == []


def test_the_final_table_loads_the_checkpoint_alone_and_drops_the_policy_first(
    tmp_path, monkeypatch
):
    """The base is the reference, which is there."""
    loaded, load, make, sizes = [], setup.load_sampler, score.make_scorer, []

    def spy(name, *rest):
        gc.collect()
        loaded.append(name)
        sizes.append([sum(p.numel() for p in model().parameters()) for model in models_there])
        return load(name, *rest)

    def make_and_look(*arguments):
        scorer = make(*arguments)
        models_there[:] = [weakref.ref(scorer.model), weakref.ref(scorer.reference)]
        return scorer

    models_there = []
    monkeypatch.setattr(setup, "load_sampler", spy)
    monkeypatch.setattr(score, "make_scorer", make_and_look)
    run_whole("score", tmp_path, "run", "--reference", "base")
    assert loaded == [str(tmp_path / "run" / "checkpoint")]
    assert sizes[0][0] == 0 < sizes[0][1]


def test_passes_of_the_final_table_say_their_names_and_tokens_in_lines_of_a_log(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "MOMENT", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run_whole("score", tmp_path, "run")
    out, err = capsys.readouterr()
    lines = [line for line in err.split("\n") if ", sampled: " in line or ", greedy: " in line]
    names = [line.split(": ")[0] for line in lines]
    assert [*dict.fromkeys(names)] == [
        f"{m}, {t}" for m in ("base", "trained") for t in evaluate.MODES
    ]
    assert not [line for line in lines if "\r" in line]
    assert any(
        line.startswith("trained, sampled: 2 of 4, ") and " tokens" in line for line in lines
    )
    assert "now the final table: 16 conversations\n" in out  # nothing to tell the pace by


def test_a_short_evaluation_says_nothing_and_its_first_tokens_wait_for_the_delay(
    monkeypatch, capsys
):
    monkeypatch.setattr(progress, "EVERY", 0.0)  # seconds between lines
    sampler = Sampler(tiny.build_model(), tiny.build_tokenizer())
    try_out(sampler, [PROBLEM] * 2)
    assert capsys.readouterr().err == "" and sampler.on_tokens is None
    monkeypatch.setattr(evaluate, "MOMENT", 0.0)
    try_out(sampler, [PROBLEM] * 2)
    assert "evaluation: 2 of 2, " in capsys.readouterr().err


def test_other_ranks_count_no_tokens(monkeypatch, capsys):
    monkeypatch.setattr(progress, "rank", lambda: 1)
    monkeypatch.setattr(evaluate, "MOMENT", 0.0)
    f, _ = try_out(Sampler(tiny.build_model(), tiny.build_tokenizer()), [PROBLEM])
    assert f["n"] == 1 and capsys.readouterr().err == ""


def test_the_final_table_is_announced_with_what_is_there_and_the_pace_so_far(tokenizer, capsys):
    exam = evaluate.Exam(Env(TASKS["tiny"], tokenizer), rrr.Config(), "reflect_retry")
    exam.announce(6000, 0)
    assert exam.pace() is None
    exam(ScriptedSampler(tokenizer, [RIGHT] * 3), [PROBLEM] * 3, 1.0)
    assert exam.tried == 3 and exam.pace() == exam.seconds / 3 > 0
    exam.seconds = 0.06
    exam.announce(6000, 0)
    exam.announce(6000, 1500)
    assert capsys.readouterr().out.splitlines() == [
        "now the final table: 6,000 conversations",
        "now the final table: 6,000 conversations, about 2 minutes",
        "now the final table: 6,000 conversations, of which 1,500 are there, about 90 seconds",
    ]
    spoken = {
        0.1: "2 seconds",
        119: "119 seconds",
        7100: "118 minutes",
        9e4: "25 hours",
        9e5: "10 days",
    }
    assert {s: progress.about(s) for s in spoken} == {s: f"about {t}" for s, t in spoken.items()}


def test_an_evaluation_says_first_what_it_is_and_what_is_there(tmp_path, monkeypatch, capsys):
    config, _ = stopped_evaluation(tmp_path, monkeypatch)
    threads = torch.get_num_threads()
    said = f"models/tiny: 344,064 parameters, float32 on cpu ({threads} threads); tiny, "
    said += "3 validation problems, "
    assert capsys.readouterr().out == f"{said}self_correct\n"
    evaluate.main(config)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{said}self_correct; goes on after 2 conversations"


def test_ctrl_c_is_one_line_that_says_what_is_kept_and_exit_code_130(tmp_path, monkeypatch, capsys):
    path, ends = tmp_path / "e.json.partial", []
    for output, number in ((path.with_suffix(""), 3), (path.with_suffix(""), 1), (None, 2)):
        config = evaluate.Config(limit=3, output=output and str(output))
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            with pytest.raises(SystemExit) as ended:
                evaluate.main(config)
        ends.append((ended.value.code, capsys.readouterr().err))
    kept = f"what is done is in {path}: the same call goes on from there"
    said = [kept, kept, "nothing is kept without --output"]
    name = Path(sys.argv[0]).name
    assert ends == [(130, f"{name}: stopped by Ctrl-C: {text}\n") for text in said]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(evaluate, "prepare", ctrl_c)
        evaluate.main(evaluate.Config(output=str(tmp_path / "f.json")))
    assert "stopped by Ctrl-C: nothing was done yet\n" in capsys.readouterr().err


def ctrl_c(*arguments):
    raise Stopped(signal.SIGINT)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where, kept", [("begin", 0), ("json_lines", 2), ("finish_output", 3)])
def test_a_full_disk_is_one_line_that_says_what_is_kept_and_the_same_call_goes_on(
    where, kept, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "CACHE_TOKENS", 1)  # a piece for every problem
    evaluate.main(evaluate.Config(limit=3, output=str(tmp_path / "whole.json")))
    config, written = evaluate.Config(limit=3, output=str(tmp_path / "e.json")), []
    real = getattr(partial, where)

    def fails_once_in_the_third_piece(rows):
        written.append(rows)
        return real(rows) if len(written) < 4 else full_disk()

    harm = fails_once_in_the_third_piece if where == "json_lines" else full_disk
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(partial, where, harm)
        evaluate.main(config)
    said, path = capsys.readouterr().err, f"{config.output}.partial"
    assert ended.value.code == 1 and said.count("\n") == 1
    assert f"--output {config.output} can't be written (No space left on device): " in said
    assert f"{kept} conversations are kept in {path}, the same call goes on from there" in said
    made = count_pieces(monkeypatch)
    evaluate.main(config)
    assert len(made) == 3 - kept
    files = [(tmp_path / name).read_bytes() for name in ("e.json", "whole.json")]
    assert files[0] == files[1] and not os.path.exists(path)


def test_an_output_that_can_not_be_written_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "prepare", None)
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "taken.json.partial").mkdir()
    names = ["none/e.json", "file/e.json", "x" * 255, "taken.json"]
    for output in [str(tmp_path / name) for name in names] + ["/proc/e.json"]:
        said = helpers.refusal(evaluate, capsys, "--output", output)
        assert said.count("\n") == 1 and f"error: --output {output} can't be written: " in said
    assert f"--output {file}: it exists" in helpers.refusal(evaluate, capsys, "--output", file)
    left = file.with_name("left.json.partial")
    left.write_text("left")
    for name in ("left.json", "new"):
        partial.check_new("--output", str(tmp_path / name), ".partial")
    assert left.read_text() == "left" and not (tmp_path / "new.partial").exists()


def test_a_header_without_conversations_keeps_no_other_evaluation_from_its_file(
    tmp_path, monkeypatch
):
    config, path = stopped_evaluation(tmp_path, monkeypatch)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    evaluate.main(dataclasses.replace(config, limit=2))
    assert json.loads((tmp_path / "e.json").read_text())["n"] == 2
