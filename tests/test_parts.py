"""--cache_tokens: the same batch in parts, within its bound; what does not fit, refused before."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import baselines
import evaluate
import helpers
import rrr
import score
import tiny
from conftest import equal
from sampler import Sampler
from sampling.rollout import Rollout
from tasks import TASKS
from tasks.env import Env
from training import batches, parts
from training.setup import prepare

SIZES = {"max_new_tokens": 6, "group_size": 4}
RRR = {**SIZES, "max_reflection_tokens": 7, "retries": 2, "failures_per_step": 5}
ROLL_OUTS = {  # name: (what samples a step, flags)
    "score": (score.roll_out, score.Config(**SIZES, second_attempts=2, problems=5)),
    "single_turn": (score.roll_out, score.Config(**SIZES, single_turn=True, problems=5)),
    "rrr": (rrr.roll_out, rrr.Config(**RRR)),
    "episodes": (rrr.roll_out_episodes, rrr.Config(**RRR, group="episode")),
    "baselines": (baselines.roll_out, baselines.Config(**SIZES, second_attempts=2, problems=5)),
}


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    sampler = Sampler(tiny.build_model().eval(), tiny.build_tokenizer())
    task = TASKS["tiny"]
    return Env(task, sampler.tokenizer), sampler, task.generate("train", 0)[:5]


def failures_of(env, problems):
    """Failures of unequal length, so that stored attempts and parts have unequal widths."""
    prompts = env.prompts(problems)
    return [
        {"problem": problem, "prompt_ids": ids, "answer_ids": [5] * (1 + i)}
        for i, (problem, ids) in enumerate(zip(problems, prompts, strict=True))
    ]


def same(a, b) -> bool:
    if isinstance(a, Rollout):
        return equal(a, b) and a.cache is b.cache is None
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return type(a) is type(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", ROLL_OUTS)
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_batch_in_parts_is_the_same_batch_and_keeps_within_its_tokens(
    name, at_once, loaded, cache_bytes, monkeypatch
):
    monkeypatch.setattr(
        "tasks.env.verify_batch", lambda _, texts, *rest: [len(t) % 2 for t in texts]
    )
    (env, sampler, problems), (roll_out, config) = loaded, ROLL_OUTS[name]
    things = failures_of(env, problems) if name == "rrr" else problems
    mine = batches.Share(things, range(3, 8), (0, 1))  # as another rank's share would begin
    whole = parts.in_parts(roll_out, env, sampler, mine, config)
    tokens = parts.tokens_of(sampler, config.rows_each, parts.longest(env, things, config))
    config.cache_tokens, peak = tokens * at_once, cache_bytes.peak
    called, cache_bytes.peak = [], 0

    def spy(env, sampler, share, config):
        called.append(len(share.items))
        return roll_out(env, sampler, share, config)

    split = parts.in_parts(spy, env, sampler, mine, config)
    config.cache_tokens = None
    assert same(whole, split) and sum(called) == 5 and max(called) == min(at_once, 3)
    assert cache_bytes.now == 0 and cache_bytes.peak <= tokens * at_once * sampler.token_bytes
    assert at_once == 4 or cache_bytes.peak < peak


def test_a_rank_without_problems_has_one_part_without_rows(loaded):
    env, sampler, _ = loaded
    config = score.Config(cache_tokens=1)
    attempts = parts.in_parts(
        score.roll_out, env, sampler, batches.Share([], range(0), (0,)), config
    )
    assert attempts.rollout.ids.shape == (0, 1) and attempts.rollout.stopped.shape == (0, 2)


def test_an_episode_batch_with_a_part_without_a_failure_is_the_same(loaded, monkeypatch):
    (env, sampler, problems), config = loaded, rrr.Config(**RRR, group="episode")
    right = {str(problem) for problem in problems[1:3]}

    def verify(_, texts, asked, *rest):
        return [str(problem) in right for problem in asked]

    monkeypatch.setattr("tasks.env.verify_batch", verify)
    mine = batches.share_of(problems, 0, 0)
    whole = parts.in_parts(rrr.roll_out_episodes, env, sampler, mine, config)
    config.cache_tokens = 1
    assert same(whole, parts.in_parts(rrr.roll_out_episodes, env, sampler, mine, config))
    assert whole.rollout.prompt_index.unique().tolist() == [0, 3, 4]


def test_failures_are_collected_within_the_tokens_and_are_the_same(loaded, cache_bytes):
    env, sampler, problems = loaded
    config = rrr.Config(**RRR, tries=2)
    whole, peak = rrr.collect(env, sampler, problems, config), cache_bytes.peak
    config.cache_tokens, cache_bytes.peak = 1, 0
    assert rrr.collect(env, sampler, problems, config) == whole and cache_bytes.peak < peak / 3


def test_an_evaluation_keeps_within_the_tokens_and_is_the_same(loaded, cache_bytes):
    env, sampler, problems = loaded
    protocol = evaluate.Protocol("self_refine", 1.0, 6, 7, samples=2)
    whole, peak = evaluate.evaluate(sampler, env, problems, protocol), cache_bytes.peak
    most = parts.longest(env, problems, protocol)
    tokens, cache_bytes.peak = parts.tokens_of(sampler, 2, most), 0
    one_by_one = protocol._replace(cache_tokens=tokens)
    assert evaluate.evaluate(sampler, env, problems, one_by_one) == whole
    assert cache_bytes.peak < peak / 3
    three_ways = {name: ((sampler,) * 3, "self_refine") for name in "abc"}
    cache_bytes.peak = 0
    list(
        evaluate.pieces(
            three_ways, env, problems, protocol._replace(cache_tokens=4 * tokens), 0, ""
        )
    )
    assert cache_bytes.peak <= 4 * tokens * sampler.token_bytes


@pytest.mark.parametrize("script", ["score", "rrr", "baselines", "evaluate"])
def test_a_problem_that_does_not_fit_alone_is_refused_before_any_work(
    script, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Sampler, "generate", None)
    module = __import__(script)
    own = [f"--output_dir={tmp_path / 'run'}"]  # by default there may be a run already
    own = ["--samples=8", "--temperature=1"] if script == "evaluate" else own
    flags = ["--cache_tokens", "50", *own]
    said = helpers.refusal(module, capsys, *flags)
    assert "--cache_tokens 50: one problem alone needs " in said and " rows of up to " in said
    assert "raise it, or lower the token limits or the rows" in said


def test_stored_failures_that_do_not_fit_are_refused(loaded, tmp_path):
    env, sampler, problems = loaded
    config = rrr.Config(**RRR)
    failures = failures_of(env, problems)
    failures[2]["answer_ids"] = [5] * 40
    rrr.write_failures(tmp_path / "f.jsonl", (failures, 0.0), sampler.model, config, env.day)
    assert rrr.read_failures(str(tmp_path / "f.jsonl"), env, sampler, config) == failures
    most = parts.longest(env, problems, config)
    config.cache_tokens = parts.tokens_of(sampler, 8, most)
    with pytest.raises(ValueError, match="one problem alone needs .* for 8 rows of up to"):
        rrr.read_failures(str(tmp_path / "f.jsonl"), env, sampler, config)


def test_by_default_the_cache_may_take_a_quarter_of_the_memory(loaded, monkeypatch):
    env, sampler, problems = loaded
    config = score.Config()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (
        sampler.token_bytes == 2 * 3 * 4 * 24 * 4
    )  # keys and values, layers, heads, size, float32
    assert 0 < parts.cache_tokens(config, sampler) <= memory // 4 // sampler.token_bytes
    monkeypatch.setattr(parts, "least_memory", lambda device: 4 * 100 * sampler.token_bytes)
    assert parts.cache_tokens(config, sampler) == 100
    with pytest.raises(ValueError, match=r"--cache_tokens 100 \(a quarter of the memory\): one"):
        prepare(config, {"train": None, "validation": 4})
    config.cache_tokens = 7
    assert parts.cache_tokens(config, sampler) == 7
    gpu = SimpleNamespace(total_memory=10**9)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert parts.memory_of(torch.device("cuda", 0)) == 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # ranks of one machine share its memory
    whole = partial(parts.memory_of, torch.device("cpu"))
    half = whole()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert half == whole() // 2


def test_ranks_of_unlike_memory_cut_pieces_alike(monkeypatch):
    """Else one would wait for pieces that another does not have."""
    monkeypatch.setattr(parts, "memory_of", lambda device: 800)
    monkeypatch.setattr(parts, "exchange", lambda mine: [mine, mine // 4])
    parts.least_memory.cache_clear()
    assert parts.least_memory(torch.device("cpu")) == 200
    parts.least_memory.cache_clear()
