"""Verifiers against real gold answers: what must be right is, what must be wrong is not.

`checks(folder)` runs them all over the JSONL files in `folder`; each is a row of a table. As a
script it prints that table, with verdicts a second, and what a verdict on code costs beside a
fresh interpreter: `python bench/verifier_checks.py DATA_DIR`.
"""

import argparse
import ast
import copy
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from verifiers import (  # noqa: E402
    extract_code,
    verify_batch,
    verify_code,
    verify_countdown,
    verify_function_call,
    verify_math,
)
from writings import changed_writings, other_writings, program_writings  # noqa: E402

BFCL = ("bfcl_simple_python", "bfcl_multiple", "bfcl_parallel", "bfcl_parallel_multiple")


def checks(folder: Path, workers: int = 2, every: int = 1) -> list[dict]:
    """every: of so many gold answers one is written otherwise, of so many programs one is run."""
    rows = [math_gold(folder, workers), *gsm8k(folder, workers)]
    rows += written_otherwise(
        "MATH-500", [row["answer"] for row in read(folder, "math500")][::every], workers
    )
    rows += written_otherwise("GSM8K", [gold for _, gold in gsm8k_pairs(folder)][::every], workers)
    rows += countdown(folder)
    rows += [row for name in BFCL for row in function_calls(folder, name)]
    rows += code("MBPP", mbpp(folder)[::every], workers)
    rows.append(chats_about_programs(folder, workers, every))
    return rows + code("HumanEval", humaneval(folder)[::every], workers)


def measure(check: str, verify, pairs: list[tuple], expected: bool, workers: int = 1) -> dict:
    """{check, expected, as_expected, of, per_second, failures} of verdicts on (text, problem)."""
    texts, problems = zip(*pairs)
    verify_batch(verify, texts[:workers], problems[:workers], workers)  # starts the processes
    start = time.perf_counter()
    verdicts = verify_batch(verify, texts, problems, workers)
    seconds = time.perf_counter() - start
    failures = [pair for pair, verdict in zip(pairs, verdicts) if verdict is not expected]
    figures = {
        "as_expected": len(pairs) - len(failures),
        "of": len(pairs),
        "per_second": len(pairs) / seconds,
    }
    return {"check": check, "expected": expected, **figures, "failures": failures}


def read(folder: Path, name: str) -> list[dict]:
    with open(folder / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def math_gold(folder: Path, workers: int) -> dict:
    pairs = [(row["solution"], row["answer"]) for row in read(folder, "math500")]
    return measure("MATH-500: solutions", verify_math, pairs, True, workers)


def gsm8k_pairs(folder: Path) -> list[tuple]:
    solutions = [row["answer"] for row in read(folder, "gsm8k_test")]
    return [(solution, solution.rpartition("#### ")[2]) for solution in solutions]


def gsm8k(folder: Path, workers: int) -> list[dict]:
    pairs = [
        (text.replace("####", "The final answer is"), gold) for text, gold in gsm8k_pairs(folder)
    ]
    wrong = [(f"\\boxed{{{int(gold.replace(',', '')) + 1}}}", gold) for _, gold in pairs]
    return [
        measure("GSM8K: solutions", verify_math, pairs, True, workers),
        measure("GSM8K: one more", verify_math, wrong, False, workers),
    ]


def written_otherwise(name: str, golds: list[str], workers: int) -> list[dict]:
    golds = dict.fromkeys(golds)
    right = [(text, gold) for gold in golds for text in other_writings(gold)]
    wrong = [(text, gold) for gold in golds for text in changed_writings(gold)]
    return [
        measure(f"{name}: other writings", verify_math, right, True, workers),
        measure(f"{name}: one value changed", verify_math, wrong, False, workers),
    ]


def countdown(folder: Path) -> list[dict]:
    rows = read(folder, "countdown34_train")
    pairs = [(f"<answer>{row['solution']}</answer>", row) for row in rows]
    wrong = [(text, row | {"target": row["target"] + 1}) for text, row in pairs]

    def verify(text, row):
        return verify_countdown(text, row["nums"], row["target"])

    return [
        measure("Countdown: solutions", verify, pairs, True),
        measure("Countdown: another target", verify, wrong, False),
    ]


def function_calls(folder: Path, name: str) -> list[dict]:
    pairs, wrong = [], []
    for row in read(folder, name):
        gold = row["ground_truth"]
        calls = [
            {"name": function, "arguments": plain(wanted)}
            for call in gold
            for function, wanted in call.items()
        ]
        pairs.append((json.dumps(calls), gold))
        wrong += [(json.dumps(changed), gold) for changed in one_value_changed(calls)]
    return [
        measure(f"{name}: gold", verify_function_call, pairs, True),
        measure(f"{name}: one value changed", verify_function_call, wrong, False),
    ]


def plain(wanted: dict) -> dict:
    """Lists of accepted values -> the first of each that is not "", which means none."""

    def value(accepted):
        if isinstance(accepted, dict):
            return plain(accepted)
        return [value(one) for one in accepted] if isinstance(accepted, list) else accepted

    return {
        key: value(one)
        for key, accepted in wanted.items()
        for one in [v for v in accepted if v != ""][:1]
    }


def one_value_changed(calls: list[dict]):
    """`calls` once for every string, number, true, false and null in it, with that one changed."""
    calls = copy.deepcopy(calls)

    def visit(holder, key):
        value = holder[key]
        if isinstance(value, dict | list):
            for inner in list(value) if isinstance(value, dict) else range(len(value)):
                yield from visit(value, inner)
            return
        if value is None or isinstance(value, bool):
            holder[key] = 1 if value else 0  # 1 is not true
        else:
            holder[key] = value + " (changed)" if isinstance(value, str) else value + 12345
        yield calls
        holder[key] = value

    for index in range(len(calls)):
        yield from visit(calls, index)


def mbpp(folder: Path) -> list[tuple]:
    """(program, (tests, entry point)), the challenge tests too where there are some."""
    pairs = []
    for row in read(folder, "mbpp"):
        tests = [row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]]
        pairs.append((row["code"], ("\n".join(tests), None)))
    return pairs


def chats_about_programs(folder: Path, workers: int, every: int) -> dict:
    pairs = [
        (response, task)
        for program, task in mbpp(folder)[::every]
        for response in program_writings(program, example_of(task[0]))
    ]

    def verify(response, task):
        return verify_code(extract_code(response), *task, timeout=20.0)

    return measure("MBPP: programs in other writings", verify, pairs, True, workers)


def example_of(tests: str) -> str:
    """What the last of a problem's tests calls."""
    return tests.rpartition("assert")[2].partition("==")[0].strip()


def humaneval(folder: Path) -> list[tuple]:
    rows = read(folder, "humaneval")
    return [
        (row["prompt"] + row["canonical_solution"], (row["test"], row["entry_point"]))
        for row in rows
    ]


def code(name: str, pairs: list[tuple], workers: int) -> list[dict]:
    def verify(program, problem):
        return verify_code(program, *problem, timeout=20.0)  # one of MBPP's takes seconds

    empty = [(without_bodies(program), problem) for program, problem in pairs]
    return [
        measure(f"{name}: canonical solutions", verify, pairs, True, workers),
        measure(f"{name}: `pass` for each function's body", verify, empty, False, workers),
    ]


def without_bodies(program: str) -> str:
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def cost_of_code(folder: Path, count: int = 100) -> dict[str, list[float]]:
    """Seconds of single verdicts, in turn: by the sandbox, and by a new `python -I -S` for each."""
    seconds = {"sandbox": [], "fresh interpreter": []}
    for program, (tests, _) in mbpp(folder)[:count]:
        start = time.perf_counter()
        verify_code(program, tests)
        seconds["sandbox"].append(time.perf_counter() - start)
        command = [sys.executable, "-I", "-S", "-c", f"{program}\n{tests}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds["fresh interpreter"].append(time.perf_counter() - start)
    return seconds


@dataclass
class Config:
    folder: Path
    workers: int = 2
    device: str = "cpu"


def main(config: Config) -> None:
    from common import finish, print_table, ratio

    rows = checks(config.folder, config.workers)
    table = [
        (r["check"], r["expected"], f"{r['as_expected']} / {r['of']}", f"{r['per_second']:.0f}")
        for r in rows
    ]
    print_table(("check", "expected", "as expected", "verdicts/s"), table)
    seconds = cost_of_code(config.folder)
    medians = {name: round(1000 * statistics.median(each), 2) for name, each in seconds.items()}
    print_table(("a verdict on code", "ms, median"), list(medians.items()))
    config.folder = str(config.folder)  # JSON has no paths
    kept = ("expected", "as_expected", "of", "per_second")
    finish(
        config,
        checks={row["check"]: {key: row[key] for key in kept} for row in rows},
        milliseconds=medians,
        speedup_code_over_fresh_interpreter=ratio(seconds["fresh interpreter"], seconds["sandbox"]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the JSONL files")
    parser.add_argument("--workers", type=int, default=2, help="threads, for mathematics and code")
    main(Config(**vars(parser.parse_args())))
