"""What is said to the model in each turn of each task. A JSON file with any of these keys
(--prompts) replaces them.

first:    the problem. {placeholders} stand for its parts, other braces for themselves; the rest
          have no placeholders
correct:  asks for a second attempt and never reveals a verdict (SCoRe, turn 2)
reflect:  after a failure, asks what went wrong (RRR), and
retry:    asks for another attempt after the reflection
critique: asks for a critique of any answer, and
rewrite:  for a better answer after it (Self-Refine)
generic_reflection: a reflection in the model's own name that knows nothing of the problem, for a
    control
"""

import re

from tasks.sources import parse_json, read_text

KEYS = ("first", "correct", "reflect", "retry", "critique", "rewrite", "generic_reflection")
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
REFLECT = (
    "Your answer was wrong. Explain in a few sentences what went wrong and what to do better. Do not solve the "
    "problem again yet."
)
GENERIC = "I made a mistake. Next time I will check every step before I answer."

TINY = {
    "first": "{numbers} make {target}",
    "correct": "fix",
    "reflect": "reflect",
    "retry": "retry",
    "critique": "reflect",
    "rewrite": "fix",
    "generic_reflection": "no try retry",
}
COUNTDOWN = {
    "first": (
        "Using the numbers {numbers}, write an expression that equals {target}. Use every number exactly once, with "
        "+ - * / and parentheses only. Think briefly, then give the expression alone, without an equals sign, between "
        "<answer> and </answer>."
    ),
    "correct": (
        "The solution above may contain an error. Check it, correct it if needed, and write the whole solution again. "
        "Give the final expression alone between <answer> and </answer>."
    ),
    "reflect": REFLECT,
    "retry": "Now try again, and give the expression alone between <answer> and </answer>.",
    "critique": "Check the solution above step by step, and say what is right and what is wrong in it.",
    "rewrite": (
        "Now write the whole solution again, improved by that. Give the final expression alone between <answer> and "
        "</answer>."
    ),
    "generic_reflection": GENERIC,
}
MATH = {
    "first": "{problem}\n\nReason step by step, and end with the final answer in \\boxed{}.",
    "correct": (
        "There may be an error in the solution above. Look for it, correct it if there is one, and write the whole "
        "solution again. End with the final answer in \\boxed{}."
    ),
    "reflect": REFLECT,
    "retry": "Now solve the problem again, step by step, and end with the final answer in \\boxed{}.",
    "critique": "Check the solution above step by step, and say what is right and what is wrong in it.",
    "rewrite": "Now write the whole solution again, improved by that. End with the final answer in \\boxed{}.",
    "generic_reflection": GENERIC,
}
CODE = {
    "first": "Write a Python program for this task:\n{text}\n\nIt has to pass these tests:\n```python\n{tests}\n```",
    "correct": (
        "There may be an error in the program above. Look for it, correct it if there is one, and write the program "
        "again. Give only the final program, between ```python and ```."
    ),
    "reflect": (
        "Your program fails its tests. Explain in a few sentences what went wrong and how to do better next time. Do "
        "not write the program again yet."
    ),
    "retry": "Now write the program again. Give only the program, between ```python and ```.",
    "critique": "Review the program above: say what is right in it, and what is wrong or missing.",
    "rewrite": "Now write the program again, improved by that. Give only the program, between ```python and ```.",
    "generic_reflection": GENERIC,
}
HUMANEVAL = CODE | {
    "first": (
        "Complete this Python function. Give the whole program, with its imports, between ```python and ```.\n"
        "```python\n{program}```"
    ),
}
FUNCTION_CALL = {
    "first": (
        "You can call these functions:\n{tools}\n\nAnswer the request with a JSON list of calls and nothing else, each "
        'as {"name": "...", "arguments": {"...": ...}}.\nRequest: {query}'
    ),
    "correct": (
        "There may be an error in the calls above. Answer the same request again with the correct JSON list of calls, "
        "and nothing else."
    ),
    "reflect": (
        "Your calls were wrong. Explain in a few sentences what went wrong and what to do better. Do not write the "
        "calls again yet."
    ),
    "retry": "Now answer the same request again with the correct JSON list of calls, and nothing else.",
    "critique": "Compare the calls above with the request and the functions: say what is right in them, and what not.",
    "rewrite": "Now answer the same request again, improved by that: a JSON list of calls, and nothing else.",
    "generic_reflection": GENERIC,
}


def fill(template: str, problem: dict, view: dict) -> str:
    """A first prompt: each {placeholder} replaced by what `view` makes of the problem."""
    return PLACEHOLDER.sub(lambda match: view[match[1]](problem), template)


def read_prompts(path: str, view: dict) -> dict[str, str]:
    """The prompts in a JSON file, for a task with the placeholders of `view`; ValueError if one
    makes no sense."""
    prompts = parse_json(read_text(path), path)
    if not isinstance(prompts, dict):
        raise ValueError(f"--prompts {path}: it must hold one JSON object")
    for key, text in prompts.items():
        if key not in KEYS:
            raise ValueError(
                f"--prompts {path}: unknown key '{key}': choose from {', '.join(KEYS)}"
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"--prompts {path}: '{key}' must be a text")
        known = list(view) if key == "first" else []
        used = PLACEHOLDER.findall(text)
        for name in used:
            if name not in known:
                allowed = ", ".join(f"{{{n}}}" for n in known) or "none"
                raise ValueError(
                    f"--prompts {path}: unknown placeholder {{{name}}} in '{key}': it may have {allowed}"
                )
        if known and not used:
            raise ValueError(
                f"--prompts {path}: 'first' has none of {', '.join(known)}: the model would see no problem"
            )
    return prompts
