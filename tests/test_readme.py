"""What the README tells a reader to do is done here as printed."""

import importlib.util
import re

import helpers
import memory


def apply(diff: str, text: str) -> str:
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(old) == 1, f"the README changes a line that is not in the file:\n{old}"
    return text.replace(old, new)


def test_the_readers_third_algorithm_is_a_few_lines_and_trains(tmp_path):
    text = (helpers.ROOT / "rrr.py").read_text()
    changes = re.findall(
        r"```diff\n(.*?)\n```", (helpers.ROOT / "README.md").read_text(), re.DOTALL
    )
    assert 1 <= sum(line[0] in "+-" for change in changes for line in change.splitlines()) <= 10
    for change in changes:
        text = apply(change, text)
    (tmp_path / "brief.py").write_text(text)
    spec = importlib.util.spec_from_file_location("brief", tmp_path / "brief.py")
    brief = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(brief)

    model = helpers.save_random_model(tmp_path / "model")
    flags = [
        "--steps",
        "2",
        "--queries",
        "6",
        "--tries",
        "2",
        "--failures_per_step",
        "2",
        "--group_size",
        "2",
    ]
    rows = helpers.train_here(
        brief, model, tmp_path / "run", *flags, "--max_reflection_tokens", "6", "--brevity", "0.5"
    )
    assert [row["step"] for row in rows] == [0, 1]


def test_the_memory_table_is_that_of_the_formula():
    assert memory.table() in (helpers.ROOT / "README.md").read_text()


def test_every_fault_has_its_test():
    table = (
        (helpers.ROOT / "README.md")
        .read_text()
        .partition("## What can happen to a run")[2]
        .partition("\n## ")[0]
    )
    tests = "".join(path.read_text() for path in (helpers.ROOT / "tests").glob("test_*.py"))
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        names = [name for name in re.findall("`([a-z0-9_]+)`", row)]
        assert names and all(f"def test_{name}(" in tests for name in names), row


def test_the_figures_of_the_reproduction_are_those_of_its_tables():
    section = (
        (helpers.ROOT / "README.md").read_text().partition("## The embedded task and model")[0]
    )
    tables = (helpers.ROOT / "results" / "reproduce" / "tables.md").read_text()
    means = re.findall(r"\| (-?\d+\.\d ± \d+\.\d)", section)
    assert len(means) > 200 and not [mean for mean in means if f" {mean} " not in tables]
    known = re.findall(r"\| ([+-]\d+\.\d) \| ([+-]\d+\.\d) to ([+-]\d+\.\d) \|", tables)
    known = {tuple(map(float, effect)) for effect in known}
    known |= {(-mean, -high, -low) for mean, low, high in known}
    told = re.findall(
        r"([+-]?\d+\.\d)(?: points)? \((-?\d+\.\d) to (-?\d+\.\d)\)", section.replace("\n", " ")
    )
    assert len(told) > 100 and not [
        effect for effect in told if tuple(map(float, effect)) not in known
    ]
