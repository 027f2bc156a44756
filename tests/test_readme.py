"""What README.md and docs/ say is held against the files: figures, paths, commands, examples."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import pytest

import memory
from tasks import TASKS, own
from training.flags import parse_args

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TABLES = (ROOT / "results" / "reproduce" / "tables.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


# What stands in README.md


def test_the_readme_is_two_screens_and_starts_with_two_commands_that_can_be_pasted():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2500
    made = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    lines = README.splitlines()[:60]
    assert made + ".venv/bin/python score.py" in lines
    assert made + ".venv/bin/python -m pytest" in lines


def test_every_path_of_the_file_tree_exists_and_every_file_at_the_root_is_in_it():
    tree = README.partition("## What is where")[2]
    [tree] = blocks(tree, "")
    told = set()
    for line in tree.splitlines():
        folder = ROOT / line.split()[0] if line.split()[0].endswith("/") else ROOT
        if folder.name == "fast" and not folder.exists():
            continue  # it may be deleted
        for word in line.split():
            name = word.rstrip(".,;:")
            if not name.endswith(("/", ".py", ".sh", ".md")):
                continue
            inside = folder / name if (folder / name).exists() else ROOT / name
            assert inside.exists(), f"{name}: in the tree, but not there"
            told.add(inside)
    assert {path for path in ROOT.glob("*.py")} <= told


def test_the_lines_of_the_roll_out_are_those_of_score():
    lines = next(block for block in blocks(README, "python") if "def verify" not in block)
    score = (ROOT / "score.py").read_text().splitlines()
    assert not [line for line in lines.splitlines() if line not in score]


def test_the_rows_of_results_are_those_of_the_tables():
    names = {"base, untrained": "base", "plain multi-turn RL": "multi-turn RL", "SCoRe": "SCoRe",
             "imitation (STaR with D+)": "STaR, D+"}  # fmt: skip
    methods = TABLES.partition("## methods (tiny)")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in methods.splitlines()]
    known = {(row[1], row[2]): row[5:7] for row in cells if len(row) > 6 and row[4] == "sampled"}
    for told, name in names.items():
        [row] = re.findall(rf"^\| {re.escape(told)} \| (.*) \|$", README, re.MULTILINE)
        steps = ("320", "160", "320", "640") if name != "base" else ("", "", "", "")
        firsts = [known[name, step][index > 0] for index, step in enumerate(steps)]
        assert row.split(" | ") == firsts


def test_the_verdicts_numbers_are_those_of_the_tables():
    verdict = README.partition("**Self-correction is learnt")[2].partition("RRR's gain")[0]
    told = re.findall(r"(\d+\.\d) points", verdict)
    assert told and not [mean for mean in told if f"| +{mean} |" not in TABLES]


# What stands in docs/

FIGURES = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "well_formed")


ADAPTERS = DOCS["results.md"].partition("## With adapters")[2].partition("\n## ")[0]
REAL = DOCS["results.md"].partition("## On real models")[2].partition("\n## ")[0]


def test_the_figures_of_adapters_are_those_of_their_csv():
    with open(ROOT / "results" / "lora_tiny.csv") as file:
        runs = [row for row in csv.DictReader(file) if row["method"] != "base"]
    names = {"all weights": "SCoRe", "adapters, rank 4": "SCoRe, LoRA rank 4"}
    modes = {"greedy": "greedy", "T = 1": "sampled"}
    for (told, method), (shown, mode) in itertools.product(names.items(), modes.items()):
        seeds = [row for row in runs if (row["method"], row["mode"]) == (method, mode)]
        figures = [[100 * float(row[key]) for row in seeds] for key in FIGURES]
        cells = [f"{mean(x):.1f} ± {stdev(x) / len(x) ** 0.5:.1f}" for x in figures]
        assert len(seeds) == 3 and f"| {told} | {shown} | {' | '.join(cells)} |" in ADAPTERS


SHORT = {"0.0 ± 0.0": "0", "100.0 ± 0.0": "100"}
TASK_NAMES = {"function calls": "function_call", "MBPP": "mbpp", "HumanEval": "humaneval"}
TASK_NAMES |= {"Countdown": "countdown", "GSM8K": "gsm8k"}
RUNS = {"base": "calls_score: base", "SCoRe": "calls_score: trained_000100"}
RUNS["plain multi-turn RL"] = "calls_plain: trained_000100"
RUNS["SCoRe, first attempt held"] = "calls_score_held: trained_000100"


def rows_of(text: str) -> list[list[str]]:
    """The cells of every line of its tables."""
    lines = [line for line in text.replace("**", "").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def kept_rows(name: str) -> dict:
    """{(row, mode): {column: figure}} of a table in results/."""
    (_, _, *columns), *rows = rows_of((ROOT / "results" / name / "table.md").read_text())
    return {
        (row, mode): dict(zip(columns, (SHORT.get(cell, cell) for cell in cells), strict=True))
        for row, mode, *cells in rows
    }


def test_the_figures_of_real_models_before_training_are_those_of_their_table():
    kept, columns = kept_rows("base"), "acc_t1 acc_t2 delta i_to_c c_to_i changed".split()
    columns += ["well_formed", "truncated"]
    told = [row for row in rows_of(REAL) if row[0][1:4] == ".5B"]
    for name, mode, n, *cells in told:
        size, _, task = name.partition(", ")
        row = f"Qwen2.5-Coder-{size}-Instruct_{TASK_NAMES[task]}"
        mode = "sampled" if mode == "T = 1" else mode
        own, retried = (
            kept[f"{row}, {m}, n = {n}", mode] for m in ("self_correct", "reflect_retry")
        )
        assert cells == [*(own[c] for c in columns), retried["retry_given_failure"]], row
    assert 2 * len(told) == len(kept)


def test_the_figures_of_real_models_after_training_are_those_of_their_table():
    kept, common = kept_rows("real"), "acc_t1 acc_t2 delta i_to_c c_to_i changed".split()
    rows, told = rows_of(REAL), []
    for mode, more in (
        ("sampled", ["fresh", "gain_t1", "gain_t2"]),
        ("greedy", ["gain_t1", "gain_t2"]),
    ):
        start = next(
            i for i, row in enumerate(rows) if row[0] == ("T = 1", "greedy")[mode == "greedy"]
        )
        for name, *cells in rows[start + 1 : start + 5]:
            own = kept[RUNS[name], mode]
            wanted = [own[c] for c in common + more]
            assert cells == [*wanted[:-2], "", ""] if name == "base" else cells == wanted, name
            told.append(own)
    assert len(told) == 2 * len(RUNS)
    sampled = [kept[RUNS[name], "sampled"] for name in ("base", "SCoRe", "plain multi-turn RL")]
    for own in sampled:
        first, second = (own[c].partition(" ±")[0] for c in ("acc_t1", "acc_t2"))
        assert re.search(rf"\b{first} and (then )?{second}\b", README)


def test_the_figures_of_the_reproduction_are_those_of_its_tables():
    text = DOCS["results.md"].replace(ADAPTERS, "").replace(REAL, "") + DOCS["log.md"]
    means = re.findall(r"\| (-?\d+\.\d ± \d+\.\d)", text)
    assert len(means) > 200 and not [mean for mean in means if f" {mean} " not in TABLES]
    known = re.findall(r"\| ([+-]\d+\.\d) \| ([+-]\d+\.\d) to ([+-]\d+\.\d) \|", TABLES)
    known = {tuple(map(float, effect)) for effect in known}
    known |= {(-mean, -high, -low) for mean, low, high in known}
    effect = r"([+-]?\d+\.\d)(?: points)? \((-?\d+\.\d) to (-?\d+\.\d)\)"
    told = re.findall(effect, " ".join(text.split()))
    assert len(told) > 100
    assert not [effect for effect in told if tuple(map(float, effect)) not in known]


def test_the_memory_tables_are_those_of_the_formula():
    assert memory.table() in DOCS["gpus.md"] and memory.lora_table() in DOCS["gpus.md"]
    assert memory.disk_table() in DOCS["choices.md"]


def test_the_memory_measured_is_that_of_its_log_and_near_the_formula():
    runs = json.loads((ROOT / "results" / "bench" / "memory.json").read_text())["runs"]
    assert len(runs) > 10
    for command, phases in runs.items():
        figures = [
            phase[key] for phase in phases.values() for key in ("formula", "live", "process")
        ]
        row = " | ".join(f"{mib / 1024:.2f}" for mib in figures)
        assert f"| `{command}` | {row} |" in DOCS["gpus.md"]
        assert all(abs(phase["formula"] / phase["live"] - 1) < 0.1 for phase in phases.values())


def test_every_fault_has_its_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    table = [line for line in DOCS["faults.md"].splitlines() if line.startswith("| ")]
    rows = [line.split("|")[3] for line in table][1:]
    assert len(rows) > 15
    for row in rows:
        names = re.findall("`([a-z0-9_]+)`", row)
        assert names and all(f"def test_{name}(" in tests for name in names), row


def test_every_equation_is_where_the_table_says():
    table = DOCS["choices.md"].partition("## Where each equation is")[2].partition("\n## ")[0]
    table = table.partition("\n\nEach")[0]
    places = re.findall(r"`(\w+)\.(\w+)`", table)
    assert len(places) > 5
    for module, name in places:
        assert f"\ndef {name}(" in (ROOT / f"{module}.py").read_text(), f"{module}.{name}"


# In all of them


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_that_is_named_exists(page):
    text = page.read_text()
    for name in re.findall(r"(?:python|bash) ((?:bench/|recipes/)?[\w/]+\.(?:py|sh))", text):
        assert (ROOT / name).exists(), name


def commands(text: str) -> list[list[str]]:
    """[script, flags...] of every line that starts one, with the shell's variables filled in."""
    found = []
    for block in blocks(text, "sh"):
        values = {}
        for line in block.replace("\\\n", " ").splitlines():
            if named := re.match(r"([A-Z]+)=(\S+|\".*\")$", line):
                values[named[1]] = named[2].strip('"')
            for name in reversed(values):  # a value may hold one that was set before it
                line = line.replace(f"${name}", values[name])
            words = shlex.split(line, comments=True)
            scripts = [n for n, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
            if words and words[0] in ("python", "torchrun") and scripts:
                found.append(words[scripts[0] :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_script_takes(page):
    for script, *flags in commands(page.read_text()):
        parse_args(import_module(Path(script).stem).Config, flags)


def test_every_test_that_is_said_to_catch_a_break_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)", (ROOT / "tests" / "README.md").read_text()))
    assert len(named) > 50 and not [name for name in named if f"def {name}" not in tests]


# The task and the algorithms that a reader adds


def test_the_readers_own_task_is_one(tmp_path):
    (code,) = (block for block in blocks(README, "python") if "def verify" in block)
    path = tmp_path / "mine.py"
    path.write_text("WORDS = dict.fromkeys(['train', 'validation', 'test'], ['ab'])\n" + code)
    task = own.own_task(str(path), False, 10.0)
    (problem,) = task.generate("test", 0)
    assert task.prompt(problem) == "Write 'ab' backwards."
    assert (task.verify("It is ba.", problem), task.verify("ab", problem)) == (1.0, 0.0)


def apply(diff: str, text: str) -> str:
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(old) == 1, f"the README changes a line that is not in the file:\n{old}"
    return text.replace(old, new)


def changed_copy(script: str, path: Path):
    """`script`, imported, with the docs' changes to it: those from its name on to the next."""
    told = README + DOCS["choices.md"]
    sections = re.split(r"^A copy of `(\w+\.py)`", told, flags=re.MULTILINE)
    changes = blocks(dict(zip(sections[1::2], sections[2::2], strict=True))[script], "diff")
    assert 1 <= sum(line[0] in "+-" for change in changes for line in change.splitlines()) <= 15
    text = (ROOT / script).read_text()
    for change in changes:
        text = apply(change, text)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script, flag", [("rrr.py", "--brevity"), ("score.py", "--courage")])
def test_the_readers_own_algorithms_are_a_few_lines_and_reward_what_they_say(
    tmp_path, monkeypatch, script, flag
):
    import helpers

    own, right = changed_copy(script, tmp_path / f"own_{script}"), [False]
    # equal verdicts: whatever has an advantage then has it from the reader's own reward
    monkeypatch.setattr(helpers, "arbitrary_verdict", lambda text, problem: right[0])
    task = dataclasses.replace(TASKS["tiny"], answer=lambda text, problem: str(len(text) % 2))
    monkeypatch.setitem(TASKS, "tiny", task)
    if script == "rrr.py":  # which needs failures first, and something right to shorten
        collect = own.collect
        own.collect = lambda *a: (collect(*a), right.__setitem__(0, True))[0]
    model = helpers.save_random_model(tmp_path / "model")
    few, shares = [*helpers.FEW[script.removesuffix(".py")]], {}
    few += ["--max_reflection_tokens", "60"] * (script == "rrr.py")  # some end before that
    for weight in ("0", "0.5"):
        right[0] = False
        rows = helpers.train_here(own, model, tmp_path / weight, *few, flag, weight)
        assert {row.get("acc_t2", row["reward"]) for row in rows} == {right[0]}  # never shaped
        shares[weight] = min(row["zero_advantage"] for row in rows)
    assert shares["0"] == 1 and shares["0.5"] < 1
