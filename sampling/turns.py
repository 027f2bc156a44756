"""Conversations as token ids: what stands before an answer, and between two.

Nothing that was sampled is ever decoded and encoded again. The chat template makes the first
prompt, and the seam: all that stands between an answer's text and the next one. A template that
rewrites history (one that strips thoughts, say) is therefore not followed in that: the model goes
on from what it did say. A template that prints the date is given the `day` of all conversations
that belong together, which may go on tomorrow: `datetime.isoformat` of it, by default now.
"""

from datetime import datetime
from string import ascii_letters

PLACEHOLDER = "PLACEHOLDER"
# A template's strftime_now reads the clock, and transformers hands on no function in its place: a
# macro of that name comes before it. trim_blocks eats the newline, so the template stays as it is.
CLOCK = (
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}"
    "{% for code, text in codes_of_day.items() %}"
    "{% set ns.text = ns.text.replace(code, text) %}{% endfor %}{{ ns.text }}{% endmacro %}\n"
)


def today() -> str:
    """Now, as a day is written down."""
    return datetime.now().isoformat(timespec="seconds")


def first_turn_ids(
    tokenizer,
    message: str | list[dict],
    shots: tuple[tuple[str, str], ...] = (),
    day: str | None = None,
    system: str = "",
) -> list[int]:
    """A conversation's first prompt, up to where the model's answer begins.

    message: the user's, or all messages {role, content} up to it, one of the system's first, if
    any; without a chat template, paragraphs.
    shots: (user's message, good answer) of few-shot examples, which stand before it as turns of the
    same conversation; without a chat template, as plain text in which every answer ends with the
    eos token, as the model's own has to.
    system: a system's message before all; without a chat template, a paragraph. Empty: none, or the
    template's own. One that the template has no place for is a ValueError.
    """
    if not isinstance(message, str):
        system = message[0]["content"] if message[0]["role"] == "system" else system
        said = [(m["role"], m["content"]) for m in message if m["role"] != "system"]
        *before, (_, message) = said
        if tokenizer.chat_template is None:
            message = "\n\n".join(text for _, text in said)
    else:
        before = []
    if tokenizer.chat_template is None:
        require_end(tokenizer)
        turns = [f"{asked}\n{answer}{tokenizer.eos_token}\n" for asked, answer in shots]
        first = f"{system}\n\n" if system else ""
        return begin(tokenizer, first + "".join(turns) + message + "\n")
    turns = [turn for asked, answer in shots for turn in (("user", asked), ("assistant", answer))]
    turns = [("system", system)] * bool(system) + turns
    text = render(tokenizer, [*turns, *before, ("user", message)], day)
    if system.strip() not in text:
        raise ValueError("the chat template leaves out the system's message")
    return encode(tokenizer, text)


def seam_ids(tokenizer, message: str, day: str | None = None) -> list[int]:
    """What the chat template puts between an answer's text and the next: the user's `message`.

    It begins with the token that ends the model's turn. Only this seam is encoded, around a
    placeholder.
    """
    if tokenizer.chat_template is None:
        require_end(tokenizer)
        return encode(tokenizer, f"{tokenizer.eos_token}\n{message}\n")
    text = render(tokenizer, [("user", "?"), ("assistant", PLACEHOLDER), ("user", message)], day)
    if PLACEHOLDER not in text:
        fault = "leaves out what the model said: it can't be used for several turns"
        raise ValueError(f"the chat template {fault}")
    return encode(tokenizer, text.partition(PLACEHOLDER)[2].lstrip(" "))


def follow_up_ids(
    tokenizer, message: str, last_ids: list[int], day: str | None = None
) -> list[list[int]]:
    """The ids to append to rows that end with `last_ids` (B,), for an answer to the `message`.

    A row that ended its turn has sampled the seam's first token itself. One that was cut off, or
    stopped at another stop token, gets the whole seam.
    """
    seam = seam_ids(tokenizer, message, day)
    return [seam[1:] if last == seam[0] else seam for last in last_ids]


def render(tokenizer, turns: list[tuple[str, str]], day: str | None = None) -> str:
    """(role, content) turns as the chat template writes them, up to where an answer begins."""
    chat = [{"role": role, "content": content} for role, content in turns]
    template, dated = tokenizer.get_chat_template(), {}
    if "strftime_now" in template:
        template, dated = CLOCK + template, {"codes_of_day": codes_of(day or today())}
    try:
        return tokenizer.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=True, tokenize=False, **dated
        )
    except Exception as error:  # a program that came with the model: it may raise what it likes
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template can't be used: {reason}") from None


def codes_of(day: str) -> dict[str, str]:
    """{code of strftime: what it stands for on that day}, to be replaced in this order."""
    time = datetime.fromisoformat(day)
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters]
    return {"%%": "\0"} | {code: time.strftime(code) for code in codes} | {"\0": "%"}


def begin(tokenizer, text: str) -> list[int]:
    """A text's ids after those that the tokenizer begins every text with (bos), if it does.

    What some append to it (eos, sep) would say that there is nothing to go on with.
    """
    probe = PLACEHOLDER + text  # found in its whole even if the text is no token, or a bos alone
    whole, ids = tokenizer(probe).input_ids, encode(tokenizer, probe)
    start = next((i for i in range(len(whole)) if whole[i : i + len(ids)] == ids), len(whole))
    return tokenizer(text).input_ids[: start + len(encode(tokenizer, text))]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def require_end(tokenizer) -> None:
    if tokenizer.eos_token is None:
        neither = "neither a chat template nor an eos token"
        raise ValueError(f"the tokenizer has {neither}: set one in its config")
