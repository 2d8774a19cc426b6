"""A whole job that is told to stop, or killed: saved, exit 75, resumed to the bytes of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from vfun_cli.checkpoints.compare import compare_tensors
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.long

STEPS = 6
GRACE = 60
"""Seconds; a step of the demo takes about one."""


def vfun(*arguments: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "vfun_cli", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(run: RunDir, strategy: str, *more: str) -> "subprocess.Popen[str]":
    return vfun(
        "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", str(run.root),
        "--max-train-steps", str(STEPS), "--checkpointing-steps", str(STEPS), *more,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_step(run: RunDir, step: int, process: "subprocess.Popen[str]") -> None:
    while not run.metrics.exists() or run.metrics.read_text().count('"loss"') < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def processes(run: RunDir) -> tuple[list[int], list[int]]:
    """The launcher, and the ranks in order."""
    launchers, ranks = [], {}
    for folder in Path("/proc").iterdir():
        try:
            argv = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_bytes().decode().split("\0") if "=" in entry
            )
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if "vfun_cli.training" in argv and str(run.run_json.absolute()) in argv:
            if "accelerate.commands.launch" in argv:
                launchers.append(int(folder.name))
            else:
                ranks.setdefault(parent, {})[environment.get("RANK", "0")] = int(folder.name)
    return launchers, [pid for _, pid in sorted(ranks[launchers[0]].items())]


@pytest.fixture(scope="session")
def undisturbed(workplace: Path) -> Callable[[str], Path]:
    """The last checkpoint of a straight run."""

    @cache
    def straight(strategy: str) -> Path:
        run = RunDir(workplace / "straight" / strategy)
        finish(train(run, strategy), 0)
        return run.checkpoint(STEPS)

    return straight


def same_weights(first: Path, second: Path) -> bool:
    return compare_tensors(open_checkpoint(first).weights, open_checkpoint(second).weights).same


@pytest.mark.parametrize(
    ("strategy", "target", "number"),
    [
        ("fsdp", "command", signal.SIGTERM),
        ("ddp", "everyone", signal.SIGTERM),
        ("zero2", "rank 1", signal.SIGUSR1),
        ("zero3", "launcher", signal.SIGTERM),
        ("single", "launcher", signal.SIGUSR1),
    ],
)
def test_a_signal_anywhere_saves_and_exits_75_and_resume_is_exact(
    strategy: str, target: str, number: int, workplace: Path, undisturbed: Callable[[str], Path]
) -> None:
    run = RunDir(workplace / "told" / strategy)
    job = train(run, strategy)
    wait_for_step(run, 2, job)
    launchers, ranks = processes(run)
    told = {
        "command": [job.pid],
        "launcher": launchers,
        "rank 1": ranks[1:2],
        "everyone": [*launchers, *ranks, job.pid],
    }
    for pid in told[target]:
        os.kill(pid, number)
    asked = time.monotonic()
    finish(job, 75)
    assert time.monotonic() - asked < GRACE
    (checkpoint,) = run.root.glob("checkpoint-*")
    assert 2 <= json.loads((checkpoint / "state.json").read_text())["step"] < STEPS
    finish(vfun("resume", str(run.root)), 0)
    assert same_weights(run.checkpoint(STEPS), undisturbed(strategy))


def test_a_killed_rank_starts_over_from_the_newest_checkpoint(
    workplace: Path, undisturbed: Callable[[str], Path]
) -> None:
    run = RunDir(workplace / "killed")
    job = train(run, "ddp", "--checkpointing-steps", "2", "--max-restarts", "1")
    wait_for_step(run, 3, job)
    os.kill(processes(run)[1][1], signal.SIGKILL)
    output = finish(job, 0)
    assert "rank 1 was ended by SIGKILL" in output
    assert "restart 1 of 1, from checkpoint-2" in output
    assert same_weights(run.checkpoint(STEPS), undisturbed("ddp"))


def test_the_time_limit_saves_and_exits_75(workplace: Path) -> None:
    run = RunDir(workplace / "short")
    finish(train(run, "single", "--max-hours", "0.0001"), 75)
    assert run.checkpoint(0).is_dir()
