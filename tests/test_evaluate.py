import json
import random

import numpy as np
import pytest
import torch

import evaluate
from tasks import TASKS


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
        assert evaluate.edit_distance(a, b) == slow_edit_distance(a, b)


def test_standard_errors_treat_samples_of_one_problem_as_related():
    rows = [1, 1, 0, 0, 1, 0]  # three problems, two samples each: means 1, 0, 1/2
    figures = evaluate.summarize({"acc_t1": rows}, samples=2)
    assert figures["n"] == 3 and figures["acc_t1"] == 0.5
    assert figures["acc_t1_se"] == pytest.approx(np.std([1, 0, 0.5], ddof=1) / np.sqrt(3))


class ScriptedSampler:
    """Answers with prepared texts instead of a model's."""

    def __init__(self, tokenizer, first, second):
        self.texts, self.tokenizer = [first, second], tokenizer

    def generate(self, prompts, samples, seeds, **limits):
        return self.rollout(1)

    def extend(self, rollout, instructions, **limits):
        return self.rollout(2)

    def rollout(self, turns):
        texts, tokenizer = self.texts, self.tokenizer

        class Rollout:
            stopped = torch.ones(len(texts[0]), turns, dtype=torch.bool)
            action_mask = torch.ones(len(texts[0]), 24 * turns, dtype=torch.bool)

            @staticmethod
            def completion_ids(turn):
                return [tokenizer(t, add_special_tokens=False).input_ids for t in texts[turn]]

        return Rollout


def test_every_figure_of_a_hand_made_evaluation():
    import tiny

    tokenizer, problem = tiny.build_tokenizer(), {"nums": [8, 19, 16], "target": 24}
    right, wrong, nonsense = "19 - 16 = 3 ; 8 * 3 = 24", "16 / 8 = 2 ; 19 + 2 = 21", "19 - 16 = 9"
    first = [wrong, wrong, right, right]
    second = ["bad " + right, "ok " + wrong, "bad " + nonsense, "ok " + right]
    figures, talks = evaluate.evaluate(
        ScriptedSampler(tokenizer, first, second), tokenizer, TASKS["tiny"], [problem] * 4, None, 16, 1.0
    )
    expected = {"n": 4, "acc_t1": 0.5, "acc_t2": 0.5, "delta": 0, "i_to_c": 0.25, "c_to_i": 0.25, "changed": 0.5,
                "well_formed": 7 / 8, "truncated": 0, "tokens": 48}  # fmt: skip
    assert {k: figures[k] for k in expected} == pytest.approx(expected)
    ids = [[tokenizer(t).input_ids for t in texts] for texts in (first, second)]
    ratios = [slow_edit_distance(a, b) / (len(a) + len(b)) for a, b in zip(*ids)]
    assert figures["edit_ratio"] == pytest.approx(sum(ratios) / 4)
    assert [t["second_right"] for t in talks] == [1, 0, 0, 1]


def test_delta_is_what_was_corrected_minus_what_was_broken():
    r1, r2 = (np.random.default_rng(i).integers(2, size=50) for i in (0, 1))
    f = evaluate.summarize({"delta": r2 - r1, "i_to_c": (1 - r1) * r2, "c_to_i": r1 * (1 - r2)})
    assert f["delta"] == pytest.approx(f["i_to_c"] - f["c_to_i"])


def test_curves_are_drawn_from_the_metrics_file(tmp_path):
    rows = [{"stage": 1 + (i > 3), "step": i, "acc_t1": i / 10, "acc_t2": i / 9} for i in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluate.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000
