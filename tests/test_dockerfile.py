"""The image's recipe: what it copies is there and is all that the package is made of, and what it runs can be run."""

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "WORKDIR"}


def instructions() -> Iterator[tuple[str, str]]:
    """Each with what follows it, lines joined."""
    lines = re.sub(r"^#.*\n", "", RECIPE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    for line in filter(str.strip, lines):
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


def copied() -> list[str]:
    """Paths of the checkout that the image gets."""
    return [source for name, rest in instructions() if name == "COPY" for source in shlex.split(rest)[:-1]]


def test_every_instruction_is_one_of_docker_and_the_first_names_the_base() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN
    assert names[:2] == ["ARG", "FROM"] and names[-1] == "CMD"


def test_what_is_copied_is_there_and_not_left_out_of_the_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert len(copied()) >= 7
    for source in copied():
        assert (ROOT / source).exists(), source
    assert set(copied()) == allowed and "*" in ignored


def test_the_image_has_all_that_the_package_is_made_of() -> None:
    """Otherwise pip would fail, or the installed command lack a file, as nobody notices here."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = PROJECT["project"]
    needed = [
        *wheel["packages"],
        *wheel["force-include"],
        project["readme"],
        *project["license-files"],
        "pyproject.toml",
    ]
    assert set(needed) == set(copied())


@pytest.mark.parametrize(("extras", "target"), [("", "/opt/vfun"), ("wandb,adamw8bit", "/opt/vfun[wandb,adamw8bit]")])
def test_pip_is_asked_for_this_package_with_the_torch_that_is_tested(extras: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    arguments = dict(rest.partition("=")[::2] for name, rest in instructions() if name == "ARG")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TORCH": arguments["TORCH"],
        "EXTRAS": extras,
    }
    (line,) = [rest for name, rest in instructions() if name == "RUN" and rest.startswith("pip")]
    said = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["install", "--no-cache-dir", f"torch=={arguments['TORCH']}", target]
    assert set(filter(None, extras.split(","))) <= PROJECT["project"]["optional-dependencies"].keys()
    versions = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert re.search(rf"\| torch \| \S+ \| {re.escape(arguments['TORCH'])} \|", versions)
    assert f"Python :: {arguments['PYTHON']}" in " ".join(PROJECT["project"]["classifiers"])


def test_the_image_starts_what_it_is_told_and_by_itself_shows_the_help() -> None:
    found = dict(instructions())
    assert (found["ENTRYPOINT"], found["CMD"]) == ("[]", '["vfun", "--help"]')


def test_nvidia_smi_is_there_where_the_container_has_gpus() -> None:
    """vfun counts GPUs by it."""
    (variables,) = [rest for name, rest in instructions() if name == "ENV"]
    capabilities = dict(word.split("=", 1) for word in shlex.split(variables))["NVIDIA_DRIVER_CAPABILITIES"]
    assert {"compute", "utility"} <= set(capabilities.split(","))
