"""The ranges of versions that the project admits, where they are stated, and what is tested of them."""

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
OLDEST, EACH_CHANGE, NEWEST = range(3)
"""Columns of ``documented``."""


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def requirements() -> list[Requirement]:
    return [Requirement(each) for each in project()["dependencies"]]


def lower_ends() -> list[str]:
    """``name==version`` of the lower end of every dependency."""
    return [f"{each.name}=={one.version}" for each in requirements() for one in each.specifier if one.operator == ">="]


def documented() -> dict[str, list[str]]:
    """The first table of docs/versions.md: three versions by the name of a package, Python last."""
    table = (ROOT / "docs/versions.md").read_text().partition("|---|")[2].partition("\n\n")[0].splitlines()[1:]
    return {name: versions for name, *versions in ([cell.strip() for cell in row.split("|")[1:5]] for row in table)}


def in_readme(name: str) -> tuple[str, str]:
    """The range of versions that the README prints."""
    found = re.search(rf"{name} (\S+) to (\d+\.\d+)", (ROOT / "README.md").read_text())
    assert found is not None, name
    return found[1], found[2]


def minor(version: str, more: int = 0) -> str:
    """``2.14`` of ``2.14.1``; of the minor version after it, with ``more`` = 1."""
    read = Version(version)
    return f"{read.major}.{read.minor + more}"


def test_the_oldest_versions_that_are_tested_are_the_lower_ends() -> None:
    lines = (ROOT / "tests/oldest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == lower_ends()


def test_the_documented_lower_ends_are_the_real_ones() -> None:
    found = [f"{name}=={versions[OLDEST]}" for name, versions in documented().items() if name != "Python"]
    assert found == lower_ends()


def test_what_was_run_is_admitted() -> None:
    table = documented()
    for each in requirements():
        for version in table[each.name]:
            assert version in each.specifier, each


def test_torch_is_admitted_up_to_the_newest_that_was_run_and_the_readme_says_so() -> None:
    (torch,) = (each.specifier for each in requirements() if each.name == "torch")
    oldest, _, newest = documented()["torch"]
    assert torch == SpecifierSet(f">={oldest},<{minor(newest, 1)}")
    assert in_readme("torch") == (minor(oldest), minor(newest))


def test_the_torch_of_each_change_is_the_one_that_ci_installs() -> None:
    assert re.findall(r"torch==(\S+)", (ROOT / ".ci/run").read_text()) == [documented()["torch"][EACH_CHANGE]]


def test_every_python_that_is_tested_is_stated_alike_everywhere() -> None:
    oldest, each_change, newest = documented()["Python"]
    prefix = "Programming Language :: Python :: "
    classifiers = [each.removeprefix(prefix) for each in project()["classifiers"] if each.startswith(prefix)]
    assert classifiers == [minor(oldest, more) for more in range(len(classifiers))]
    assert (classifiers[0], classifiers[-1]) == (oldest, newest) == in_readme("Python")
    assert each_change in classifiers
    assert project()["requires-python"] == f">={oldest}"  # without an upper end: docs/versions.md
    runs = (ROOT / "docs/versions.md").read_text().partition("fast tests")[2].partition("\n\n")[0]
    assert list(dict.fromkeys(re.findall(r"^\| (3\.\d+) \|", runs, re.MULTILINE))) == classifiers
