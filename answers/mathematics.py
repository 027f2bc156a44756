"""The answer in a response to a problem of mathematics. writing.py brings it into one writing."""

import re

# one after a backslash is a character; \boxed 5 and \boxed\frac{1}{2} have no braces
TOKEN = re.compile(r"\\?\\(?:boxed|f(?:rame)?box)(?![A-Za-z])\s*(\{?)|\\.|[{}]", re.DOTALL)
ENVIRONMENT = re.compile(r"\s*\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)
FORMULA_END = re.compile(r"(?<!\\)\$|\\[)\]\\]|\\(?:end|boxed|f(?:rame)?box)(?![A-Za-z])|[&\n]")
FINAL_ANSWER = re.compile(r"final\s+answers?\b[*_ \t]*(?:is\b|are\b|[:=\n])|####", re.IGNORECASE)
ANSWER = re.compile(r"\banswers?\b[*_ \t]*(?:is\b|are\b|[:=])", re.IGNORECASE)
FILLER = re.compile(
    r"(?:[\s:*=_,]+|(?:so|therefore|thus|hence|then|simply|just|exactly|equal to|given by|"
    r"indeed|clearly|now|about|approximately|the (?:final |correct )?answer is)\b)*",
    re.IGNORECASE,
)
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\$((?:[^$\\]|\\.)+)\$(?![0-9])", re.DOTALL
)
JOINED = re.compile(r"\s*(?:,|,?\s*(?:and|or)\b)\s*(?:\$|\\\()")  # $5$ or $6$
# between two dollar signs of money stands a sentence: "$18, so she saves $3"
COMMAND = re.compile(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?")
MONEY = re.compile(r"[0-9].*(?:\s\Z|\b[a-zA-Z]{2,}\b)", re.DOTALL)
SENTENCE_END = re.compile(
    r"\.(?=\s|$)|\n|\*\*|__|;\s|\s(?:\(|[-–—]+\s)(?=[a-zA-Z]{2})|,\s+(?!and\b|or\b)(?=[a-z]{2})|"
    r"(?<=[0-9]),?\s+(?:and|but)\s+(?=[a-z]{2})|"
    r"\s(?:because|since|rather|instead|as|so|which|when|where|if|after|for|from)\b"
)  # fmt: skip

VALUE = re.compile(r"[0-9\\^+=<>|]|\A(?:\W*\b[A-Za-z]\b)+\W*\Z")  # 5, (C), p - q; not "right"


def extract_math(response: str) -> str | None:
    """What the last box after the last `</think>` holds, if any holds something.

    Else, of the text after the last "final answer is" (or "Final Answer:", "####"; if there is
    none, "the answer is", "Answer:"), the formula it begins with, or its first sentence up to where
    that begins to explain. A last one that says no value, like "this answer is correct", is
    passed over if another does.
    """
    text = response.rpartition("</think>")[2]
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    cues = list(FINAL_ANSWER.finditer(text)) or list(ANSWER.finditer(text))
    if not cues:
        return None
    ends = [cue.start() for cue in cues[1:]] + [len(text)]
    answers = [_first_answer(text[cue.end() : end]) for cue, end in zip(cues, ends)]
    answer = next((one for one in reversed(answers) if VALUE.search(one)), answers[-1])
    return answer if last_box(rf"\boxed{{{answer}}}") == answer else None  # its braces match


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{…}` or `\fbox{…}` that isn't empty holds, with braces or without.

    In one pass, for a text of a million braces too.
    """
    opened: list[tuple[int, bool]] = []
    boxes: list[tuple[int, int | None]] = []
    for match in TOKEN.finditer(text):
        is_box = match[1] is not None
        if match[0] == "}":
            if opened:
                start, boxed = opened.pop()
                if boxed:
                    boxes.append((start, match.start()))
        elif match[0] == "{" or match[1]:
            opened.append((match.end(), is_box))
        elif is_box:
            boxes.append((match.end(), None))
    for start, end in sorted(boxes, reverse=True):
        content = (_without_braces(text, start) if end is None else text[start:end]).strip()
        if content.strip("\\,;:!~ "):
            return content
    return None


def _without_braces(text: str, start: int) -> str:
    """TeX would box one character; who writes \\boxed 25 means the formula to its end."""
    if environment := ENVIRONMENT.match(text, start):
        return environment[0]
    end = FORMULA_END.search(text, start)
    formula = text[start : end.start() if end else len(text)]
    depth = 0
    for match in TOKEN.finditer(formula):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            formula = formula[: match.start()]
            break
    return SENTENCE_END.split(formula, maxsplit=1)[0].rstrip(" .,")


def _first_answer(text: str) -> str:
    text = text[FILLER.match(text).end() :]
    formula = FORMULA.match(text)
    if formula and JOINED.match(text, formula.end()):
        formula = None
    if formula and not (formula[4] and MONEY.match(COMMAND.sub("#", formula[4]))):
        return formula[formula.lastindex].strip()
    return SENTENCE_END.split(text, maxsplit=1)[0].strip()
