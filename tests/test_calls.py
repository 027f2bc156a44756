"""verify_function_call: what is a list of calls, which values are equal, which call is which."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import verify_function_call


def call(name="f", **arguments):
    return {"name": name, "arguments": arguments}


GOLD = [call(city="Paris", days=3)]
TEXT = '[{"name": "f", "arguments": {"city": "Paris", "days": 3}}]'


@pytest.mark.parametrize("response", [
    TEXT, f"\n {TEXT}\n", f"```json\n{TEXT}\n```", f"```\n{TEXT}```\n", f"no: []</think>\n\n{TEXT}",
    '[{"arguments": {"days": 3.0, "city": "\\u0050aris"}, "name": "f"}]',
])  # fmt: skip
def test_one_json_list_is_read(response):
    assert verify_function_call(response, GOLD) is True


@pytest.mark.parametrize("response", [
    "", "null", "{}", "[]", TEXT[1:-1], f"Here: {TEXT}", f"{TEXT} done", f"{TEXT} {TEXT}",
    f"[{TEXT}]", f"{TEXT}</think>", f"```json\n```json\n{TEXT}\n```\n```",
    f"Sure.\n```json\n{TEXT}\n```", f"```json\n{TEXT}\n```\nDone.", f"`{TEXT}`",
    f"```json\n{TEXT}", f"\ufeff{TEXT}", f"\u00a0{TEXT}", TEXT.replace('"', "'"), TEXT[:-1] + ",]",
    TEXT.replace("{", '{"id": 1, ', 1), TEXT.replace('"name": "f", ', ""),
    TEXT.replace('"f"', "null"), TEXT.replace('"f"', '"F"'), TEXT.replace('"f"', '"f "'),
    TEXT.replace("Paris", "paris"), TEXT.replace("Paris", "Paris\n"),
    TEXT.replace('"f"', '"g", "name": "f"'), TEXT.replace("3}", '3, "days": 3}'),
    TEXT.replace("3}", '3, "x": null}'), TEXT.replace("3", "NaN"), TEXT.replace("3", "Infinity"),
    TEXT.replace("3", "-Infinity"), TEXT.replace("3", '"3"'), TEXT.replace("3", "true"),
    TEXT.replace("3", "[3]"), TEXT.replace("3", "3."), TEXT.replace("3", "03"),
    TEXT.replace("3", "3.0000000000000000000001"), TEXT.replace("3", "1e" + "9" * 30),
    TEXT.replace("3", "1e999999999"),
    json.dumps([{"name": "f", "arguments": json.dumps(GOLD[0]["arguments"])}]),
    TEXT.replace('"city": "Paris", ', ""), f"[{TEXT[1:-1]}, {TEXT[1:-1]}]", "[" * 100_000,
    "[" * 100_000 + "]" * 100_000, '[{"a":' * 50_000, "9" * 10**6, TEXT.replace("3", "9" * 10**6),
    TEXT.replace("Paris", "\ud800"), "```" * 10**5, "\x00",
])  # fmt: skip
def test_anything_else_is_false(response):
    assert verify_function_call(response, GOLD) is False


@pytest.mark.parametrize("gold, text, same", [
    (3, "3.0", True), (3.0, "3", True), (0.1, "0.10", True),
    (0.1, "0.1000000000000000000001", False), (0, "-0.0", True), (10**20, "1e20", True),
    (1e20, str(10**20), True), (10**20 + 1, "1e20", False), (1e20, str(10**20 + 1), False),
    (2**53 + 1, f"{2**53}.0", False), (1, "true", False), (True, "1", False), (0, "false", False),
    (False, "0.0", False), (None, "null", True), (None, "false", False), (None, '""', False),
    (0, "null", False), ("1", "1", False), ([1, 2], "[1, 2.0]", True), ([1, 2], "[2, 1]", False),
    ([1, 2], "[1]", False), ([1], "[true]", False), ([], "{}", False),
    ({"a": [1]}, '{"a": [1]}', True), ({"a": [1]}, '{"a": 1}', False),
    ({"a": 1}, '{"a": 1, "b": 2}', False), ({"a": 1, "b": None}, '{"a": 1}', False),
    ({"a": 1}, '{"a": 1, "a": 1}', False), ("\ud800", '"\\ud800"', True),
])  # fmt: skip
def test_values_compare_as_json(gold, text, same):
    response = f'[{{"name": "f", "arguments": {{"x": {text}}}}}]'
    assert verify_function_call(response, [call(x=gold)]) is same
    if not isinstance(gold, dict):  # there, a dict lists accepted values
        assert verify_function_call(response, [{"f": {"x": ["another", gold]}}]) is same


def test_infinity_is_not_json_in_the_gold_either():
    with pytest.raises(ValueError, match="Infinity is not JSON"):
        verify_function_call("[]", [call(x=1e999)])


def test_calls_compare_as_a_multiset():
    a, b = call(x=1), call(x=2)
    assert verify_function_call(json.dumps([b, a, a]), [a, a, b])
    for given_calls in ([a, b, b], [a, b], [a, a, b, b]):
        assert not verify_function_call(json.dumps(given_calls), [a, a, b])
    assert verify_function_call("[]", [])


def test_bfcl_arguments_take_any_accepted_value_and_optional_ones_may_be_missing():
    gold = [{"f": {"unit": ["m", "metre", ""], "size": [[1, 2], [2, 1]], "mode": ["", None]}}]
    for arguments in (
        {"size": [1, 2]},
        {"size": [2, 1], "unit": "metre"},
        {"size": [1, 2], "unit": "m", "mode": None},
    ):
        assert verify_function_call(json.dumps([call(**arguments)]), gold)
    for arguments in (
        {},
        {"size": 1},
        {"size": [2, 2]},
        {"size": [[1, 2]]},
        {"size": [1, 2], "unit": "M"},
        {"size": [1, 2], "unit": ["m"]},
        {"size": [1, 2], "unit": None},
        {"size": [1, 2], "other": 1},
    ):
        assert not verify_function_call(json.dumps([call(**arguments)]), gold)
    assert not verify_function_call(json.dumps([call("g", size=[1, 2])]), gold)


def test_objects_inside_accepted_values_list_accepted_values_too():
    age = {"field": ["age"], "value": [30, "30"], "unit": ["", "years"]}
    gold = [{"f": {"where": [[age, {"field": ["job"]}]]}}]

    def verdict(*where):
        return verify_function_call(json.dumps([call(where=list(where))]), gold)

    assert verdict({"field": "age", "value": "30"}, {"field": "job"})
    assert verdict({"field": "age", "value": 30.0, "unit": "years"}, {"field": "job"})
    assert not verdict({"field": "job"}, {"field": "age", "value": 30})
    assert not verdict({"field": "age"}, {"field": "job"})
    assert not verdict({"field": ["age"], "value": [30]}, {"field": "job"})
    assert not verdict({"field": "age", "value": 30, "x": 1}, {"field": "job"})


def test_a_field_without_a_list_has_one_accepted_value():
    gold = [{"f": {"where": [{"x": 1}]}}]
    assert verify_function_call(json.dumps([call(where={"x": 1})]), gold)
    assert not verify_function_call(json.dumps([call(where={"x": 2})]), gold)


def test_overlapping_accepted_values_are_matched_and_not_first_come_first_served():
    gold = [{"f": {"x": [1, 2, 3]}}, {"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    for order in ([1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 3, 2]):
        assert verify_function_call(json.dumps([call(x=x) for x in order]), gold)
    assert not verify_function_call(json.dumps([call(x=2), call(x=2), call(x=3)]), gold)


def test_a_thousand_calls_are_matched_without_recursion():
    assert verify_function_call(json.dumps([call()] * 1100), [call()] * 1100)
    gold = [{"f": {"x": [i, i + 1]}} for i in range(200)]
    for values in (range(200, 0, -1), [*range(1, 200), 0]):
        given_calls = [call(x=x) for x in values]
        assert verify_function_call(json.dumps(given_calls), gold)
        assert not verify_function_call(json.dumps([*given_calls[1:], call(x=300)]), gold)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=3)


def containers(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)


JSON = st.recursive(SCALARS, containers)
PIECES = st.sampled_from([
    *"[]{},:-", '"name"', '"arguments"', '"f"', "{}", "1e9", "NaN", "```", "json\n", "</think>",
])  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=2), max_size=12).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS | JSON.map(json.dumps))
def test_no_text_makes_verify_function_call_raise(text):
    argument = f'[{{"name": "f", "arguments": {{"x": {text}}}}}]'
    for response in (text, argument, f"```json\n{text}\n```"):
        for gold in (GOLD, [{"f": {"x": [1, {"a": [1, ""]}, [{}]]}}]):
            assert verify_function_call(response, gold) in (True, False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3))
def test_what_json_writes_is_equal_to_itself(arguments):
    calls = [{"name": "f", "arguments": arguments}]
    assert verify_function_call(json.dumps(calls), calls)
