r"""HumanEval (Chen et al., 2021): a function's head and description, to complete.

row:     {"prompt": "def half(x):\n    \"\"\"Half of x.\"\"\"\n", "entry_point": "half",
          "canonical_solution": "    return x / 2\n",
          "test": "def check(candidate):\n    assert candidate(3) == 1.5\n"}
prompt:  Complete this Python function. Give the whole program, with its imports, between ...
answer:  ```python
         def half(x): return x * 0.5
         ```
"""

import ast
from dataclasses import replace

from answers.programs import lift_futures
from tasks import mbpp
from tasks.sources import take
from verifiers import extract_code, verify_code


def parse_humaneval(row: dict) -> dict:
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    problem = dict(zip(fields, take(row, **dict.fromkeys(fields, str)), strict=True))
    mbpp.require_judge("test", problem["test"], problem["entry_point"])
    return problem


def verify_humaneval(response: str, problem: dict) -> bool:
    """The function's head comes with imports and helpers, which the response need not repeat."""
    prompt, name = problem["prompt"], problem["entry_point"]
    program = lift_futures(prompt + "\n" + extract_code(response))
    return verify_code(program, helpers(prompt, name) + problem["test"], name)


def helpers(prompt: str, entry_point: str) -> str:
    """A prompt's imports and functions but the one asked for.

    Tests that use them take these, not the program's own, which may have replaced them.
    """
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        return ""
    tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(tree) + "\n"


TASK = replace(
    mbpp.TASK,
    name="humaneval",
    first=(
        "Complete this Python function. Give the whole program, with its imports, "
        "between ```python and ```.\n```python\n{program}```"
    ),
    view={"program": lambda p: p["prompt"]},
    verify=verify_humaneval,
    parse=parse_humaneval,
    source="hub:openai/openai_humaneval, or its file (test=FILE for all 164 problems)",
    key=lambda p: p["prompt"],
    published=None,
    solution=lambda p: mbpp.fenced(p["prompt"] + p["canonical_solution"]),
    default_shots=0,
    max_new_tokens=768,
)
