"""The answer in a response to a problem of mathematics, written as math-verify reads it."""

import re

BRACES = re.compile(r"\\?\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # one after a backslash is a character
FINAL_ANSWER = re.compile(r"final answer is", re.IGNORECASE)
MATH_SPAN = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|\*\*")


def extract_math(response: str) -> str | None:
    """What the last balanced `\\boxed{…}` after the last `</think>` holds.

    Else, of the text after "final answer is", the formula it begins with, or its first sentence.
    """
    text = response.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    *before, text = FINAL_ANSWER.split(text)
    if not before:
        return None
    text = text.lstrip(" \t\r\n:*")
    span = MATH_SPAN.match(text)
    answer = (span[span.lastindex] if span else SENTENCE_END.split(text, maxsplit=1)[0]).strip()
    matched = _last_boxed(rf"\boxed{{{answer}}}") == answer  # its braces
    return answer if matched else None


def _last_boxed(text: str) -> str | None:
    """In one pass, for a text of a million braces too."""
    opened: list[tuple[int, bool]] = []
    last = (-1, -1)
    for match in BRACES.finditer(text):
        if match[0] == "}" and opened:
            start, boxed = opened.pop()
            if boxed and start > last[0]:
                last = (start, match.start())
        elif match[0] == "{" or "boxed" in match[0]:
            opened.append((match.end(), match[0] != "{"))
    return None if last[0] < 0 else text[last[0] : last[1]]


def alike(answer: str) -> str:
    answer = answer.strip()
    return answer[:-1] if re.search(r"\d\.\Z", answer) else answer
