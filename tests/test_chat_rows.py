"""Rows that ask in a chat: what each task takes of them, and what it refuses."""

import json
import random

import pytest

from tasks import TASKS
from tasks.sources import parse_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "End with the number 5."}
ASKED = [SYSTEM, user("1 + 1?")]
BOXED = "One and one are \\boxed{2}."
MARKED = "One and one are <<1+1=2>>2.\n#### 2"
NONE = "No idea, \\boxed{7}"


@pytest.mark.parametrize("row", [
    {"messages": [*ASKED, assistant(BOXED)]},
    {"messages": json.dumps([*ASKED, assistant(BOXED)])},  # a cell of a CSV
    {"prompt": ASKED, "completion": [assistant(BOXED)]},
    {"prompt": ASKED, "answer": MARKED},
    {"prompt": "1 + 1?", "answer": MARKED},
    {"prompt": "Add.", "messages": [*ASKED, assistant(BOXED)]},
    {"prompt": ASKED, "solution": BOXED},
    {"prompt": ASKED, "solution": "One and one.", "answer": 2},
    {"messages": [*ASKED, assistant("#### Adding\n" + BOXED)]},  # a heading is no mark
    {"messages": [*ASKED, assistant(MARKED)]},
    {"messages": [*ASKED, assistant("<think>#### 7</think>" + MARKED)]},
    {"messages": [assistant(NONE), *ASKED, assistant(BOXED)]},
    {"messages": [*ASKED, assistant(BOXED)], "answer": float("nan"), "ground_truth": " "},
    {"messages": [user([{"type": "text", "text": "1 + 1?"}, {"type": "image"}]), assistant(BOXED)]},
    {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": BOXED}]},
])  # fmt: skip
@pytest.mark.parametrize("name", ["math", "gsm8k"])
def test_mathematics_in_a_chat_is_a_problem_its_solution_and_its_answer(name, row):
    problem = parse_row(TASKS[name], row)
    assert (problem["problem"], problem["answer"]) == ("1 + 1?", "2")
    solution = TASKS[name].solution(problem)
    assert solution.startswith(("One", "####", "<think>")) and solution.count("\\boxed{2}") == 1
    assert TASKS[name].verify(solution, json.loads(json.dumps(problem)))


@pytest.mark.parametrize("row", [
    {"answer": "2"}, {"answer": 2}, {"solution": "$2$"}, {"solution": 2}, {"ground_truth": "$2$"},
    {"reward_model": {"style": "rule", "ground_truth": "2"}},
    {"reward_model": '{"style": "rule", "ground_truth": 2}'},  # a cell of a CSV
    {"completion": [assistant(NONE)], "answer": "2"},
    {"completion": [assistant("No idea.\n#### 7")], "answer": "2"},
    {"completion": [assistant("The answer is 7.")], "answer": "2"},
    {"solution": NONE, "answer": 2},
    {"solution": " ", "answer": "2"},
])  # fmt: skip
@pytest.mark.parametrize("name, asked", [
    ("math", {"prompt": ASKED}), ("gsm8k", {"prompt": ASKED}),
    ("math", {"problem": "1 + 1?"}), ("gsm8k", {"question": "1 + 1?"}),
])  # fmt: skip
def test_an_answer_without_a_solution_that_comes_to_it_makes_no_example(name, asked, row):
    if "completion" in row and "prompt" not in asked:
        row = {"solution": row["completion"][0]["content"], "answer": row["answer"]}
    wanted = {"problem": "1 + 1?", "solution": None, "answer": "2"}
    assert parse_row(TASKS[name], asked | row) == wanted


@pytest.mark.parametrize("written, answer", [
    ("#### 1,000", "1,000"), ("So\n#### 7%", "7%"), ("#### 1/2", "1/2"), ("#### $5", "5"),
    ("$\\$36$", "\\$36"), ("$18", "18"),
    ("#### -7.5\n", "-7.5"), (0, "0"), (2.5, "2.5"), (1e-5, "0.00001"), (1e16, "1" + "0" * 16),
    (" 18 ", "18"),
    ("#### 1. Add the numbers\n1 + 1 = 2.", None), ("#### Step 1: add\nWe get 2.", None),
    ("### 1\nfoo\n#### 2. Then\nSo it is 3.", None), ("18\n#### 18\n\nHope this helps!", None),
    ("#### It is two", None), ("#### 18 <|endoftext|>", None), ("#### 5 яблок", None),
    ("The answer is unclear to me.", None), ("The answer is 5", None), ("Answer: 5", None),
    ("So the answer is 5 or 6, depending on x.", None), ("<think>#### 3</think>\n8", None),
    ("#### ", None), ("\\boxed{}", None), ('["2"]', None), (float("inf"), None), ("", None),
])  # fmt: skip
def test_an_answer_is_the_same_in_every_field_and_reply_or_refused(written, answer):
    rows = [{"prompt": ASKED, name: written} for name in ("answer", "ground_truth")]
    rows += [{"prompt": ASKED, "reward_model": {"ground_truth": written}}]
    rows += [{"question": "1", "problem": "1", "answer": written}]
    rows += [{"prompt": ASKED, "solution": written}]
    rows += [{"messages": [*ASKED, assistant(written)]}] if isinstance(written, str) else []
    for row in rows:
        for name in ("math", "gsm8k"):
            if answer is None:
                with pytest.raises(ValueError, match="no answer|no number"):
                    parse_row(TASKS[name], row)
            else:
                assert parse_row(TASKS[name], row)["answer"] == answer


@pytest.mark.parametrize("field", ["answer", "ground_truth", "solution"])
@pytest.mark.parametrize("value", [["2"], False, {"a": "2"}])
def test_a_field_of_a_wrong_type_is_not_passed_over_for_another(field, value):
    row = {"messages": [*ASKED, assistant(BOXED)], "answer": "2"}
    with pytest.raises(ValueError, match=f"field '{field}' is no text or number"):
        parse_row(TASKS["math"], row | {field: value})


@pytest.mark.parametrize("row, message", [
    ({"messages": ASKED}, "no answer: wanted is one of the fields answer, .* has messages, id"),
    ({"messages": [*ASKED, assistant("It is 2.")]}, "no answer"),
    ({"prompt": ASKED, "solution": "It is 2."}, "no answer"),
    ({"prompt": ASKED, "answer": ""}, "no answer"),
    ({"messages": [assistant(BOXED), *ASKED]}, "no answer"),
    ({"messages": [{"role": "", "content": "x"}]}, "is missing: wanted .* has messages, id"),
    ({"messages": [*ASKED, assistant(BOXED), user("Sure?"), assistant(BOXED)]}, "has 2 messages"),
    ({"messages": [SYSTEM, assistant(BOXED)]}, "field 'messages' has 0 messages of the user"),
    ({"prompt": [user(7)], "answer": "2"}, "field 'prompt' has a message whose content is no te"),
    ({"messages": []}, "is missing: wanted .*; this row has messages, id"),
    ({"messages": "1 + 1?"}, "is missing: wanted .*; this row has messages, id"),
    ({"messages": [{"text": "1 + 1?"}]}, "is missing: wanted .*; this row has messages, id"),
    ({"prompt": ["1 + 1?"], "answer": "2"}, "no text: wanted .*; this row has prompt, answer, id"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["math", "gsm8k"])
def test_a_chat_without_one_problem_and_an_answer_is_refused(name, row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(TASKS[name], row | {"id": 1})


def test_words_are_no_answer_of_gsm8k():
    with pytest.raises(ValueError, match="its answer is no number: 'It is 2.'"):
        parse_row(TASKS["gsm8k"], {"prompt": ASKED, "answer": "It is 2."})


def test_a_row_with_the_tasks_own_fields_is_taken_by_these():
    chat = {"messages": [user("a"), user("b")]}
    flat = {"problem": "1 + 1?", "solution": BOXED}
    assert parse_row(TASKS["math"], flat | chat) == TASKS["math"].parse(flat)
    flat = {"nums": [1, 2], "target": 3}
    assert parse_row(TASKS["countdown"], flat | chat) == flat


def test_a_program_in_a_chat_is_that_of_its_fence():
    row = {"task_id": 700, "test_list": ["assert f() == 1"]}
    reply = assistant("So:\n```python\ndef f(): return 1\n```")
    problem = parse_row(TASKS["mbpp"], row | {"messages": [user("One.")] + [reply]})
    assert problem["text"] == "One." and TASKS["mbpp"].verify(reply["content"], problem)
    assert problem["code"] == "def f(): return 1"
    given = parse_row(TASKS["mbpp"], row | {"prompt": [user("One.")], "code": "def f(): return 2"})
    assert given["code"] == "def f(): return 2"
    with pytest.raises(ValueError, match="field 'code' is missing"):
        parse_row(TASKS["mbpp"], row | {"messages": [user("One.")]})


TOOLS = [{"type": "function", "function": {"name": "area", "parameters": {}}}]
AREA = {"name": "area", "arguments": {"base": 1.5, "unit": None}}


def calling(*calls):
    written = [{"name": c["name"], "arguments": json.dumps(c["arguments"])} for c in calls]
    called = [{"id": "1", "type": "function", "function": call} for call in written]
    return assistant(None, tool_calls=called)


@pytest.mark.parametrize("row", [
    {"messages": [user("Area?"), calling(AREA)]},
    {"messages": [user("Area?"), calling(AREA), {"role": "tool", "content": "2"}, assistant("2")]},
    {"messages": [user("Area?"), assistant("", tool_calls=[AREA])]},
    {"messages": [user("Area?"), assistant(json.dumps([AREA]))]},
    {"prompt": [user("Area?")], "answers": json.dumps([AREA])},
    {"prompt": "Area?", "answers": [AREA]},
])  # fmt: skip
def test_calls_in_a_chat_are_those_of_its_one_turn_of_calls(row):
    problem = parse_row(TASKS["function_call"], row | {"tools": TOOLS})
    assert problem == {"query": "Area?", "tools": TOOLS, "calls": [AREA]}
    assert TASKS["function_call"].verify(json.dumps([AREA]), problem)


@pytest.mark.parametrize("messages", [
    [user("Area?"), calling(AREA), {"role": "tool", "content": "2"}, calling(AREA)],
    [user("Area?"), assistant("None is needed.")],
    [user("Area?"), assistant(json.dumps(AREA))],
    [user("Area?")],
])  # fmt: skip
def test_a_chat_without_one_turn_of_calls_is_refused(messages):
    row = {"messages": messages, "tools": TOOLS}
    with pytest.raises(
        ValueError, match="field 'answers' is missing: .*this row has messages, too"
    ):
        parse_row(TASKS["function_call"], row)


@pytest.mark.parametrize("name, wanted", [
    ("countdown", "field 'nums' is missing: wanted nums, target; this row has messages, id"),
    ("humaneval", "field 'prompt' is missing: wanted prompt, .*; this row has messages, id"),
])  # fmt: skip
def test_a_task_that_has_no_use_for_a_chat_says_what_it_wants(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse_row(TASKS[name], {"messages": [*ASKED, assistant(BOXED)], "id": 3})


def test_no_row_makes_a_task_raise_anything_but_a_value_error():
    rng, fields = random.Random(0), "messages prompt completion conversations tools query question"
    fields += " answer answers solution ground_truth reward_model task_id test_list test_imports"
    values = [None, "", "[", "[1]", "#### 3", 3, 2.5, True, [1], [None], {"ground_truth": [1]}]
    values += [[user(said)] for said in ("?", 3, [3], [{"text": 3}])]
    for calls in (3, [3], [{}], [{"function": 3}], [{"function": {"arguments": "["}}]):
        values.append([user("?"), assistant("", tool_calls=calls)])
    for _ in range(3000):
        row = {field: rng.choice(values) for field in rng.sample(fields.split(), 4)}
        for task in (task for task in TASKS.values() if task.parse):
            try:
                json.dumps(parse_row(task, row))
            except ValueError as error:
                assert "\n" not in str(error)
