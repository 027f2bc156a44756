"""Rows that ask in a chat -> rows with the fields of a task.

    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2."}]}
    {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}

The user's one message is the problem; what a system says is left out, since the task has prompts of
its own. The answer is in a field (`answer`, `solution`, `ground_truth`, or verl's
`reward_model.ground_truth`), else in the assistant's last message. A row that has the task's own
field for the problem is taken by that, and its chat not looked at.
"""

import re
from typing import NamedTuple

from tasks.sources import found_in, typed
from verifiers import extract_code, extract_math

CHATS = ("messages", "prompt", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # as in `conversations`
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")
FORMULA = re.compile(r"\$([^$]+)\$")
WORDLESS = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*")
MARKED = re.compile(rf"####\s*\$?({NUMBER.pattern})\s*\Z")  # GSM8K's end of a solution


class Chat(NamedTuple):
    """What a row's messages come to."""

    question: str
    reply: str  # the assistant's last message; empty: there is none
    calls: list  # the tool calls of each message that has some


def chat_of(row: dict, field: str) -> Chat | None:
    """The chat in a row without a text in `field`; None if it has that text, or no chat."""
    found = {name: typed(row.get(name), list) for name in CHATS}
    name = next((name for name in CHATS if is_chat(found[name])), None)
    if isinstance(row.get(field), str) or name is None:
        return None
    more = typed(row.get("completion"), list)
    messages = found[name] + (more if is_chat(more) else [])
    roles = [message.get("role") or message["from"] for message in messages]
    said = {"user": [], "assistant": []}
    for role, message in zip(roles, messages, strict=True):
        said.setdefault(ROLES.get(role, role), []).append(text_of(message, name))
    if len(said["user"]) != 1:
        count = len(said["user"])
        raise ValueError(f"field '{name}' has {count} messages of the user, and a problem is one")
    calls = [calls for m in messages if isinstance(calls := m.get("tool_calls"), list) and calls]
    return Chat(said["user"][0], (said["assistant"] or [""])[-1], calls)


def is_chat(value) -> bool:
    """A list of objects, each with the role of who speaks."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and isinstance(m.get("role", m.get("from")), str) for m in value)


def text_of(message: dict, name: str) -> str:
    """Its words; of one in parts, those that are text; none if it only calls tools."""
    said = message.get("content", message.get("value")) or ""
    if isinstance(said, list):
        texts = [part.get("text") for part in said if isinstance(part, dict)]
        said = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(said, str):
        raise ValueError(f"field '{name}' has a message whose content is no text")
    return said


def math_chat(row: dict) -> dict:
    chat = chat_of(row, "problem")
    if chat is None:
        return row
    solution, answer = solved(row, chat.reply)
    if "\\boxed" not in solution:  # which the prompt asks for
        solution = MARKED.sub("", solution) + f"\nThe final answer is \\boxed{{{answer}}}."
    return row | {"problem": chat.question, "solution": solution.strip(), "answer": answer}


def gsm8k_chat(row: dict) -> dict:
    chat = chat_of(row, "question")
    if chat is None:
        return row
    solution, answer = solved(row, chat.reply)
    if not WORDLESS.fullmatch(answer):
        raise ValueError(f"its answer is no number: {answer[:40]}")
    solution = MARKED.sub("", solution) + f"\n#### {answer}"
    return row | {"question": chat.question, "answer": solution}


def solved(row: dict, reply: str) -> tuple[str, str]:
    """(worked solution, answer), of which the fields go before the reply.

    The solution is empty if there is none, or one with another answer: it may become an example.
    """
    model = row.get("reward_model")
    verl = model.get("ground_truth") if isinstance(model, dict) else None
    fields = [row.get("answer"), row.get("ground_truth"), verl]
    given = next((str(f) for f in fields if type(f) in (str, int, float) and f != ""), "")
    worked = row["solution"] if isinstance(row.get("solution"), str) else reply
    answer = last_of(given) or given or last_of(worked) or bare(worked)
    if not answer:
        raise ValueError(
            "no answer: wanted is one of the fields answer, solution, ground_truth, or a reply "
            f"that ends in \\boxed{{}}; {found_in(row)}"
        )
    worked = given if last_of(given) else worked
    return (worked if last_of(worked) in (None, answer) else ""), answer


def last_of(worked: str) -> str | None:
    """What a solution ends in, as MATH or GSM8K has it."""
    marked = MARKED.search(worked)
    return extract_math(worked) or (marked and marked[1])


def bare(text: str) -> str | None:
    """The answer in a text without any words: a number, or one formula."""
    formula = FORMULA.fullmatch(text.strip())
    return formula[1] if formula else text.strip() if NUMBER.fullmatch(text.strip()) else None


def code_chat(row: dict) -> dict:
    chat = None if isinstance(row.get("prompt"), str) else chat_of(row, "text")
    if chat is None:
        return row
    code = {"code": extract_code(chat.reply)} if chat.reply else {}
    return code | row | {"text": chat.question}


def call_chat(row: dict) -> dict:
    """The reply's calls are its `tool_calls`, or its text as JSON; several turns of calls: none."""
    chat = chat_of(row, "query")
    if chat is None:
        return row
    answers = [call_of(call) for call in chat.calls[0]] if len(chat.calls) == 1 else []
    said = answers if chat.calls else typed(chat.reply.strip(), list)
    answers = {"answers": said} if said and isinstance(said, list) else {}
    return answers | row | {"query": chat.question}


def call_of(call):
    """A tool call as our own rows have it; what is none, as it is."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {"name": function.get("name"), "arguments": typed(function.get("arguments"), dict)}
