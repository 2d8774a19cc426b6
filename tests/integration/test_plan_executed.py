"""What was planned is what runs: three epochs on two ranks, and a clip that cannot be decoded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Job, finish, records, start, vfun_process
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILY = "cogvideox-fun"
STEPS = 12
"""Six videos and two pictures on two ranks: four steps an epoch."""


def train(folder: str, *options: str, cwd: Path | None = None) -> Job:
    return start(
        "train", FAMILY, "--demo", "--ddp", "--max-train-steps", STEPS, "--checkpointing-steps", 100,
        "--dataloader-num-workers", 1, "--output-dir", folder, *options, cwd=cwd,
    )  # fmt: skip


def epochs_of(folder: str) -> list[dict[str, Any]]:
    """The epoch lines of metrics.jsonl."""
    return [record for record in records(RunDir(Path(folder))) if record.get("event") == "epoch"]


def planned_and_trained() -> list[dict[str, Any]]:
    """The epoch lines of an undisturbed run."""
    finish(train("runs/planned"))
    return epochs_of("runs/planned")


@pytest.mark.ahead.with_args(planned_and_trained)
def test_three_epochs_on_two_ranks_execute_the_printed_plan(result: list[dict[str, Any]], workplace: Path) -> None:
    epochs = result
    command = ("plan-buckets", FAMILY, "--demo", "--json", "--assignment", "--epochs", 3, "--world-size", 2)
    planned = json.loads(vfun_process(*command, code=0).out)["epochs"]
    assert len(epochs) == len(planned) == 3
    for said, plan in zip(epochs, planned, strict=True):
        assert said["epoch"] == plan["epoch"] and said["steps"] == plan["steps"] == 4 and said["complete"]
        counts = {"samples": plan["trained"], "micro_batches": len(plan["assignment"])}
        assert said["planned"] == said["executed"] == {**counts, "assignment_digest": plan["assignment_digest"]}
        assert sum(len(batch["samples"]) for batch in plan["assignment"]) == plan["trained"] == 8
        assert said["agree"] and said["skipped"] == []


def test_a_clip_that_cannot_be_decoded_stops_the_run_or_is_left_out(workplace: Path, tmp_path: Path) -> None:
    """Its header is whole, so validation lets it pass; one rank has it, and both make every step.

    In a copy of the demo: work for other tests goes on beside this one.
    """
    data = tmp_path / "vfun-demo" / FAMILY / "data"
    shutil.copytree(workplace / "vfun-demo" / FAMILY, data.parent)
    video = data / "train/00000004.mp4"
    whole = video.read_bytes()
    first, end = whole.find(b"mdat") + 4, whole.find(b"moov") - 4
    video.write_bytes(whole[:first] + bytes((i * 7919 + 13) % 256 for i in range(end - first)) + whole[end:])
    rows = json.loads((data / "metadata.json").read_text())
    row = next(i for i, each in enumerate(rows) if each["file_path"].endswith(video.name))
    skipping, stopping = train("skipping", "--on-bad-sample", "skip", cwd=tmp_path), train("stopping", cwd=tmp_path)
    finish(skipping)
    epochs = epochs_of(str(tmp_path / "skipping"))
    assert [each["skipped"] for each in epochs] == [[row]] * 3
    assert all(each["executed"]["samples"] == each["planned"]["samples"] - 1 == 7 for each in epochs)
    assert all(each["executed"]["micro_batches"] == each["planned"]["micro_batches"] == 8 for each in epochs)
    assert all(each["agree"] for each in epochs)
    said = " ".join(finish(stopping, 3).err.split())
    assert f"row {row}: " in said and video.name in said and "--on-bad-sample skip" in said
