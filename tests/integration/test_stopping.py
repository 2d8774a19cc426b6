"""A whole job that waits for something that may never come: it ends, by itself or when it is told to."""

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.disks import fill, starts_with_memory_of
from tests.jobs import Job, children_of, finish, last_step, start, training_processes, wait_for, wait_for_step
from vfun_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, FitError
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

WITHIN = 15
"""Seconds, of which a quiet machine takes three: the ranks look once a second, and save a tiny model."""

IDLE = 0.03
"""Seconds on a processor in three; a rank that trains takes more also on a crowded machine."""


def train(run: RunDir, strategy: str, *more: object, by: Sequence[str] = ()) -> Job:
    return start(
        "train", "cogvideox-fun", "--demo", "--strategy", strategy, "--output-dir", run.root,
        "--max-train-steps", 1000, *more, by=by,
    )  # fmt: skip


def idle(processes: Sequence[int]) -> bool:
    """Whether these processes wait, all of them."""
    before = sum(map(processor_seconds, processes))
    time.sleep(3)
    return sum(map(processor_seconds, processes)) - before < IDLE * len(processes)


def processor_seconds(process: int) -> float:
    _, _, fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")


def test_ranks_that_wait_for_a_clip_that_hangs_its_decoder_save_and_stop(workplace: Path) -> None:
    run = RunDir(workplace / "hangs")
    job = train(run, "ddp", "--dataloader-num-workers", 1)
    wait_for_step(run, 1, job)
    _, ranks = training_processes(run)
    decoders = children_of(children_of(ranks[1:]))  # by way of the fork server
    assert len(decoders) == 1
    os.kill(decoders[0], signal.SIGSTOP)
    wait_for(lambda: idle(ranks), job)
    os.kill(job.pid, signal.SIGTERM)
    finish(job, EXIT_PREEMPTED, within=WITHIN)
    assert run.checkpoint(last_step(run)).is_dir()


def test_ranks_that_are_starting_are_ended_and_leave_no_run(workplace: Path) -> None:
    run = RunDir(workplace / "starts")
    job = train(run, "ddp")
    wait_for(run.run_json.exists, job)
    os.kill(job.pid, signal.SIGINT)
    said = finish(job, EXIT_INTERRUPTED, within=WITHIN)
    assert "before the work had begun: there was nothing to save" in " ".join(said.err.split())
    assert "Run the same command again." in said.err
    assert not run.holds_run() and not list(run.root.glob("*checkpoint*"))


def test_a_job_whose_shared_memory_is_full_ends_and_says_so(workplace: Path) -> None:
    run = RunDir(workplace / "full")
    job = train(run, "single", "--dataloader-num-workers", 1, by=starts_with_memory_of("16m"))
    wait_for_step(run, 1, job)
    _, (rank,) = training_processes(run)
    fill(Path(f"/proc/{rank}/root/dev/shm"))
    said = " ".join(finish(job, FitError.exit_code).err.split())
    assert re.search(r"rows \[\d+\] were decoded and cannot be handed over: .*No space left on device", said)
    assert "/dev/shm" in said
