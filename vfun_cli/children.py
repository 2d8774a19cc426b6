"""The Python processes that vfun starts: one function makes the command of each, and with it its environment.

A run is what vfun resolved, so nothing that an earlier launch, a scheduler or a shell left in the environment may
decide how its processes train, and nothing that lies in the working directory may be imported by them. The command
itself says all of it, through env(1): started by hand from any folder, it starts the same processes.
"""

import json
import os
import select
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

SHARE_CORES = "_VFUN_SHARE_CORES"
"""Set for ranks whose number of threads nobody stated; in ``THREADS`` they then find accelerate's, which is 1."""

NOT_INHERITED = {
    "accelerate": ("ACCELERATE_*", "FSDP_*", "PARALLELISM_CONFIG_*", "MEGATRON_LM_*", "FORK_LAUNCHED"),
    "torchrun": ("PET_*", "TORCHELASTIC_*", "TORCH_ELASTIC_*", "PYTHON_EXEC"),
    "DeepSpeed": ("DS_ACCELERATOR",),
    "the ranks of another job": ("RANK", "WORLD_SIZE", "LOCAL_*", "GROUP_*", "ROLE_*", "NODE_RANK", "CROSS_*"),
    "where another job meets": ("MASTER_ADDR", "MASTER_PORT"),
    "mpirun": ("PMI_*", "PMIX_*", "PALS_*", "OMPI_COMM_WORLD_*", "MV2_COMM_WORLD_*", "MPI_LOCAL*"),
    "srun": ("SLURM_STEP_*", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS*", "SLURM_NPROCS"),
    "torch, which then unpickles anything": ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",),
    "the launcher of another run": (SHARE_CORES,),
}
"""Variables, by who would let them overrule the files of a launch. What tunes how the same work is done (``NCCL_*``,
``GLOO_*``, ``CUDA_*``, ``TORCH_*``, ``PYTORCH_*``) is the user's.
"""

THREADS = "OMP_NUM_THREADS"
"""Inherited if it is one number: accelerate fails at anything else."""

SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH")
"""Lists of folders. An empty or relative entry, such as ``$UNSET:/opt/lib`` leaves, means the working directory."""

_ROOT = Path(__file__).parents[1]


def command(
    module: str,
    *arguments: str,
    directory: Path | None = None,
    variables: Mapping[str, str] = {},
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """What starts a module as a Python process of its own.

    Args:
        directory: where it starts; otherwise where its parent is.
        variables: what it finds in its environment beside what it inherits.
    """
    unset = {name for name, value in environ.items() if not _is_inherited(name, value)}
    paths = {name: absolute_entries(environ[name]) for name in SEARCH_PATHS if name in environ}
    paths = {name: entries for name, entries in paths.items() if not entries or entries != environ[name]}
    paths["PYTHONPATH"] = _modules(environ.get("PYTHONPATH", ""))
    unset |= {name for name, entries in paths.items() if not entries}
    # -P is for one process; its own children (ranks, the fork server, compilers) take PYTHONSAFEPATH.
    found = {"PYTHONSAFEPATH": "1", **{name: entries for name, entries in paths.items() if entries}, **variables}
    return [
        "/usr/bin/env",
        *(["-C", str(directory)] if directory is not None else []),
        *(word for name in sorted(unset) for word in ("-u", name)),
        *(f"{name}={value}" for name, value in found.items()),
        sys.executable,
        "-P",
        "-m",
        module,
        *arguments,
    ]


def answering(module: str) -> "subprocess.Popen[bytes]":
    """A module started as a process that answers each line with one, on one thread. Ctrl-C is for its parent, which
    ends it."""
    return subprocess.Popen(
        command(module, variables={THREADS: "1"}),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
    )  # fmt: skip


def ask(process: "subprocess.Popen[bytes]", question: Any) -> None:
    """Write a line of JSON to an answering process.

    Raises:
        BrokenPipeError: it has ended.
    """
    assert process.stdin is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()


def answer(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """The next line that an answering process writes, without its end.

    Raises:
        TimeoutError: none came in this time.
        EOFError: it has ended.
    """
    assert process.stdout is not None
    deadline, received = time.monotonic() + seconds, b""
    while not received.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        if not (piece := os.read(process.stdout.fileno(), 1)):  # one: the next line may be there already
            raise EOFError
        received += piece
    return received[:-1]


def absolute_entries(search_path: str) -> str:
    """A list of folders without those that depend on the working directory."""
    return os.pathsep.join(entry for entry in search_path.split(os.pathsep) if entry.startswith(os.sep))


def _is_inherited(name: str, value: str) -> bool:
    if name == THREADS:
        return value.isascii() and value.isdigit() and int(value) > 0
    return not any(fnmatchcase(name, pattern) for patterns in NOT_INHERITED.values() for pattern in patterns)


def _modules(inherited: str) -> str:
    """Where a child looks for modules before the installed ones: it has to find the vfun that starts it."""
    installed = str(_ROOT) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    entries = [] if installed else [str(_ROOT)]
    entries += [entry for entry in absolute_entries(inherited).split(os.pathsep) if entry and entry not in entries]
    return os.pathsep.join(entries)
