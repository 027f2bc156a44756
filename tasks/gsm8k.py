r"""GSM8K (Cobbe et al., 2021): mathematics in words; all but the rows is as in math.py.

row:     {"question": "A pen costs 3. And four?", "answer": "4 * 3 = <<4*3=12>>12.\n#### 12"}
prompt:  A pen costs 3. And four? Reason step by step, and end with the final answer in \boxed{}.
answer:  Four cost 4 * 3 = \boxed{12}.
"""

import re
from dataclasses import replace

from tasks import math
from tasks.chats import solved, wordless


def parse_gsm8k(row: dict) -> dict:
    problem = solved(row, "question")
    if not wordless(problem["answer"]):
        raise ValueError(f"its answer is no number: {problem['answer'][:40]!r}")
    if problem["solution"]:  # notes for a calculator
        problem["solution"] = re.sub(r"<<.*?>>", "", problem["solution"])
    return problem


TASK = replace(
    math.TASK,
    name="gsm8k",
    parse=parse_gsm8k,
    source="hub:openai/gsm8k:main, or its files",
    max_new_tokens=512,
)
