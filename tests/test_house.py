"""The house: who may import whom, and how much may stand in one place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # nothing imports upwards; a folder is one storey
    {"loss", "answers", "sandbox", "sampling", "report"},
    {"fast"},
    {"sampler", "verifiers"},
    {"tasks"},
    {"training"},
    {"evaluate", "talk"},
    {"score", "rrr", "baselines"},
    {"tiny"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ALGORITHMS = ("score.py", "rrr.py", "baselines.py")
BENCH = sorted(p for name in ("", "papers/", "gpu_parts/") for p in ROOT.glob(f"bench/{name}*.py"))
HOUSE = sorted(p for name in FLOOR for p in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def functions(path: Path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def test_nothing_imports_upwards():
    assert len(HOUSE) > 50 and {path.stem for path in ROOT.glob("*.py")} <= FLOOR.keys()
    for path in HOUSE:
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in (module.split(".")[0] for module in imports(path)):
            below = FLOOR.get(name, -1) < FLOOR[here]
            assert below or name == here != path.stem, f"{path.name} imports {name}"


def test_the_loop_is_handed_evaluation_and_pictures():
    known = imports(ROOT / "training" / "loop.py")
    assert not [
        name for name in known if name.split(".")[0] in ("evaluate", "report", "matplotlib")
    ]


@pytest.mark.parametrize("path", [*HOUSE, *BENCH], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long_to_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 350
    assert not [f.name for f in functions(path) if f.end_lineno - f.lineno >= 60]


def test_functions_of_an_algorithm_carry_no_more_than_five_things():
    carried = {
        f"{name}: {f.name}": len(f.args.args) + len(f.args.kwonlyargs)
        for name in ALGORITHMS
        for f in functions(ROOT / name)
    }
    assert len(carried) > 30 and not [name for name, count in carried.items() if count > 5]


def test_lines_have_at_most_100_characters():
    paths = [*ROOT.glob("tests/*.py"), *ROOT.glob("recipes/*.sh"), *ROOT.glob("bench/*.sh")]
    for path in (*HOUSE, *BENCH, *paths, *ROOT.glob("fast/*.c"), ROOT / ".ci" / "run"):
        assert not [line for line in path.read_text().splitlines() if len(line) > 100], path
