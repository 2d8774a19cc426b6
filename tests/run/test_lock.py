"""A run directory belongs to one command and its training processes, for as long as they live, on every disk."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.disks import without
from vfun_cli.disks import claims
from vfun_cli.errors import ConfigError
from vfun_cli.run import lock
from vfun_cli.run.rundir import RunDir

LACKING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
"""How disks answer that they know no locks."""
LOCKS = pytest.mark.parametrize("code", [None, errno.ENOLCK], ids=["locks", "no locks"])

WITHOUT_LOCKS = """
import fcntl, os, sys, time
from pathlib import Path
code = int(sys.argv[2])
def refuse(*arguments):
    raise OSError(code, os.strerror(code))
if code:
    fcntl.flock = refuse
"""
COMMAND = f"""
{WITHOUT_LOCKS}
from vfun_cli.disks import claims
from vfun_cli.launch import supervise
from vfun_cli.launch.machines import Machine
from vfun_cli.run import lock
from vfun_cli.run.rundir import RunDir
run = RunDir(Path(sys.argv[1]))
claims.BEAT = 0.02
with lock.held(run, 0) as claim, supervise.stop_requests(run) as stop:
    launcher = [sys.executable, "-c", sys.argv[3], *sys.argv[1:3]]
    supervise.launch(launcher, Machine(run), 0, stop, stdin=claim, way_on=str)
"""
LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
assert sys.stdin.read() == ""
Path(sys.argv[1], "started").write_text(f"{os.getpid()} {started.pid};")
time.sleep(60)
"""
RANK = f"""
{WITHOUT_LOCKS}
from vfun_cli.disks import claims
from vfun_cli.run import lock
from vfun_cli.run.rundir import RunDir
claims.BEAT = 0.02
lock.take_part(RunDir(Path(sys.argv[1])), 0)
Path(sys.argv[1], "started").write_text(f"{{os.getpid()}};")
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name, seconds in {"BEAT": 0.02, "LOOK": 0.02, "SILENCE": 20.0}.items():
        monkeypatch.setattr(claims, name, seconds)
    return RunDir(tmp_path)


def take(run: RunDir) -> None:
    with lock.held(run, 0):
        """Free."""


@pytest.mark.parametrize("code", [None, *LACKING])
def test_a_second_command_is_refused_and_told_which_process_is_there(
    code: int | None, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code:
        without(monkeypatch, "locks", code=code)
    with pytest.raises(RuntimeError), lock.held(run, 0):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}") as caught:
            take(run)
        with lock.held(run, 1):
            """Another machine of the same job."""
        raise RuntimeError
    assert "--output-dir" in (caught.value.hint or "")
    take(run)


def test_a_lock_that_fails_is_no_missing_lock(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "locks", code=errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        take(run)


@pytest.fixture
def left_alone(run: RunDir) -> Iterator[list[int]]:
    """Ends what a test leaves behind."""
    processes: list[int] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def killed_command(run: RunDir, code: int, launcher: str, left_alone: list[int]) -> None:
    """A command that was killed when its launcher had just begun; appends the processes that it left."""
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(run.root), str(code), launcher])
    left_alone.append(command.pid)
    started = run.root / "started"
    while not (started.exists() and started.read_text().endswith(";")):
        assert command.poll() is None
        time.sleep(0.01)
    left_alone += map(int, started.read_text().rstrip(";").split())
    command.kill()
    command.wait()


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    with suppress(ProcessLookupError, FileNotFoundError):
        while "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.01)


@LOCKS
def test_what_a_killed_command_has_started_keeps_others_out_from_its_first_instant(
    code: int | None, run: RunDir, monkeypatch: pytest.MonkeyPatch, left_alone: list[int]
) -> None:
    if code:
        without(monkeypatch, "locks", code=code)
    killed_command(run, code or 0, LAUNCHER, left_alone)
    _, launcher, rank = left_alone
    for survivor in (launcher, rank):
        with pytest.raises(ConfigError, match="training processes whose vfun command has been killed"):
            take(run)
        end(survivor)
    take(run)


def test_a_command_on_another_machine_is_known_by_its_heartbeat(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "locks", code=errno.ENOLCK)
    here = socket.gethostname()
    with lock.held(run, 0):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on {here}"):
            take(run)
        monkeypatch.setattr(claims, "_renew", lambda lease: None)
        monkeypatch.setattr(claims, "SILENCE", 0.2)
        before = time.monotonic()
        take(run)
        assert time.monotonic() - before > claims.SILENCE
    assert f"process {os.getpid()} on {here}" in capfd.readouterr().err
    take(run)


@pytest.mark.slow
def test_training_processes_go_on_with_the_heartbeat_of_their_killed_command(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, left_alone: list[int]
) -> None:
    without(monkeypatch, "locks", code=errno.ENOLCK)
    killed_command(run, errno.ENOLCK, RANK, left_alone)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(ConfigError, match="is in use by"):
        take(run)
    end(left_alone[1])
    monkeypatch.setattr(claims, "SILENCE", 0.2)
    take(run)


@pytest.mark.parametrize("left", ["nothing", "a dead process", "half a description"])
def test_of_many_that_take_a_lease_at_once_one_gets_it(left: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "locks", code=errno.ENOLCK)
    monkeypatch.setattr(claims, "SILENCE", 0.2)
    if left != "nothing":
        with lock.held(run, 0):
            (lease,) = run.root.glob(".lock-0.*")
            text = lease.read_text().strip()
        dead = text.replace(f'"process": {os.getpid()}', '"process": 4194305')
        lease.write_text(dead if left == "a dead process" else text[: len(text) // 2])
        assert json.loads(text.partition("\n")[2])["process"] == os.getpid()
    tried, ended, winners = threading.Barrier(8, timeout=20), threading.Barrier(8, timeout=20), []

    def try_once() -> None:
        tried.wait()
        with suppress(ConfigError), lock.held(run, 0):
            winners.append(threading.get_ident())
            ended.wait()
            return
        ended.wait()

    threads = [threading.Thread(target=try_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert len([*run.root.glob(".lock-0.*")]) == 1


@LOCKS
def test_a_claim_whose_file_goes_in_its_block_leaves_nothing(
    code: int | None, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code:
        without(monkeypatch, "locks", code=code)
    path = run.root / ".export.lock"
    for _ in range(2):
        with claims.claimed(path):
            with pytest.raises(claims.Taken), claims.claimed(path):
                pass
            path.unlink()
        assert [*run.root.iterdir()] == []
