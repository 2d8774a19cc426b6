"""A whole job that waits for something that may never come: it ends, by itself or when it is told to."""

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.disks import fill, starts_with_memory_of
from tests.jobs import (
    Job,
    children_of,
    finish,
    held_out,
    last_step,
    losses,
    records,
    start,
    training_processes,
    wait_for,
    wait_for_step,
)
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "number", "code"),
    [
        ("fsdp", signal.SIGINT, EXIT_INTERRUPTED),
        ("ddp", signal.SIGTERM, EXIT_PREEMPTED),
        ("zero3", signal.SIGTERM, EXIT_PREEMPTED),
    ],
)
def test_ranks_that_make_samples_save_and_stop_and_the_rest_is_what_it_would_have_been(
    strategy: str, number: signal.Signals, code: int, workplace: Path
) -> None:
    """The command asks by a file when it is interrupted; preempted are, as by a cluster, the ranks themselves."""
    short = ("--max-train-steps", 4, "--validation-rows", 2, "--validation-steps", 2, "--dataloader-num-workers", 0)
    whole, run = RunDir(workplace / f"whole-{strategy}"), RunDir(workplace / f"samples-{strategy}")
    finish(train(whole, strategy, *short, "--no-validation-samples"))
    job = train(run, strategy, *short, "--validation-sampling-steps", 1000)
    wait_for(lambda: "samples by the trained weights" in read(run.launcher_log()), job)
    if number == signal.SIGINT:
        os.kill(job.pid, number)
    else:
        for rank in training_processes(run)[1]:
            os.kill(rank, number)
    finish(job, code, within=WITHIN)
    assert run.checkpoint(0).is_dir() and last_step(run) == 0
    assert [path.name for path in run.samples_folder.iterdir()] == ["rows"], "no half a video"
    finish(start("resume", run.root, "--validation-sampling-steps", 1))
    assert losses(run) == losses(whole) and len(losses(run)) == 4
    made = [(record["step"], record["made"]) for record in records(run) if record.get("event") == "samples"]
    assert made == [(0, 2), (2, 2), (4, 2)]
    assert held_out(run) == held_out(whole)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


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
    assert re.search(r"row \d+ were decoded and cannot be handed over: .*No space left on device", said)
    assert "/dev/shm" in said
