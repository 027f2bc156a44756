"""What a row asks and answers: in a task's own fields, or in a chat.

    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}
    {"prompt": "1 + 1?", "answer": "2"}

The user's one message is the problem, and the assistant's last one after it a reply to that; what a
system says is left out, since the task has prompts of its own. A row that has the task's own field
for the problem is taken by that, and its chat not looked at. A task in a user's file that has no
prompt of its own is asked all messages as they stand (`prompt_in`).
"""

import math
import re
from decimal import Decimal
from typing import NamedTuple

from answers.mathematics import last_box
from tasks.sources import found_in, take, typed
from verifiers import extract_math

CHATS = ("messages", "prompt", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # as in `conversations`
BARE = re.compile(r"\$((?:[^$\\]|\\.)+)\$|\$?([-+]?[\d,.]*\d)")  # just a formula or a number
WORDS = re.compile(r"[^\W\d_]|[=\n]")
# in what is a solution, or should have ended in an answer, and no answer itself
WORKED = re.compile(r'####|\\(?:boxed|fbox)|\banswers?\b|think>|\A\["', re.IGNORECASE)


class Chat(NamedTuple):
    """What a row's messages come to."""

    question: object  # of a row that is no chat: what its own field has
    reply: str = ""  # the assistant's last message; empty: there is none
    calls: tuple = ()  # the tool calls of each message that has some


def chat_of(row: dict, field: str) -> Chat:
    """The chat in a row, unless it has a text in `field`; without either, its `prompt`."""
    found = {name: typed(row.get(name), list) for name in CHATS}
    name = next((name for name in CHATS if is_chat(found[name])), None)
    if isinstance(row.get(field), str) or name is None:
        return Chat(row.get(field, row.get("prompt")))
    more = typed(row.get("completion"), list)
    messages = found[name] + (more if is_chat(more) else [])
    roles = [spoken_by(message) for message in messages]
    if roles.count("user") != 1:
        count = roles.count("user")
        raise ValueError(f"field '{name}' has {count} messages of the user, and a problem is one")
    asked = roles.index("user")
    after = [m for m, role in zip(messages, roles, strict=True) if role == "assistant"]
    after = after[roles[:asked].count("assistant") :]
    reply = text_of(after[-1], name) if after else ""
    calls = [calls for m in after if isinstance(calls := m.get("tool_calls"), list) and calls]
    return Chat(text_of(messages[asked], name), reply, tuple(calls))


def prompt_in(row: dict) -> str | list[dict] | None:
    """What a row asks as it stands: a text, or messages {role, content} up to the user's last."""
    found = {name: typed(row.get(name), list) for name in ("prompt", "messages", "conversations")}
    name = next((name for name in found if is_chat(found[name])), None)
    if isinstance(row.get("prompt"), str) and name != "prompt":
        return row["prompt"]
    said = [{"role": spoken_by(m), "content": text_of(m, name)} for m in found.get(name, [])]
    while said and said[-1]["role"] != "user":  # the reply, which is to be found by the model
        said.pop()
    return said or None


def spoken_by(message: dict) -> str:
    return ROLES.get(role_of(message), role_of(message))


def role_of(message: dict):
    return message.get("role") or message.get("from")


def is_chat(value) -> bool:
    """A list of objects, each with the role of who speaks."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and role_of(m) and isinstance(role_of(m), str) for m in value)


def text_of(message: dict, name: str) -> str:
    """Its words; of one in parts, those that are text; none if it only calls tools."""
    said = message.get("content", message.get("value")) or ""
    if isinstance(said, list):
        texts = [part.get("text") for part in said if isinstance(part, dict)]
        said = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(said, str):
        raise ValueError(f"field '{name}' has a message whose content is no text")
    return said


def solved(row: dict, field: str) -> dict:
    """{problem, solution, answer} of a row of mathematics.

    The answer is that of a field, else the end of the solution or reply. The solution is None if
    there is none, or one that comes to another answer: it may become an example.
    """
    chat = chat_of(row, field)
    [problem] = take(row | {field: chat.question}, **{field: str})
    model = typed(row.get("reward_model"), dict)
    fields = {name: row.get(name) for name in ("answer", "ground_truth", "solution")}
    fields["reward_model"] = model.get("ground_truth") if isinstance(model, dict) else None
    answer, truth, solution, verl = (written(*field) for field in fields.items())
    given, worked = answer or truth or verl, solution or chat.reply.strip()
    said = given or worked
    answer = last_of(said)
    if not answer and (BARE.fullmatch(said) or given and not WORKED.search(given)):
        answer = plain(said)
    if not answer:
        raise ValueError(
            "no answer: wanted is one of the fields answer, ground_truth, reward_model, or a "
            rf"solution or reply that ends in \boxed{{}} or '#### ' and a number; {found_in(row)}"
        )
    return {"problem": problem, "solution": example(given, worked, answer), "answer": answer}


def written(name: str, value) -> str:
    """A field's text, or its number as people write it; empty if it has none."""
    if type(value) is float:
        value = format(Decimal(repr(value)), "f") if math.isfinite(value) else ""
    if type(value) not in (str, int, type(None)):
        raise ValueError(f"field '{name}' is no text or number")
    return "" if value is None else str(value).strip()


def last_of(worked: str) -> str | None:
    """What a solution ends in, as MATH (in a box) or GSM8K has it (after ####, without words)."""
    said = worked.rpartition("</think>")[2]
    _, mark, end = said.rpartition("####")
    return last_box(said) or (plain(end.strip()) if mark and wordless(end.strip()) else None)


def wordless(text: str) -> bool:
    return bool(re.search(r"\d", text)) and not WORDS.search(text)


def plain(text: str) -> str:
    bare = BARE.fullmatch(text)
    return bare[bare.lastindex] if bare else text


def example(given: str, worked: str, answer: str) -> str | None:
    """The solution that comes to the answer, with a box at its end, for which the prompt asks."""
    texts = [given] if last_of(given) else []
    texts += [worked] if worked and not BARE.fullmatch(worked) else []
    right = (x for x in texts if (last_of(x) or extract_math(x)) in (None, answer))
    text = next(right, None)
    if text is None or last_box(text.rpartition("</think>")[2]):
        return text
    text = text.rpartition("####")[0] if last_of(text) else text
    return f"{text.strip()}\nThe final answer is \\boxed{{{answer}}}.".strip()


def call_chat(row: dict) -> dict:
    """The reply's calls are its `tool_calls`, or its text as JSON; several turns of calls: none."""
    chat = chat_of(row, "query")
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
