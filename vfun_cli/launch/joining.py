"""A command that a launcher has started once for each process of a machine, as torchrun does: one of them is the
machine's command and starts all its ranks, the others wait until that one has ended.

They find each other by a socket that has a name and no file. Nobody accepts what connects there: the kernel closes it
when the first process ends, however it ends.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256

from vfun_cli import console
from vfun_cli.config import cluster
from vfun_cli.errors import ConfigError
from vfun_cli.run.messages import PREEMPTION_SIGNALS

FOUND_WITHIN = 60.0
"""Seconds after which the first process has ended already, or lies where it cannot be seen."""

_OF_A_JOB = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
)
"""Variables that all processes of a job have alike, and no two jobs of one user on a machine."""


@contextmanager
def first_of_machine(environ: Mapping[str, str] = os.environ) -> Iterator[bool]:
    """Be the command of this machine until the end of the block, or wait for the end of the process that is.

    Yields whether this process is the command; any is that was not started as one of several.

    Raises:
        ConfigError: the environment is none of a job, or another process is the first one already.
    """
    job = cluster.read(environ)
    if job.local_rank is None:
        yield True
        return
    name = _name(job, environ)
    if job.local_rank != 0:
        _wait_for(name)
        yield False
        return
    with socket.socket(socket.AF_UNIX) as known:
        try:
            known.bind(name)
        except OSError:
            raise ConfigError(
                "another vfun command is the first process of this job on this machine.",
                hint="Wait until it has ended or stop it; two jobs at once need a MASTER_PORT each.",
            ) from None
        known.listen(job.local_ranks)
        yield True


def _name(job: cluster.Job, environ: Mapping[str, str]) -> str:
    machine = job.stated["machine_rank"][0].value
    known = [os.getuid(), machine, *map(environ.get, _OF_A_JOB)]
    return f"\0vfun-{sha256(json.dumps(known).encode()).hexdigest()}"


def _wait_for(name: str) -> None:
    """Until the process that has this name has ended. What asks to stop is for that one, which saves first."""
    for number in (signal.SIGINT, *PREEMPTION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    until = time.monotonic() + FOUND_WITHIN
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as waiting:
            try:
                waiting.connect(name)
            except ConnectionRefusedError:
                time.sleep(0.1)
                continue
            with suppress(ConnectionResetError):
                waiting.recv(1)
            return
    console.warn(
        "the first process of this machine was not found: it has ended, or a container of its own hides it. It does "
        "the work of all; this one ends."
    )
