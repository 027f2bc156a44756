import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.tiny import run_steps
from verifiers import verify_countdown


@pytest.mark.parametrize("answer", [
    "(8 - 16 / 8) * -+3", "16*(19 - 8) - 152", "1/3+2/3", "- -5+3", "((((1))))+2", "\n 3 * 4\t",
])  # fmt: skip
def test_right_expressions_are_accepted(answer):
    numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in answer).split()]
    assert verify_countdown(f"<answer>{answer}</answer>", numbers, round(eval(answer.strip())))


@pytest.mark.parametrize("response", [
    "3 + 4", "<answer>3 + 4", "3 + 4</answer>", "<answer></answer>", "<answer>3 + 4 = 7</answer>",
    "<answer>7</answer>", "<answer>3 + 3 + 1</answer>", "<answer>3 + 4 + 0</answer>",
    "<answer>03 + 4</answer>", "<answer>3 4 +</answer>", "<answer>(3 + 4</answer>",
    "<answer>3 + 4)</answer>", "<answer>3 +</answer>", "<answer>3 + 4 -</answer>",
    "<answer>3 * (4 -</answer>", "<answer>()3 + 4</answer>", "<answer>3(+4)</answer>",
    "<answer>3.0 + 4</answer>", "<answer>３ + 4</answer>", "<answer>3 − 4</answer>",
    "<answer>3 ** 4</answer>", "<answer>3_ + 4</answer>", "<answer>3 +\u00a04</answer>",
    "<answer>3 + 4</answer><answer>3 * 4</answer>", "<answer>3 + 4</answer></think> no",
    "<answer>3/(4-4)</answer>",
])  # fmt: skip
def test_wrong_or_malformed_answers_are_false(response):
    assert verify_countdown(response, [3, 4], 7) is False


def test_the_last_answer_after_the_last_thought_counts():
    assert verify_countdown(
        "<answer>1</answer></think> so <answer>3 * 4</answer> or <answer>3+4</answer>.", [3, 4], 7
    )


def test_the_last_complete_pair_of_tags_counts():
    for text in (
        "<answer>3 * 4</answer> no </answer>",
        "<answer>1</answer><answer>3 * 4</answer> <answer>7",
    ):
        assert verify_countdown(text, [3, 4], 12)


def test_fractions_are_exact():
    assert verify_countdown("<answer>8 / (3 - 8 / 3)</answer>", [3, 3, 8, 8], 24)
    assert not verify_countdown("<answer>1 / 3 * 3 + 99</answer>", [1, 3, 3, 99], 101)


def test_division_by_zero_and_deep_nesting_do_not_raise():
    assert verify_countdown("<answer>3 / (4 - 4)</answer>", [3, 4, 4], 0) is False
    assert verify_countdown("<answer>" + "(" * 490 + "7" + ")" * 490 + "</answer>", [7], 7)
    assert verify_countdown("<answer>" + "-" * 998 + "7</answer>", [7], 7)
    assert verify_countdown("<answer>" + "(" * 100_000 + "</answer>", [7], 7) is False


def test_an_answer_of_over_1000_characters_is_false():
    assert verify_countdown(f"<answer>3{' ' * 990}+4</answer>", [3, 4], 7)
    assert not verify_countdown(f"<answer>3 {' ' * 1000}+ 4</answer>", [3, 4], 7)


def test_no_text_makes_a_verifier_raise():
    rng = random.Random(0)
    alphabet = ["<answer>", "</answer>", "</think>", *"0123456789+-*/()=; \n"]
    alphabet += ["\x00", "é", "٣", "ok ", " ; ", "\ud800"]
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 30)))
        for wrapped in (text, f"<answer>{text}</answer>"):
            assert verify_countdown(wrapped, [3, 4, 5], 7) in (True, False)
        assert run_steps(text, [3, 4, 5]) is None


@pytest.mark.parametrize("steps, value", [
    ("16 / 8 = 2 ; 19 + 2 = 21", 21),
    ("19 - 16 = 3 ; 8 * 3 = 24", 24),
    ("16 / 8 = 3 ; 19 + 3 = 22", None),  # not honest
    ("16 / 8 = 2 ; 19 + 8 = 27", None),  # 8 twice
    ("16 / 8 = 2", None),  # 19 and 2 left over
    ("8 - 16 = -8 ; 19 - 8 = 11", None),  # below 0
    ("16 * 8 = 128 ; 128 - 19 = 109", None),  # above 99
    ("19 / 8 = 2 ; 16 + 2 = 18", None),  # not exact
    ("16 / 8 = 2 ; 19 + 2 = 21 ; 21 + 0 = 21", None),
    ("16 / 8 = 2; 19 + 2 = 21", None),
    ("", None),
])  # fmt: skip
def test_only_honest_derivations_have_a_value(steps, value):
    assert run_steps(steps, [8, 19, 16]) == value


def test_equal_numbers_are_counted():
    assert run_steps("5 / 5 = 1 ; 5 + 1 = 6", [5, 5, 5]) == 6
    assert run_steps("5 / 5 = 1 ; 5 + 1 = 6", [5, 5, 1]) is None


PIECES = st.sampled_from(["<answer>", "</answer>", "</think>", *"()+-*/3450 =", "\ud800"])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(PIECES | st.text(max_size=2), max_size=16).map("".join), st.booleans())
def test_no_text_makes_verify_countdown_raise(text, tagged):
    response = f"<answer>{text}</answer>" if tagged else text
    numbers = [int(n) for n in re.findall("[0-9]+", text)]
    assert verify_countdown(response, numbers, 7) in (True, False)
