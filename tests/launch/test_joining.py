"""Commands that a launcher has started for each rank: the first of a machine works, the others wait for its end."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.jobs import TIMEOUT
from tests.machines import bare_environment, free_port
from tests.started import Place, exports, rank
from vfun_cli.errors import ConfigError
from vfun_cli.launch import joining
from vfun_cli.launch.joining import first_of_machine

JOINS = """
import sys
from vfun_cli.launch.joining import first_of_machine
print("began", flush=True)
with first_of_machine() as first:
    print("first" if first else "waited", flush=True)
    if first:
        sys.stdin.read()
"""


@pytest.fixture
def at() -> Place:
    """Of a job that no other test has."""
    return Place(machines=1, machine=0, each=2, port=free_port())


def other(at: Place) -> dict[str, str]:
    return rank(Place(machines=1, machine=0, each=2, port=at.port, local_rank=1))


@contextmanager
def joined(environ: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that has begun to join."""
    process = subprocess.Popen(
        [sys.executable, "-c", JOINS], env={**bare_environment(), **environ}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert said(process) == "began"
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["done", "killed"])
def test_the_others_wait_until_the_first_has_ended_and_heed_no_signal(ending: str, at: Place) -> None:
    with joined(other(at)) as waiting, joined(rank(at)) as first:
        assert said(first) == "first"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            waiting.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        if ending == "killed":
            first.kill()
        else:
            first.communicate()
        assert said(waiting) == "waited" and waiting.wait() == 0


def test_a_machine_has_one_first_process(at: Place) -> None:
    with first_of_machine(rank(at)) as first, pytest.raises(ConfigError, match="is the first process of this job"):
        assert first
        with first_of_machine(rank(at)):
            pass
    with first_of_machine(rank(at)) as first, first_of_machine(rank(Place(machines=1, machine=0, each=2))) as too:
        assert first and too, "of two jobs, one each"


def test_one_that_finds_no_first_process_says_so_and_ends(
    at: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "FOUND_WITHIN", 0.1)
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, *joining.PREEMPTION_SIGNALS)}
    try:
        with first_of_machine(other(at)) as first:
            assert not first
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    assert "was not found" in capsys.readouterr().err


@pytest.mark.parametrize("environ", [{}, exports(Place(machines=2, machine=1, each=2))])
def test_a_command_that_nobody_started_as_a_rank_is_the_machines(environ: dict[str, str]) -> None:
    with first_of_machine(environ) as first, first_of_machine(environ) as second:
        assert first and second


LAUNCHES = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from vfun_cli.training.launcher import BesideStore
rank, port = int(sys.argv[1]), int(sys.argv[2])
if rank == 0:  # in place of torchrun's own
    outer = TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=300), wait_for_workers=False)
met = []
for launch in ("first", "second"):
    place = BesideStore(RendezvousParameters("beside-store", f"127.0.0.1:{port}", "0", 2, 2, rank=str(rank)))
    store = place.next_rendezvous().store
    store.set(f"{launch} {rank}", "here")
    store.get(f"{launch} {1 - rank}")
    met.append(store)
    store.check(["first 0"]) == (launch == "first") or sys.exit("it met in the store of an earlier launch")
print("met", len(met), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_machines_meet_anew_with_each_launch_beside_the_store_of_torchrun(at: Place) -> None:
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCHES, str(number), str(at.port)], env=bare_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        assert [said(each) for each in machines] == ["met 2"] * 2
        assert [each.communicate(timeout=TIMEOUT) and each.returncode for each in machines] == [0, 0]
    finally:
        for each in machines:
            each.kill()
