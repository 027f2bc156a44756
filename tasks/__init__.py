"""Tasks: one file each, with its rows, its prompts, its verdict and its defaults.

    tiny.py           what the embedded model does, and the only one with problems for it
    countdown.py      the same in words, for a real model; makes its own problems too
    math.py gsm8k.py  mathematics, graded by math-verify
    mbpp.py mbpp_r.py humaneval.py   programs, run in the sandbox
    function_call.py  JSON calls of functions

    base.py           what a task is: the class Task
    sources.py        problems from files and hub data sets; train, validation and test apart
    loading.py        the task of a run's flags, with its problems, prompts and examples

Train, validation and test never overlap and never move when problems are added, reordered or
generated with another seed. Every choice is made on validation; test is for final tables.

To add a task, write a file that ends in TASK = Task(...), countdown.py is a whole one, and name it
below; `--task NAME` then works in every script, and tests/test_tasks.py tries it with any text.
Where only the rows differ from a task that is here, `replace` that one, as gsm8k.py does.
"""

from tasks import countdown, function_call, gsm8k, humaneval, math, mbpp, mbpp_r, tiny

TASKS = {
    module.TASK.name: module.TASK
    for module in (tiny, countdown, math, gsm8k, mbpp, mbpp_r, humaneval, function_call)
}
