"""Scripts of the tests that several processes run together."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: Path, folder: Path) -> None:
    """``script FOLDER`` under torchrun.

    Raises:
        AssertionError: a rank failed; the message ends with what the ranks said.
    """
    run_on_ranks(2, script, folder)


def run_on_ranks(count: int, script: Path, folder: Path) -> None:
    """The same on so many."""
    _wait_for(_torchrun(["--standalone", f"--nproc_per_node={count}"], script, folder))


def run_on_two_machines(script: Path, folder: Path) -> None:
    """The same on four, two of each of two launchers that know nothing of each other but the port to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    machines = [_torchrun([*meeting, f"--node_rank={number}"], script, folder) for number in range(2)]
    for machine in machines:
        _wait_for(machine)


def _torchrun(options: list[str], script: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait_for(launcher: "subprocess.Popen[str]") -> None:
    try:
        _, said = launcher.communicate(timeout=600)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said[-5000:]
