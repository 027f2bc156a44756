"""Verifiers: response text -> bool.

Each is a pure function that never raises on any response text and never calls `eval`. A verdict is
about the answer alone: a response in the wrong format is a wrong answer.

In this order: Countdown, mathematics, function calls, programs.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

from answers.mathematics import extract_math
from answers.programs import extract_code  # noqa: F401, tasks take it from here
from answers.writing import alike
from sandbox import grader
from sandbox import run as sandbox

MAX_ANSWER_CHARS = 1000
TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)(?![0-9])|([-+*/()]))")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "pos": 3}
FENCE = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*)```", re.DOTALL)


def extract_answer(response: str) -> str | None:
    """The text of the last `<answer>…</answer>` after the last `</think>`, or None."""
    text = response.rpartition("</think>")[2]
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    return text[start + len("<answer>") : text.index("</answer>", start)].strip(" \t\r\n")


def verify_countdown(response: str, numbers: list[int], target: int) -> bool:
    """True if the tagged answer is an expression over exactly these numbers that equals `target`.

    Each number once, as given; `+ - * /`, parentheses and unary signs, in exact rational
    arithmetic. Anything else, an `= target` inside the tag or more than 1,000 characters included,
    is False.
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
        if operand_next:
            return None
        _reduce(values, operators, 0)
    except ZeroDivisionError:
        return None
    return None if operators else values[0]


def _reduce(values: list[Fraction], operators: list[str], precedence: int) -> None:
    """Applies the topmost operators that bind at least as tightly, back to a parenthesis."""
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


def verify_math(response: str, answer: str, timeout: float = grader.TIMEOUT) -> bool:
    """True if math-verify finds the response's answer equal to `answer`.

    answer: LaTeX, or a plain number such as 1,234

    Both are written alike first (degree signs, nouns after a number, spaces, signs). Exact: what
    agrees after rounding only is different, and so are two number bases; 28 % is 0.28, or 28. Over
    1,000 characters, or over `timeout` seconds of processor time: False. A grader that can't be
    started, or whose workers somebody ends, raises ImportError or RuntimeError.
    """
    given = extract_math(response)
    if not given or len(given) > MAX_ANSWER_CHARS:
        return False
    return grader.equivalent(alike(answer), alike(given), timeout)


def verify_function_call(response: str, calls: list[dict]) -> bool:
    """True if the response is a JSON list of exactly these calls, in any order.

    calls: `{"name", "arguments"}` objects (APIGen), or the BFCL's
        `{name: {argument: [accepted values]}}`, where "" among the accepted values makes an
        argument optional and objects list accepted values for each of their fields.
    """
    given, gold = extract_calls(response), _parse_json(json.dumps(calls))
    return given is not None and len(given) == len(gold) and _matches_one_to_one(given, gold)


def extract_calls(response: str) -> list[dict] | None:
    """The calls, if all after the thoughts is a JSON list of them, in a code fence or not."""
    text = response.rpartition("</think>")[2].strip(" \t\r\n")
    fence = FENCE.fullmatch(text)
    try:
        given = _parse_json(fence[1] if fence else text)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return given if _is_list_of_calls(given) else None


def _parse_json(text: str):
    """Numbers become Decimal: 3 is 3.0, but 10**20 + 1 is not 1e20.

    Duplicate keys, NaN and Infinity are a ValueError.
    """

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

    return json.loads(
        text,
        object_pairs_hook=unique,
        parse_int=Decimal,
        parse_float=Decimal,
        parse_constant=no_constant,
    )


def _is_list_of_calls(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, dict)
        and call.keys() == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
        for call in value
    )


def _matches_one_to_one(given: list[dict], gold: list[dict]) -> bool:
    """A perfect matching by augmenting paths.

    Where accepted values overlap, first come first served is not enough.
    """
    fits = [[j for j, wanted in enumerate(gold) if _is_call(call, wanted)] for call in given]
    owner: dict[int, int] = {}
    place: dict[int, int] = {}
    return all(_find_place(i, fits, owner, place) for i in range(len(given)))


def _find_place(
    i: int, fits: list[list[int]], owner: dict[int, int], place: dict[int, int]
) -> bool:
    """Breadth first, because a recursive search would overflow on a thousand calls."""
    wanted_by: dict[int, int] = {}
    queue = [i]
    for call in queue:
        for j in fits[call]:
            if j in wanted_by:
                continue
            wanted_by[j] = call
            if j in owner:
                queue.append(owner[j])
                continue
            while j is not None:  # all along the path move on
                owner[j] = call = wanted_by[j]
                place[call], j = j, place.get(call)
            return True
    return False


def _is_call(call: dict, gold: dict) -> bool:
    if gold.keys() == {"name", "arguments"}:
        return _same(call, gold)
    ((name, arguments),) = gold.items()
    return call["name"] == name and _is_accepted(call["arguments"], arguments)


def _same(value, gold) -> bool:
    """Equal as JSON: true is not 1, objects have the same keys, lists the same order."""
    if type(value) is not type(gold):
        return False
    if isinstance(gold, dict):
        return value.keys() == gold.keys() and all(_same(value[key], gold[key]) for key in gold)
    if isinstance(gold, list):
        return len(value) == len(gold) and all(map(_same, value, gold))
    return value == gold


def _is_accepted(value, gold) -> bool:
    """The same, where a field of an object in `gold` lists its accepted values, or has the one."""
    if isinstance(value, dict) and isinstance(gold, dict):
        return value.keys() <= gold.keys() and all(
            _is_accepted_field(value, key, wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in gold.items()
        )
    if isinstance(value, list) and isinstance(gold, list):
        return len(value) == len(gold) and all(map(_is_accepted, value, gold))
    return _same(value, gold)


def _is_accepted_field(value: dict, key: str, accepted: list) -> bool:
    if key not in value:
        return "" in accepted
    return any(_is_accepted(value[key], one) for one in accepted)


def verify_code(
    program: str,
    tests: list[str] | str,
    entry_point: str | None = None,
    timeout: float | None = None,
) -> bool:
    """True if every test holds within `timeout` seconds of processor time.

    The program runs in the sandbox and can't tell what is tested.
    tests: assert statements, any set-up code first, or one text. With an entry_point they may
        define `check(candidate)`, HumanEval's form.
    timeout: default --code_timeout, 5. The clock ends what sleeps, 10 seconds later.

    Tests that can't judge are a ValueError, a sandbox that can't be had a SandboxError.
    """
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    return sandbox.run_tests(program, tests, entry_point, timeout)


def verify_batch(
    verify: Callable[[str, dict], bool], texts: list[str], problems: list[dict], workers: int = 1
) -> list[bool]:
    """`verify(text, problem)` of every pair, in order. What a verifier raises is raised.

    workers: threads, for verifiers that wait for a process of their own (mathematics, code); the
        others take 1. One verdict that hangs until its timeout does not keep the others waiting.
    """
    if workers == 1:
        return [verify(text, problem) for text, problem in zip(texts, problems, strict=True)]
    if len(texts) != len(problems):
        raise ValueError(f"{len(texts)} texts for {len(problems)} problems")
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(verify, texts, problems))
