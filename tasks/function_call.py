"""Function calling: a request and functions -> a JSON list of calls, in any order.

row:     {"query": "Weather in Rome?", "tools": [{"name": "weather"}],
          "answers": [{"name": "weather", "arguments": {"city": "Rome"}}]}
prompt:  You can call these functions: {"name": "weather"} Request: Weather in Rome? Answer with ...
answer:  [{"name": "weather", "arguments": {"city": "Rome"}}]

Rows are those of APIGen (xLAM), as above, or of the Berkeley Function Calling Leaderboard, whose
gold has lists of accepted values. Its own checker is laxer with strings than our verdict.
"""

import json

from tasks.base import Task
from tasks.chats import call_chat
from tasks.sources import found_in, take
from verifiers import extract_calls, verify_function_call


def parse_function_call(row: dict) -> dict:
    row = call_chat(row)
    bfcl = {"function", "ground_truth"} & row.keys()
    problem = parse_bfcl(row) if bfcl else parse_apigen(row)
    try:
        right = verify_function_call(json.dumps(example_calls(problem["calls"])), problem["calls"])
    except (KeyError, TypeError, IndexError, ValueError):
        right = False
    if not right:
        field = "ground_truth" if bfcl else "answers"
        raise ValueError(f"field '{field}' has calls that nobody could make right")
    return problem


def parse_apigen(row: dict) -> dict:
    """`tools` and `answers` may be JSON texts, as on the hub."""
    query, tools, calls = take(row, query=str, tools=list, answers=list)
    for call in calls:
        named = is_object(call) and call.keys() == {"name", "arguments"}
        if not named or not isinstance(call["name"], str) or not is_object(call["arguments"]):
            raise ValueError("field 'answers' is not a list of calls, each {name, arguments}")
    return {"query": query, "tools": tools, "calls": calls}


def parse_bfcl(row: dict) -> dict:
    if "ground_truth" not in row:
        where = "BFCL has it in possible_answer/, to be joined by id"
        raise ValueError(f"field 'ground_truth' is missing: {where}; {found_in(row)}")
    turns, tools, calls = take(row, question=list, function=list, ground_truth=list)
    try:
        (messages,) = turns
        query = "\n".join(message["content"] for message in messages)
    except (ValueError, TypeError, KeyError):
        raise ValueError("field 'question' is not a list of one turn, a list of messages") from None
    for call in calls:
        (arguments,) = call.values() if is_object(call) and len(call) == 1 else [None]
        if not is_object(arguments) or not all(
            isinstance(accepted, list) and accepted for accepted in arguments.values()
        ):
            raise ValueError(
                "field 'ground_truth' is not a list of calls, "
                "each {name: {argument: [accepted values]}}"
            )
    return {"query": query, "tools": tools, "calls": calls}


def is_object(value) -> bool:
    return isinstance(value, dict)


def example_calls(calls: list[dict]) -> list[dict]:
    """Right calls: of BFCL's accepted values the first, and no argument that may be left out."""

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


def calls_text(response: str) -> str | None:
    return None if extract_calls(response) is None else response.rpartition("</think>")[2].strip()


# The form comes last, and in dots: small models forget what stands before the functions, wrap no
# single call in a list unless told, and call the function of any example beside those asked for.
FORM = "one JSON list on one line, even of a single call"
DOTS = '[{"name": "...", "arguments": {"...": ...}}]'

TASK = Task(
    name="function_call",
    first=(
        "You can call these functions:\n{tools}\n\nRequest: {query}\n\n"
        "Answer with the calls that the request needs, and nothing else: "
        f"{FORM}, as in\n{DOTS}"
    ),
    correct=(
        "There may be an error in the calls above. Check them against the request and the "
        "functions, and answer the same request again with the correct calls, and nothing else: "
        f"{FORM}."
    ),
    reflect=(
        "Your calls were wrong. Explain in a few sentences what went wrong and what to do better. "
        "Do not write the calls again yet."
    ),
    retry=(
        "Now answer the same request again with the correct calls, and nothing else: "
        f"{FORM}, as in\n{DOTS}"
    ),
    critique=(
        "Compare the calls above with the request and the functions: "
        "say what is right in them, and what not."
    ),
    rewrite=(
        "Now answer the same request again, improved by that, with the calls and nothing else: "
        f"{FORM}, as in\n{DOTS}"
    ),
    view={
        "query": lambda p: p["query"],
        "tools": lambda p: "\n".join(json.dumps(tool) for tool in p["tools"]),
    },
    answer=lambda response, p: calls_text(response),
    verify=lambda response, p: verify_function_call(response, p["calls"]),
    parse=parse_function_call,
    source=(
        "hub:Salesforce/xlam-function-calling-60k, "
        "or files of the Berkeley Function Calling Leaderboard"
    ),
    key=lambda p: json.dumps([p["query"], p["tools"]]),
    solution=lambda p: json.dumps(example_calls(p["calls"])),
    max_new_tokens=256,  # 99 % of BFCL's parallel calls take up to 240 to 271
    max_reflection_tokens=128,
)
