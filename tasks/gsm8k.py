r"""GSM8K (Cobbe et al., 2021): mathematics in words; all but the rows is as in math.py.

row:     {"question": "A pen costs 3. And four?", "answer": "4 * 3 = <<4*3=12>>12.\n#### 12"}
prompt:  A pen costs 3. And four? Reason step by step, and end with the final answer in \boxed{}.
answer:  Four cost 4 * 3 = \boxed{12}.
"""

import re
from dataclasses import replace

from tasks import math
from tasks.chats import gsm8k_chat
from tasks.sources import take


def parse_gsm8k(row: dict) -> dict:
    question, text = take(row, question=str, answer=str)
    solution, mark, answer = text.rpartition("####")
    answer = answer.strip()
    if not mark or not answer:
        raise ValueError("field 'answer' does not end in '#### ' and a number")
    solution = re.sub(r"<<.*?>>", "", solution).strip()  # notes for a calculator
    solution += f"\nThe final answer is \\boxed{{{answer}}}."  # as the prompt asks for it
    return {"problem": question, "solution": solution, "answer": answer}


TASK = replace(
    math.TASK,
    name="gsm8k",
    parse=parse_gsm8k,
    chat=gsm8k_chat,
    source="hub:openai/gsm8k:main, or its files",
)
