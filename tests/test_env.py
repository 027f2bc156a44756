"""Env: prompts and follow-ups of many rows, and verdicts that find their problem."""

import dataclasses

import pytest
import torch

import helpers
from sampler import Sampler
from sampling.turns import first_turn_ids, follow_up_ids
from tasks import TASKS
from tasks.env import Env
from training import models


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    path = helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")
    return Sampler(*models.load_model(path))


@pytest.fixture
def env(sampler):
    return Env(TASKS["tiny"], sampler.tokenizer)


def test_prompts_are_made_once_and_are_those_of_the_template(env):
    problems = env.task.generate("train", 0)[:3]
    prompts = env.prompts(problems)
    asked = [first_turn_ids(env.tokenizer, env.task.prompt(problem)) for problem in problems]
    assert prompts == asked and env.prompts(problems[1:])[0] is prompts[1]


def test_the_tasks_system_message_is_part_of_every_first_prompt(env):
    problem = env.task.generate("train", 0)[0]
    env.task = dataclasses.replace(env.task, system="7 8")
    asked = first_turn_ids(env.tokenizer, env.task.prompt(problem), system="7 8")
    own = first_turn_ids(env.tokenizer, env.task.prompt(problem))
    assert env.prompts([problem]) == [asked] != [own]


def test_a_message_is_one_of_the_tasks_or_a_text_for_each_row(env, sampler):
    first = sampler.generate(env.prompts(env.task.generate("train", 0)[:3]), max_new_tokens=4)
    last = first.last_ids()
    assert env.follow_up(first, "correct") == follow_up_ids(env.tokenizer, "fix", last)
    assert env.follow_up(first, "retry", [2, 0]) == follow_up_ids(
        env.tokenizer, "retry", [last[2], last[0]]
    )
    told = env.follow_up(first, ["3 + 4", "fix"], [1, 2])
    seams = [follow_up_ids(env.tokenizer, text, [row])[0] for text, row in
             zip(("3 + 4", "fix"), last[1:], strict=True)]  # fmt: skip
    assert told == seams and told[0] != told[1]
    with pytest.raises(ValueError):  # a text too many
        env.follow_up(first, ["3", "4", "5"], [1, 2])


def test_verdicts_know_which_problem_a_row_belongs_to_after_any_choice_of_rows(env, sampler):
    problems = env.task.generate("train", 0)[:3]
    asked = []

    def verify(text, problem):
        asked.append(problem)
        return problem is problems[2]

    env.task = dataclasses.replace(env.task, verify=verify, answer=lambda text, problem: text[:3])
    first = sampler.generate(env.prompts(problems), 2, max_new_tokens=4)
    some = [5, 0, 3]
    second = sampler.extend(
        first, env.follow_up(first, "correct", some), 2, rows=some, max_new_tokens=4
    )
    right, texts, answers, rewards = env.verdicts(second, 1, problems)
    assert asked == [problems[i] for i in (2, 2, 0, 0, 1, 1)]
    assert torch.equal(right, torch.tensor([1.0, 1, 0, 0, 0, 0])) and torch.equal(right, rewards)
    assert answers == [text[:3] for text in texts] and len(texts) == 6
