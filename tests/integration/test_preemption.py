"""A whole job that is told to stop, or killed: saved, exit 75, resumed to the bytes of an undisturbed run."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.jobs import Job, finish, listened_at, start, training_processes, vfun_process, wait_for_step
from vfun_cli.checkpoints.compare import compare_tensors
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.long

STEPS = 6
GRACE = 60
"""Seconds; a step of the demo takes about one."""


def train(run: RunDir, strategy: str, *more: str) -> Job:
    return start(
        "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", run.root,
        "--max-train-steps", STEPS, "--checkpointing-steps", STEPS, *more,
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(workplace: Path) -> Callable[[str], Path]:
    """The last checkpoint of a straight run."""

    @cache
    def straight(strategy: str) -> Path:
        run = RunDir(workplace / "straight" / strategy)
        finish(train(run, strategy))
        return run.checkpoint(STEPS)

    return straight


def same_weights(first: Path, second: Path) -> bool:
    return compare_tensors(open_checkpoint(first).weights, open_checkpoint(second).weights).same


@pytest.mark.parametrize(
    ("strategy", "target", "number"),
    [
        ("fsdp", "command", signal.SIGTERM),
        ("ddp", "everyone", signal.SIGHUP),
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
    launchers, ranks = training_processes(run)
    assert listened_at([*launchers, *ranks]) == ({"127.0.0.1"} if len(ranks) > 1 else set())
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
    vfun_process("resume", run.root, code=0)
    assert same_weights(run.checkpoint(STEPS), undisturbed(strategy))


def test_a_killed_rank_starts_over_from_the_newest_checkpoint(
    workplace: Path, undisturbed: Callable[[str], Path]
) -> None:
    run = RunDir(workplace / "killed")
    job = train(run, "ddp", "--checkpointing-steps", "2", "--max-restarts", "1")
    wait_for_step(run, 3, job)
    os.kill(training_processes(run)[1][1], signal.SIGKILL)
    said = finish(job)
    assert "rank 1 was ended by SIGKILL" in said.err
    assert "restart 1 of 1, from checkpoint-2" in said.err
    assert same_weights(run.checkpoint(STEPS), undisturbed("ddp"))


def test_the_time_limit_saves_and_exits_75(workplace: Path) -> None:
    run = RunDir(workplace / "short")
    finish(train(run, "single", "--max-hours", "0.0001"), 75)
    assert run.checkpoint(0).is_dir()
