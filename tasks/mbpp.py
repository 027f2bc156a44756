r"""MBPP (Austin et al., 2021): short programs; mbpp_r.py and humaneval.py share the prompts.

row:     {"task_id": 700, "text": "Add two numbers.", "code": "def add(a, b):\r\n  return a + b",
          "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}
prompt:  Write a Python program for this task: Add two numbers. It has to pass these tests: ...
answer:  ```python
         def add(a, b): return b + a
         ```
"""

from sandbox import run as sandbox
from tasks.base import Task
from tasks.chats import chat_of
from tasks.sources import take, typed
from verifiers import extract_code, verify_code


def parse_mbpp(row: dict) -> dict:
    """`sanitized` asks in `prompt`, and its tests' imports are a list."""
    if "text" not in row and isinstance(row.get("prompt"), str):
        row = row | {"text": row["prompt"]}
    chat = chat_of(row, "text")
    code = {"code": extract_code(chat.reply)} if chat.reply else {}
    row = code | row | {"text": chat.question}
    task_id, text, code, tests = take(row, task_id=int, text=str, code=str, test_list=list)
    imports, setup = typed(row.get("test_imports"), list) or [], row.get("test_setup_code") or ""
    if not isinstance(imports, list) or not all(isinstance(x, str) for x in (setup, *imports)):
        raise ValueError("field 'test_imports' must be a list of texts, 'test_setup_code' a text")
    if not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' must be a list of texts")
    setup = setup or "\n".join(imports)
    tests = [unix(test) for test in [setup] * bool(setup) + tests]
    require_judge("test_list", "\n".join(tests))
    return {"task_id": task_id, "text": text, "code": unix(code), "tests": tests}


def require_judge(field: str, tests: str, entry_point: str | None = None) -> None:
    """ValueError for a row whose tests every program would pass, or none could."""
    try:
        sandbox.require_judge(tests, entry_point, sandbox.numpy)
    except ValueError as error:
        raise ValueError(f"field '{field}': {error}") from None


def unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def published_split(problem: dict) -> str:
    """Of the 974 problems of the `full` set."""
    number = problem["task_id"]
    if number <= 10:
        return "examples"
    if number <= 510:
        return "test"
    return "validation" if number <= 600 else "train"


def fenced(program: str) -> str:
    return f"```python\n{program.strip()}\n```"


TASK = Task(
    name="mbpp",
    first=(
        "Write a Python program for this task:\n{text}\n\n"
        "It has to pass these tests:\n```python\n{tests}\n```"
    ),
    correct=(
        "There may be an error in the program above. Look for it, correct it if there is one, and "
        "write the program again. Give only the final program, between ```python and ```."
    ),
    reflect=(
        "Your program fails its tests. Explain in a few sentences what went wrong and how to do "
        "better next time. Do not write the program again yet."
    ),
    retry="Now write the program again. Give only the program, between ```python and ```.",
    critique="Review the program above: say what is right in it, and what is wrong or missing.",
    rewrite=(
        "Now write the program again, improved by that. "
        "Give only the program, between ```python and ```."
    ),
    view={"text": lambda p: p["text"], "tests": lambda p: "\n".join(p["tests"])},
    answer=lambda response, p: extract_code(response) or None,
    verify=lambda response, p: verify_code(extract_code(response), p["tests"]),
    warm_up=lambda: verify_code("", "assert True"),
    parse=parse_mbpp,
    source="hub:google-research-datasets/mbpp:full, or its mbpp.jsonl",
    key=lambda p: "\n".join([p["text"], *p["tests"]]),
    published=published_split,
    solution=lambda p: fenced(p["code"]),
    default_shots=3,
)
