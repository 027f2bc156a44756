r"""MBPP-R, offline repair: each problem comes with a wrong program, given as the first attempt.

row:     {"task_id": 700, "text": "Add two numbers.", "code": "def add(a, b):\r\n  return a + b",
          "test_list": ["assert add(1, 2) == 3"], "first_attempt": "def add(a, b): return a - b"}
prompt:  Write a Python program for this task: Add two numbers. It has to pass these tests: ...
answer:  ```python
         def add(a, b): return b + a
         ```
"""

from dataclasses import replace

from tasks import mbpp
from tasks.sources import take


def parse_mbpp_r(row: dict) -> dict:
    return mbpp.parse_mbpp(row) | {"first_attempt": mbpp.unix(take(row, first_attempt=str)[0])}


TASK = replace(
    mbpp.TASK,
    name="mbpp_r",
    parse=parse_mbpp_r,
    source="rows of MBPP, each with a wrong program in the field 'first_attempt'",
    given=lambda p: mbpp.fenced(p["first_attempt"]),
    default_shots=0,
)
