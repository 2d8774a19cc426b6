"""Several machines on this host: launchers that share nothing but a run directory.

Each has a folder of its own, with its own copy of the data, an environment in which nothing is left of any scheduler,
and an address: one of the loopback's, or one in a network of its own.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.jobs import TIMEOUT, Job, Said, finish, kill_all, start

ROOT = Path(__file__).parents[1]
KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
"""Variables of the tests' own environment that a machine has too."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the machines."""

    number: int
    folder: Path
    address: str
    by: Sequence[str] = field(default=())
    """The command that starts others there, where it is not this host's own network."""

    def start(self, *arguments: object, by: Sequence[object] = (), **variables: str) -> Job:
        """A vfun command there.

        Args:
            by: the command that starts it, such as torchrun's.
            variables: of its environment.
        """
        return start(
            *arguments, by=[*self.by, *map(str, by)], cwd=self.folder, environment={**bare_environment(), **variables}
        )


def hosts(number: int, place: Path, *, demo: Path | None = None) -> list[Host]:
    """That many machines in folders below a place.

    Args:
        demo: made by a vfun command; each machine gets a copy.
    """
    found = [
        Host(number=each, folder=(place / f"machine-{each}").absolute(), address=f"127.0.0.{2 + each}")
        for each in range(number)
    ]
    for host in found:
        host.folder.mkdir(parents=True)
        if demo is not None:
            shutil.copytree(demo, host.folder / demo.name)
    return found


def bare_environment() -> dict[str, str]:
    """What a machine's commands find; one thread each, so that any number of processes rounds alike."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def no_arguments(host: Host) -> Sequence[object]:
    """Nothing before the command."""
    return ()


def no_variables(host: Host) -> Mapping[str, str]:
    """Nothing in the environment."""
    return {}


def start_on(
    machines: Sequence[Host],
    arguments_of: Callable[[Host], Sequence[object]],
    variables_of: Callable[[Host], Mapping[str, str]] = no_variables,
    *,
    by_of: Callable[[Host], Sequence[object]] = no_arguments,
) -> list[Job]:
    """A vfun command on each machine, what it says and what it finds made for the machine."""
    return [host.start(*arguments_of(host), by=by_of(host), **variables_of(host)) for host in machines]


def finish_all(jobs: Sequence[Job], code: int | None = 0, *, within: float = TIMEOUT) -> list[Said]:
    """Waits for the end of all commands, which must have this exit code; where one has not, the others are killed."""
    try:
        return [finish(job, code, within=within) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                kill_all(job)


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def networked(machines: Sequence[Host]) -> Iterator[list[Host]]:
    """The same machines, each with a network of its own: 10.77.0.0/24, by which they reach each other and nobody else.

    Where a host lets nobody make networks, the test is skipped.
    """
    if missing := [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"networks of one's own need {' and '.join(missing)}")
    with ExitStack() as stack:
        hub = stack.enter_context(_held(["unshare", "--user", "--map-root-user", "--net"]))
        try:
            _do([*hub, "ip", "link", "add", "hub", "type", "bridge"])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this host lets nobody make a network: {error.stderr.strip()}")
        _do([*hub, "ip", "link", "set", "hub", "up"])
        found = []
        for host in machines:
            cable, address = f"cable{host.number}", f"10.77.0.{1 + host.number}"
            inside = stack.enter_context(_held([*hub, "unshare", "--net"]))
            pid = inside[-1].partition("=")[2]
            _do([*hub, "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth7", "netns", pid])
            _do([*hub, "ip", "link", "set", cable, "master", "hub", "up"])
            _do([*inside, "ip", "link", "set", "lo", "up"])
            _do([*inside, "ip", "address", "add", f"{address}/24", "dev", "eth7"])
            _do([*inside, "ip", "link", "set", "eth7", "up"])
            found.append(replace(host, address=address, by=inside))
        yield found


@contextmanager
def _held(enter: Sequence[str]) -> Iterator[list[str]]:
    """A network that is there until the end of the block; the command that starts others in it."""
    sleeper = subprocess.Popen(
        [*enter, "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert sleeper.stdout is not None and sleeper.stderr is not None
    try:
        if not sleeper.stdout.readline():
            pytest.skip(f"this host lets nobody make a network: {sleeper.stderr.read().strip()}")
        yield ["nsenter", "--user", "--net", "--preserve-credentials", f"--target={sleeper.pid}"]
    finally:
        sleeper.kill()
        sleeper.communicate()


def _do(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
