"""Rows of the published data sets -> problems. A row that does not fit is a ValueError that names
the field.

Problems keep what the prompt, the verifier and a few-shot example need, and can be written as JSON.
"""

import re

from tasks.sources import parse_json, take
from verifiers import extract_math


def parse_countdown(row: dict) -> dict:
    nums, target = take(row, nums=list, target=int)
    if not all(type(n) is int and n > 0 for n in nums):
        raise ValueError("field 'nums' must be positive whole numbers")
    return {"nums": nums, "target": target} | (
        {"solution": take(row, solution=str)[0]} if "solution" in row else {}
    )


def parse_math(row: dict) -> dict:
    """MATH: the answer is the field `answer`, or in the solution's last box."""
    problem, solution = take(row, problem=str, solution=str)
    boxed = extract_math(solution)
    answer = take(row, answer=str)[0] if "answer" in row else boxed
    if not answer:
        raise ValueError(
            "field 'solution' has no answer in \\boxed{}, and there is no field 'answer'"
        )
    if not boxed:
        solution += f"\nThe final answer is \\boxed{{{answer}}}."
    return {"problem": problem, "solution": solution, "answer": answer}


def parse_gsm8k(row: dict) -> dict:
    question, text = take(row, question=str, answer=str)
    solution, mark, answer = text.rpartition("####")
    answer = answer.strip()
    if not mark or not answer:
        raise ValueError("field 'answer' does not end in '#### ' and a number")
    solution = re.sub(r"<<.*?>>", "", solution).strip()  # notes for a calculator
    return {
        "problem": question,
        "solution": f"{solution}\nThe final answer is \\boxed{{{answer}}}.",
        "answer": answer,
    }


def parse_mbpp(row: dict) -> dict:
    task_id, text, code, tests = take(row, task_id=int, text=str, code=str, test_list=list)
    setup = row.get("test_setup_code") or ""
    if not all(isinstance(test, str) for test in [setup, *tests]):
        raise ValueError("field 'test_list' must be a list of texts, 'test_setup_code' a text")
    tests = [setup] * bool(setup) + tests
    return {
        "task_id": task_id,
        "text": text,
        "code": unix(code),
        "tests": [unix(test) for test in tests],
    }


def parse_mbpp_r(row: dict) -> dict:
    return parse_mbpp(row) | {"first_attempt": unix(take(row, first_attempt=str)[0])}


def unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def mbpp_split(problem: dict) -> str:
    number = problem["task_id"]
    return (
        "examples"
        if number <= 10
        else "test"
        if number <= 510
        else "validation"
        if number <= 600
        else "train"
    )


def parse_humaneval(row: dict) -> dict:
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    return dict(zip(fields, take(row, **dict.fromkeys(fields, str)), strict=True))


def parse_function_call(row: dict) -> dict:
    """APIGen (query, tools, answers; the last two may be JSON texts), or BFCL (question, function,
    ground_truth)."""
    if "ground_truth" not in row:
        query, tools, calls = (
            take(row, query=str)[0],
            take_json(row, "tools"),
            take_json(row, "answers"),
        )
        if not all(
            is_object(c) and c.keys() == {"name", "arguments"} and is_object(c["arguments"])
            for c in calls
        ):
            raise ValueError("field 'answers' is not a list of calls, each {name, arguments}")
        return {"query": query, "tools": tools, "calls": calls}
    turns, tools, calls = take(row, question=list, function=list, ground_truth=list)
    try:
        (messages,) = turns
        query = "\n".join(message["content"] for message in messages)
    except (ValueError, TypeError, KeyError):
        raise ValueError("field 'question' is not a list of one turn, a list of messages") from None
    for call in calls:
        (arguments,) = call.values() if is_object(call) and len(call) == 1 else [None]
        if not is_object(arguments) or not all(
            isinstance(v, list) and v for v in arguments.values()
        ):
            raise ValueError(
                "field 'ground_truth' is not a list of calls, each {name: {argument: [accepted values]}}"
            )
    return {"query": query, "tools": tools, "calls": calls}


def is_object(value) -> bool:
    return isinstance(value, dict)


def take_json(row: dict, field: str) -> list:
    """A list, or the list in a JSON text."""
    value = row.get(field)
    value = parse_json(value, f"field '{field}'") if isinstance(value, str) else value
    return take({field: value}, **{field: list})[0]


def example_calls(calls: list[dict]) -> list[dict]:
    """Calls that are right: of BFCL's accepted values the first, without the arguments that may be
    left out."""

    def first(value):
        if isinstance(value, dict):
            return {k: first(options[0]) for k, options in value.items() if "" not in options}
        return [first(item) for item in value] if isinstance(value, list) else value

    if calls[0].keys() == {"name", "arguments"}:
        return calls
    return [
        {"name": name, "arguments": first(arguments)}
        for call in calls
        for name, arguments in call.items()
    ]
