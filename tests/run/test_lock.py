"""A run directory belongs to one command and its training processes, for as long as they live."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfun_cli.errors import ConfigError
from vfun_cli.run import lock
from vfun_cli.run.rundir import RunDir

RANK = """
import sys, time
from pathlib import Path
from vfun_cli.run import lock
from vfun_cli.run.rundir import RunDir
lock.take_part(RunDir(Path(sys.argv[1])), 0)
print("at work", flush=True)
time.sleep(60)
"""


def rank(folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", RANK, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"at work\n"
    return process


def test_a_second_command_is_refused_and_told_which_process_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with lock.held(run, 0):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}") as caught, lock.held(run, 0):
            pass
        with lock.held(run, 1):
            """Another machine of the same job."""
    assert "--output-dir" in (caught.value.hint or "")
    with lock.held(run, 0):
        """Free again."""


def test_training_processes_without_their_command_keep_others_out_until_they_are_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with lock.held(run, 0):
        process = rank(tmp_path)  # as many as there are: the lock is shared among them
        second = rank(tmp_path)
    second.kill()
    second.communicate()
    with pytest.raises(ConfigError, match="training processes whose vfun command has been killed"), lock.held(run, 0):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock.held(run, 0):
        """Free again."""
