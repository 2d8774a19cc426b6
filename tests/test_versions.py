"""The ranges of versions that the project admits, and what is tested of them."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def lower_ends() -> list[str]:
    """``name==version`` of the lower end of every dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(each) for each in project["dependencies"]]
    return [f"{each.name}=={one.version}" for each in requirements for one in each.specifier if one.operator == ">="]


def test_the_oldest_versions_that_are_tested_are_the_lower_ends() -> None:
    lines = (ROOT / "tests/oldest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == lower_ends()


def test_the_documented_lower_ends_are_the_real_ones() -> None:
    table = (ROOT / "docs/versions.md").read_text().partition("|---|")[2].partition("| Python ")[0].splitlines()[1:]
    documented = [[cell.strip() for cell in row.split("|")[1:3]] for row in table]
    assert [f"{name}=={version}" for name, version in documented] == lower_ends()
