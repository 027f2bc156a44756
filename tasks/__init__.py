"""Tasks: one file each, with its rows, its prompts, its verdict and its defaults.

    tiny.py                          Countdown for the embedded model, which knows nothing else
    countdown.py                     the same in words, for any model
    math.py gsm8k.py                 mathematics, graded by math-verify
    mbpp.py mbpp_r.py humaneval.py   programs, run in the sandbox
    function_call.py                 JSON calls of functions

    base.py      what a task is: the class Task
    files.py     rows of files as they are found: JSON, CSV, parquet, packed or not
    chats.py     rows that ask in a chat, made rows of a task
    sources.py   problems from files and hub data sets; train, validation and test kept apart
    loading.py   the task that a run's flags ask for, with its problems, prompts and examples
    own.py       a task in a user's own file, --task FILE.py, which imports nothing of ours
    env.py       a task as one model meets it: prompts as ids, verdicts on rollouts

Train, validation and test never overlap and never move when problems are added, reordered or
generated with another seed. Every choice is made on validation; test is for final tables.

To add a task, write a file that ends in `TASK = Task(...)`, as countdown.py does, and name it
below: every script then takes it as --task, and tests/test_tasks.py tries it (its docstring too;
give that file's ROWS a row of it). Where only the rows differ from those of a task that is here,
replace these alone, as gsm8k.py does.
"""

from tasks import countdown, function_call, gsm8k, humaneval, math, mbpp, mbpp_r, tiny

TASKS = {
    module.TASK.name: module.TASK
    for module in (tiny, countdown, math, gsm8k, mbpp, mbpp_r, humaneval, function_call)
}
