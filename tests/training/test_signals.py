"""Requests to stop, from inside one process and over the processes of a job."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfun_cli.launch import supervise
from vfun_cli.run.messages import StopRequest
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.signals import CONTINUE, INTERRUPTED, PREEMPTED, PREEMPTION_SIGNALS, StopFlag


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    numbers = (*PREEMPTION_SIGNALS, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_ends_the_process(number: int, tmp_path: Path) -> None:
    flag = StopFlag(RunDir(tmp_path), reads_file=False)
    flag.listen()
    assert flag.reason() == CONTINUE
    os.kill(os.getpid(), number)
    assert flag.reason() == PREEMPTED
    assert {signal.getsignal(each) for each in PREEMPTION_SIGNALS if each != signal.SIGHUP} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "the terminal and the shell both send one"


def test_the_end_of_the_launcher_does_not_count_as_a_second_signal(tmp_path: Path) -> None:
    flag = StopFlag(RunDir(tmp_path), reads_file=False)
    flag.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert flag.reason() == PREEMPTED


def test_the_request_file_and_the_clock_are_read_by_one_rank_of_a_machine(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    StopRequest(reason="interrupted").write(run)
    assert StopFlag(run, reads_file=True).reason() == INTERRUPTED
    assert StopFlag(run, reads_file=False).reason() == CONTINUE
    assert StopFlag(run, reads_file=True, machine_rank=1).reason() == CONTINUE, "the others hear of it from that rank"
    StopRequest(reason="preempted").write(run)
    assert StopFlag(run, reads_file=True).reason() == PREEMPTED
    run.stop_request().unlink()
    assert StopFlag(run, reads_file=True, deadline=time.time() - 1).reason() == PREEMPTED
    assert StopFlag(run, reads_file=True, deadline=time.time() + 60).reason() == CONTINUE


RANK = """
import sys, time
from pathlib import Path
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.signals import StopFlag
flag = StopFlag(RunDir(Path(sys.argv[1])), reads_file=False)
flag.listen()
Path(sys.argv[1] + ".ready").touch()
while not flag.reason():
    time.sleep(0.01)
Path(sys.argv[1] + ".saved").touch()
"""


def test_ranks_outlive_their_launcher_only_to_save(tmp_path: Path) -> None:
    mark = tmp_path / "rank"
    argv = f"[sys.executable, '-c', {RANK!r}, {str(mark)!r}]"
    start = f"import subprocess, sys; subprocess.Popen({argv}, start_new_session=True).wait()"
    launcher = subprocess.Popen([sys.executable, "-c", start])
    _wait_for(Path(f"{mark}.ready").exists)
    launcher.kill()
    launcher.wait()
    _wait_for(Path(f"{mark}.saved").exists)


def test_the_second_request_reaches_processes_in_sessions_of_their_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    with supervise.stop_requests(run) as stop:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        process = subprocess.Popen(sleep, start_new_session=True, env=os.environ | {"_VFUN_JOB": stop.job})
        _wait_for(lambda: supervise.members(stop.job) == [process.pid])  # it may still be on its way into exec
        os.kill(os.getpid(), signal.SIGTERM)
        assert StopRequest.read(run) == StopRequest(reason="preempted")
        assert process.poll() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert process.wait(10) == -signal.SIGKILL
    assert supervise.members(stop.job) == []


def _wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")
