"""The made-up conversations that the embedded model learns from, and the model itself."""

import pytest
import torch

import evaluate
import helpers
import tiny
from tasks import TASKS
from training.setup import prepare


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def spoken(tokenizer, ids, labels):
    """[(what the user said, what the model says)] of one conversation, as the labels have it."""
    text = tokenizer.decode(ids)
    turns = [turn.split(" <assistant> ") for turn in text.removeprefix("<user> ").split(" <user> ")]
    learnt = tokenizer.decode(labels[labels != -100])
    assert learnt == " ".join(answer for _, answer in turns)
    return [(said, answer.removesuffix(" <end>")) for said, answer in turns]


def test_conversations_are_honest_and_only_the_models_turns_are_learnt(tokenizer):
    task, seen = TASKS["tiny"], set()
    asked = ("fix", "judge", "reflect", "retry")
    for ids, labels in tiny.Conversations(64, 0).batch():
        for row in range(len(ids)):
            turns = spoken(tokenizer, ids[row], labels[row])
            *nums, _, target = turns[0][0].split()
            problem, last = {"nums": [int(n) for n in nums], "target": int(target)}, None
            for said, answer in turns:
                seen.add(said if said in asked else "attempt")
                if said == "judge":
                    assert answer == ("yes" if task.verify(last, problem) else "no")
                elif said == "reflect":
                    assert answer.split()[1] == last.split()[-1]  # what the attempt reached
                    for plan in answer.split(" try ")[1:]:
                        steps, _, verdict = plan.rpartition(" ")
                        assert task.answer(steps, problem) == steps
                        assert verdict == ("yes" if task.verify(steps, problem) else "no")
                else:
                    assert task.answer(answer, problem) is not None
                    if answer.startswith("ok"):
                        assert answer == f"ok {last}"
                    last = answer
    assert seen == {"attempt", *asked}


def test_the_same_seed_pretrains_the_same_weights():
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny.build_model()
        tiny.pretrain(model, tiny.Config(steps=3, rows=32))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_the_embedded_base_stands_where_the_papers_start():
    path = helpers.ROOT / "models" / "tiny"
    assert sum(file.stat().st_size for file in path.iterdir()) < 2e6
    config = evaluate.Config(model=str(path))
    env, sampler, splits = prepare(config, {"validation": None})
    exam = evaluate.Exam(env, config, "self_correct")
    sampled, greedy = (exam(sampler, splits["validation"], T)[0] for T in (1.0, 0.0))
    assert 0.3 < sampled["acc_t1"] < 0.5 and -0.1 < sampled["delta"] < -0.02
    assert greedy["delta"] <= 0.001
    assert sampled["well_formed"] > 0.85
