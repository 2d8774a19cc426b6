"""Schedulers that take the files of ``--emit`` as they are and start what these say, on machines of this host."""

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SAYS_WORDS = f"#!{sys.executable}\nimport sys\nsys.stdout.write('\\0'.join(sys.argv[1:]))\n"


def container_of(text: str, kind: str, variables: Mapping[str, str] | None = None) -> list[str]:
    """What a pod of a PyTorchJob runs, with the container's variables where ``$(NAME)`` stands."""
    pod = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]
    (container,) = pod["containers"]
    return [_expanded(word, variables or {"RANK": "0"}) for word in [*container["command"], *container["args"]]]


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    """As Kubernetes does: ``$$`` is ``$``, and ``$(NAME)`` the variable if there is one."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, word)


def started_by(engine: str, text: str) -> list[str]:
    """The words of the command that a file starts on a machine, its placeholders left as they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        says = f'#!/bin/sh\nprintf "%s\\0" vfun "$@"\n'
        _program(path / "vfun", says)
        _program(path / "srun", '#!/bin/sh\nwhile [ "$1" != vfun ]; do shift; done\nexec "$@"\n')
        environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
        said = subprocess.run(
            _starts(engine, text), env=environment, capture_output=True, check=True, encoding="utf-8"
        )
    return said.stdout.split("\0")[:-1]


def _starts(engine: str, text: str) -> list[str]:
    match engine:
        case "slurm":
            return ["bash", "-c", text.replace("IMAGE='<IMAGE>'", "IMAGE=''", 1)]
        case "kubernetes":
            return container_of(text, "Master")
        case "skypilot":
            run: str = yaml.safe_load(text)["run"]
            return ["bash", "-c", run]
    raise AssertionError(engine)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
