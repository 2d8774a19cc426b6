"""A preemption signal while no training process runs: exit 75, nothing to save, nothing in the way of the next try."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfun_cli.errors import EXIT_PREEMPTED
from vfun_cli.launch.preemption import NothingToSave, nothing_to_save
from vfun_cli.run.messages import PREEMPTION_SIGNALS


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_a_signal_ends_the_block_and_the_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(NothingToSave) as caught, nothing_to_save():
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except Exception:  # as code that reads broken files has it
            pytest.fail("swallowed")
    assert caught.value.exit_code == EXIT_PREEMPTED
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_a_signal_ends_the_block_from_where_python_drops_exceptions(number: int) -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(1)

    hook = sys.unraisablehook
    with pytest.raises(NothingToSave), nothing_to_save():
        dying = Dying()
        del dying
        time.sleep(1)
        pytest.fail("dropped")
    assert sys.unraisablehook is hook


@pytest.mark.slow
def test_a_signal_during_validation_leaves_no_run(tmp_path: Path) -> None:
    command = ("train", "wan-s2v", "--demo", "--strategy", "single", "--max-train-steps", "1")
    job = subprocess.Popen(
        [sys.executable, "-m", "vfun_cli", *command], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (tmp_path / "vfun-demo").exists():  # the first thing that a demo does
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == EXIT_PREEMPTED, said
    assert "nothing to save" in said and "Traceback" not in said
    assert not (tmp_path / "vfun-demo/output_dir/run.json").exists()
