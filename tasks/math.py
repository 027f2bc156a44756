r"""MATH (Hendrycks et al., 2021): competition mathematics; gsm8k.py asks and grades as this does.

row:     {"problem": "What is $2^{-1}$?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
prompt:  What is $2^{-1}$? Reason step by step, and end with the final answer in \boxed{}.
answer:  A negative power is a reciprocal: \boxed{1/2}
"""

from tasks.base import Task
from tasks.chats import solved
from verifiers import extract_math, verify_math

TASK = Task(
    name="math",
    first="{problem}\n\nReason step by step, and end with the final answer in \\boxed{}.",
    correct=(
        "There may be an error in the solution above. Look for it, correct it if there is one, and "
        "write the whole solution again. End with the final answer in \\boxed{}."
    ),
    reflect=(
        "Your answer was wrong. Explain in a few sentences what went wrong and what to do better. "
        "Do not solve the problem again yet."
    ),
    retry="Now solve the problem again, step by step, and end with the final answer in \\boxed{}.",
    critique=(
        "Check the solution above step by step, and say what is right and what is wrong in it."
    ),
    rewrite=(
        "Now write the whole solution again, improved by that. "
        "End with the final answer in \\boxed{}."
    ),
    view={"problem": lambda p: p["problem"]},
    answer=lambda response, p: extract_math(response),
    verify=lambda response, p: verify_math(response, p["answer"]),
    warm_up=lambda: verify_math("\\boxed{1}", "1"),
    parse=lambda row: solved(row, "problem"),
    source="files of MATH's train and MATH-500's test split",
    key=lambda p: p["problem"],
    solution=lambda p: p["solution"],
    max_new_tokens=1024,
)
