"""Verifiers: response text -> bool.

Each is a pure function that never raises on any response text and never calls `eval`. A verdict is about the answer
alone: a response in the wrong format is a wrong answer.
"""

import re
from collections import Counter
from fractions import Fraction

MAX_ANSWER_CHARS = 1000
TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)(?![0-9])|([-+*/()]))")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "pos": 3}
STEP_LIMIT = 99  # the largest value that has a token of its own in the tiny vocabulary


def extract_answer(response: str) -> str | None:
    """The text of the last `<answer>…</answer>` after the last `</think>`, or None."""
    text = response.rpartition("</think>")[2]
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    return None if start < 0 else text[start + len("<answer>") : text.index("</answer>", start)].strip(" \t\r\n")


def verify_countdown(response: str, numbers: list[int], target: int) -> bool:
    """True if the tagged answer is an arithmetic expression equal to `target` that uses each number exactly once.

    Integers as given, `+ - * /`, parentheses and unary signs, in exact rational arithmetic. Anything else, an
    `= target` inside the tag or more than 1,000 characters included, is False.
    """
    answer = extract_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    tokens = _tokenize(answer)
    if tokens is None or Counter(t for t in tokens if isinstance(t, int)) != Counter(numbers):
        return False
    return _evaluate(tokens) == target


def _tokenize(expression: str) -> list[int | str] | None:
    tokens, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            return None
        tokens.append(int(match[1]) if match[1] else match[2])
        position = match.end()
    return tokens


def _evaluate(tokens: list[int | str]) -> Fraction | None:
    """Shunting-yard: explicit stacks, because a recursive parser would overflow on deep nesting."""
    values: list[Fraction] = []
    operators: list[str] = []
    operand_next = True
    try:
        for token in tokens:
            if isinstance(token, int) or token == "(":
                if not operand_next:
                    return None
                if token == "(":
                    operators.append(token)
                else:
                    values.append(Fraction(token))
                    operand_next = False
            elif operand_next:
                if token not in "+-":
                    return None
                operators.append("neg" if token == "-" else "pos")
            elif token == ")":
                _reduce(values, operators, 0)
                if not operators:
                    return None
                operators.pop()
            else:
                _reduce(values, operators, PRECEDENCE[token])
                operators.append(token)
                operand_next = True
        _reduce(values, operators, 0)
    except ZeroDivisionError:
        return None
    return values[0] if not operand_next and not operators else None


def _reduce(values: list[Fraction], operators: list[str], precedence: int) -> None:
    """Applies the operators on top of the stack that bind at least as tightly, back to an opening parenthesis."""
    while operators and operators[-1] != "(" and PRECEDENCE[operators[-1]] >= precedence:
        operator, right = operators.pop(), values.pop()
        if operator in ("neg", "pos"):
            values.append(-right if operator == "neg" else right)
            continue
        left = values.pop()
        if operator == "+":
            values.append(left + right)
        elif operator == "-":
            values.append(left - right)
        else:
            values.append(left * right if operator == "*" else left / right)


def run_steps(response: str, numbers: list[int]) -> int | None:
    """The value that an honest derivation in the tiny step format reaches, or None if it is not one.

    `16 / 8 = 2 ; 19 + 2 = 21`: every step combines two values still unused, states their exact result, an integer
    from 0 to 99, and puts it back; one value is left at the end.
    """
    unused = [str(n) for n in numbers]
    value = None
    for step in response.split(" ; "):
        words = step.split(" ")
        if len(words) != 5 or words[3] != "=":
            return None
        for word in (words[0], words[2]):
            if word not in unused:
                return None
            unused.remove(word)
        value = step_result(int(words[0]), words[1], int(words[2]))
        if value is None or str(value) != words[4]:
            return None
        unused.append(words[4])
    return value if len(unused) == 1 else None


def step_result(left: int, operator: str, right: int) -> int | None:
    """`left operator right` if it is an integer from 0 to 99, else None."""
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    elif operator == "/" and right != 0 and left % right == 0:
        result = left // right
    else:
        return None
    return result if 0 <= result <= STEP_LIMIT else None
