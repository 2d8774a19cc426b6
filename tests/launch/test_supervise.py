"""One launch from outside: what ended it is named, whoever started the ranks and whatever they could still say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.disks import file_system
from tests.started import Place, rank
from vfun_cli.errors import EXIT_PREEMPTED, FitError, RunError, VfunError
from vfun_cli.launch import supervise
from vfun_cli.launch.machines import Machine
from vfun_cli.run.messages import ERROR_SPACE, RankError, StopRequest, preemption_signals
from vfun_cli.run.rundir import RunDir

ALONE = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {rank!r}], check=True)
"""
"""In place of accelerate's launcher of a single process: it only says with which status the rank ended."""

TORCHRUN = """
============================================================
vfun_cli.training FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 0 (local_rank: 0)
  exitcode  : {first} (pid: 11)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : {cause} (pid: 12)
  error_file: <N/A>
============================================================
"""


def launch(script: str, run: RunDir, stop: supervise.StopRequests) -> None:
    argv = [sys.executable, "-c", script]
    supervise.launch(argv, Machine(run), 0, stop, stdin=subprocess.DEVNULL, way_on=lambda: "Go on.")


def failure(run: RunDir, script: str) -> VfunError:
    """What a launch of this script ends with."""
    with supervise.stop_requests(run) as stop, pytest.raises(VfunError) as caught:
        launch(script, run, stop)
    return caught.value


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"rank 0 was ended by SIGKILL. The host probably ran out of memory\."),
        ("import os; os.kill(os.getpid(), 11)", r"rank 0 was ended by SIGSEGV\.$"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module'\.$"),
    ],
)
def test_a_single_rank_is_reported_by_its_own_end(rank: str, said: str, tmp_path: Path) -> None:
    error = failure(RunDir(tmp_path), ALONE.format(rank=rank))
    assert isinstance(error, supervise.Crashed)
    with pytest.raises(VfunError, match=said):
        raise error


def test_a_killed_rank_is_known_before_the_launcher_has_ended_its_peers(tmp_path: Path) -> None:
    early = "E1129 00:44:13 torch/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 3818) of binary: python"
    machine = Machine(RunDir(tmp_path), 1, machines=2, processes=4)
    argv = [sys.executable, "-c", f"raise SystemExit({early!r})"]
    with (
        supervise.stop_requests(machine.run) as stop,
        pytest.raises(supervise.Crashed, match="rank 3 on machine 1 was ended by SIGKILL"),
    ):
        supervise.launch(argv, machine, 0, stop, stdin=subprocess.DEVNULL, way_on=str)


@pytest.mark.parametrize(
    "rank",
    [
        "raise RuntimeError('CUDA error: out of memory')",
        "import sys; print('Failed to CUDA calloc async 608 bytes', file=sys.stderr); sys.exit(1)",
    ],
)
def test_a_rank_that_left_no_message_and_had_no_memory_is_not_started_over(rank: str, tmp_path: Path) -> None:
    error = failure(RunDir(tmp_path), ALONE.format(rank=rank))
    assert isinstance(error, FitError) and "--low-vram" in str(error.hint)


def test_a_message_of_a_rank_without_memory_starts_nothing_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    script = (
        "import time; from pathlib import Path; from vfun_cli.run.messages import RankError;"
        "from vfun_cli.run.rundir import RunDir;"
        "RankError(rank=0, time=time.time(), message='out of memory', hint='Less.', exit_code=4, crash=False,"
        f"traceback='').write(RunDir(Path({str(tmp_path)!r}))); raise SystemExit(1)"
    )
    error = failure(run, script)
    assert type(error) is FitError and error.hint == "Less."


ABORTS = "import os, sys; print({said!r}, file=sys.stderr, flush=True); os.abort()"
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"
CUDA = (
    "terminate called after throwing an instance of 'c10::OutOfMemoryError'\n"
    "  what():  CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
)


@pytest.mark.parametrize(
    ("rank", "said", "hint"),
    [
        (ABORTS.format(said=BAD_ALLOC), "rank 0 was ended by SIGABRT: out of the host's memory: ", "--no-async"),
        (ABORTS.format(said=CUDA), "rank 0 was ended by SIGABRT: out of memory: what():  CUDA", "--low-vram"),
        ("import os; os.kill(os.getpid(), 7)", "rank 0 was ended by SIGBUS: out of shared memory: ", "--shm-size"),
    ],
)
def test_a_rank_that_a_signal_ended_for_want_of_memory_is_not_started_over(
    rank: str, said: str, hint: str, tmp_path: Path
) -> None:
    error = failure(RunDir(tmp_path), ALONE.format(rank=rank))
    assert type(error) is FitError and error.message.startswith(said) and hint in str(error.hint)


def test_an_abort_for_another_reason_is_a_crash(tmp_path: Path) -> None:
    error = failure(RunDir(tmp_path), ALONE.format(rank=ABORTS.format(said="terminate called: a timeout")))
    assert isinstance(error, supervise.Crashed) and error.message == "rank 0 was ended by SIGABRT."


@pytest.mark.parametrize(
    ("cause", "said"),
    [(-6, "rank 1 was ended by SIGABRT: out of memory: "), (1, "out of memory: ")],
)
def test_what_another_rank_wrote_in_this_launch_tells_too(cause: int, said: str, tmp_path: Path) -> None:
    machine = Machine(RunDir(tmp_path))
    log = machine.run.rank_log(1)
    log.parent.mkdir()
    log.write_text(f"{BAD_ALLOC} in the launch before\n")
    machine.ranks_elsewhere = {2}
    machine.run.rank_log(2).write_text(f"{BAD_ALLOC} on another machine\n")
    script = (
        f"open({str(log)!r}, 'a').write({CUDA!r}); "
        f"print({TORCHRUN.format(first=1, cause=cause)!r}); raise SystemExit(1)"
    )
    argv = [sys.executable, "-c", script]
    with supervise.stop_requests(machine.run) as stop, pytest.raises(FitError) as caught:
        supervise.launch(argv, machine, 0, stop, stdin=subprocess.DEVNULL, way_on=str)
    assert caught.value.message.startswith(said + "what():  CUDA out of memory.")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_had_no_memory_where_the_kernel_says_so(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter([3, 3 + killed])
    monkeypatch.setattr(supervise, "oom_kills", lambda: next(counted))
    error = failure(RunDir(tmp_path), ALONE.format(rank="import os; os.kill(os.getpid(), 9)"))
    assert type(error) is (FitError if killed else supervise.Crashed)
    assert error.message.startswith("rank 0 was ended by SIGKILL")


def test_a_killed_launcher_is_not_an_exit_code(tmp_path: Path) -> None:
    error = failure(RunDir(tmp_path), "import os; print('step 1'); os.kill(os.getpid(), 9)")
    assert error.message == "the launcher was ended by SIGKILL. The host probably ran out of memory."


@pytest.mark.parametrize(
    ("first", "cause", "ago", "said"),
    [
        (1, -9, 1, "rank 1 was ended by SIGKILL"),
        (-9, 1, 1, "rank 0 was ended by SIGKILL"),
        (-9, 1, 31, "rank 1: the cause"),  # the launcher kills ranks that hang half a minute after another's failure
        (1, 1, 1, "rank 1: the cause"),
    ],
)
def test_a_killed_rank_is_the_cause_whatever_its_peers_say(
    first: int, cause: int, ago: int, said: str, tmp_path: Path
) -> None:
    script = (
        "import time; from pathlib import Path; from vfun_cli.run.messages import RankError;"
        "from vfun_cli.run.rundir import RunDir;"
        f"RankError(rank=1, time=time.time() - {ago}, message='the cause', hint=None, exit_code=1, crash=False,"
        f"traceback='').write(RunDir(Path({str(tmp_path)!r})));"
        f"print({TORCHRUN.format(first=first, cause=cause)!r}); raise SystemExit(1)"
    )
    assert said in failure(RunDir(tmp_path), script).message


def test_an_error_finds_the_room_that_was_kept_for_it_on_a_full_disk(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=1m") as disk:
        run = RunDir(disk / "run")
        RankError.reserve(run, 3)
        with pytest.raises(OSError), (disk / "rest").open("wb", buffering=0) as rest:
            while True:
                rest.write(b"x" * 4096)
        error = RankError(
            rank=3, time=1.0, message="no space left", hint=None, exit_code=1, crash=True,
            traceback="\N{CLAPPER BOARD}" * ERROR_SPACE + "the end",
        )  # fmt: skip
        error.write(run)
        (read,) = RankError.read_all(run)
        assert (read.message, read.rank) == ("no space left", 3) and read.traceback.endswith("the end")


def test_what_a_launcher_of_ranks_passes_on_is_no_second_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler tells every process, and torchrun tells its own again; Ctrl-C twice is still meant."""
    monkeypatch.setattr(supervise, "kill", lambda job: None)
    for name, value in rank(Place(machines=1, machine=0, each=2)).items():
        monkeypatch.setenv(name, value)
    with supervise.stop_requests(RunDir(tmp_path)) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert not stop.at_once and stop.reason == "preempted"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.at_once


def test_a_hang_up_asks_once_however_often_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr(supervise, "kill", killed.append)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with supervise.stop_requests(RunDir(tmp_path)) as stop:
            for number in (signal.SIGHUP, signal.SIGHUP):
                os.kill(os.getpid(), number)
            assert StopRequest.read(RunDir(tmp_path)) == StopRequest(reason="preempted") and not stop.at_once
            assert killed == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.at_once and killed == [stop.job]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
        assert signal.SIGHUP not in preemption_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_is_a_preemption(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""
import sys, time
from pathlib import Path
from vfun_cli import console
from vfun_cli.launch.preemption import NothingToSave, nothing_to_save
try:
    with nothing_to_save():
        Path({str(ready)!r}).touch()
        time.sleep(60)
except NothingToSave as error:
    console.report(error)  # to a terminal that is gone
    sys.exit(error.exit_code)
"""
    child, terminal = os.forkpty()
    if child == 0:
        os.execv("/usr/bin/env", ["env", "--default-signal=HUP", sys.executable, "-c", script])
    for _ in range(1000):
        if ready.exists():
            break
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_PREEMPTED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ranks_that_start_and_hear_nothing_are_ended_by_the_first_request(
    number: int, code: int, tmp_path: Path
) -> None:
    waits = f"import os, time; os.kill(os.getppid(), {number:d}); time.sleep(60)"
    began = time.monotonic()
    error = failure(RunDir(tmp_path), waits)
    assert error.exit_code == code and "before the work had begun: there was nothing to save" in error.message
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_crash_after_a_wish_to_stop_starts_nothing_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    asked_while_training = (
        f"import os, time; from pathlib import Path; Path({str(run.listening())!r}).touch();"
        f"os.kill(os.getppid(), {signal.SIGINT:d}); time.sleep(0.3); raise SystemExit(1)"
    )
    with supervise.stop_requests(run) as stop, pytest.raises(RunError) as caught:
        launch(asked_while_training, run, stop)
    assert not isinstance(caught.value, supervise.Crashed)
