"""What pip and uv are told (pyproject.toml), and what the results were made with."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def test_the_pinned_versions_are_of_the_packages_asked_for_and_within_their_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    asked = {requirement.name: requirement.specifier for requirement in asked}
    assert set(asked) == set(pins)
    assert not [name for name, bounds in asked.items() if pins[name] not in bounds]
