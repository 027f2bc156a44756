"""docs/tour.ipynb, as a person would run it, but with few steps and without a server."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

CELLS = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
RUN = """
import json, sys
names = {}
for cell, source in json.load(sys.stdin).items():
    exec(compile(source, cell, "exec"), names)
    print("ended:", cell)
"""


def files() -> set[Path]:
    found = {path for place in ("*", "docs/*", "runs/*") for path in ROOT.glob(place)}
    return {path for path in found if not path.name.startswith((".", "__"))}


def test_the_tour_runs_from_top_to_bottom_and_leaves_the_project_as_it_is(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"TOUR_STEPS": "2", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    how = {"cwd": ROOT / "docs", "env": env, "capture_output": True, "text": True, "timeout": 300}
    before = files()
    ran = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(CODE), **how)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line for line in ran.stdout.splitlines() if line.startswith("ended: ")] == [
        f"ended: {cell}" for cell in CODE
    ]
    pictures = {path.name for path in tmp_path.glob("tour_*/**/*.png")}
    assert pictures == {"curves.png", "gradient.png"} and files() == before


def test_the_tour_stores_code_alone_and_enumerates_with_the_functions_that_train():
    assert len({cell["id"] for cell in CELLS}) == len(CELLS) and CELLS[0]["cell_type"] == "code"
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for source in CODE.values():
        ast.parse(source)  # magics are no Python
    enumeration = CODE["every-batch"]
    assert "assert difference < 1e-12" in enumeration
    for function in ("score.turn_advantages(", "score.turn_kl_coefs(", "policy_loss("):
        assert function in enumeration


def test_outside_the_project_the_first_cell_fetches_it_and_installs(tmp_path, monkeypatch):
    commands, first = [], CODE[CELLS[0]["id"]]

    def pretend(command, check):
        commands.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()
            shutil.copy(ROOT / "pyproject.toml", command[-1])

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY"):
        exec(first, {})
    assert not commands
    address = "https://example.org/a-fork"
    exec(first.replace("https://github.com/YOU/REPO", address), {})
    git, pip = commands
    assert address in git and pip[1:4] == ["-m", "pip", "install"]
    assert any(need.startswith("math-verify") for need in pip)
    assert Path.cwd() == tmp_path / "self-correction" == Path(sys.path[0])
    monkeypatch.chdir(tmp_path)  # a kernel that starts anew
    exec(first.replace("https://github.com/YOU/REPO", address), {})
    assert [command[0] for command in commands[2:]] == [sys.executable]
