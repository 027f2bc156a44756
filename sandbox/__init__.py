"""Whatever is not trusted, or may hang: programs of code tasks, and answers that sympy chews on.

To be read in this order; each module's docstring says what it is for.

    run.py      the caller's side: run_tests(program, tests) -> bool, and the server's self-test
    judge.py    what tests can't judge is said before they run
    server.py   started once as a script; forks a worker for each verdict
    shelf.py    the standard library, for programs that can open no file
    worker.py   runs the tests, in which the program's functions are proxies (proxy.py)
    guest.py    runs the program and is asked by the worker; sees no expected value
    jail.py     what holds the guest: limits, another user, a list of system calls
    wire.py     how they speak: tagged JSON of plain values
    grader.py   apart from all this: math-verify in processes that may be killed
    own.py      and a user's own verifier, which may hang
    cores.py    how many of all these may run at once
"""
