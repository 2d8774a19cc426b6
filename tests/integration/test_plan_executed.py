"""What was planned is what runs: three epochs on two ranks, and a clip that cannot be decoded."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import records, vfun_process
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILY = "cogvideox-fun"
STEPS = 12
"""Six videos and two pictures on two ranks: four steps an epoch."""


def train(folder: str, *options: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    """The epoch lines of metrics.jsonl, and what the run said."""
    said = vfun_process(
        "train", FAMILY, "--demo", "--ddp", "--max-train-steps", STEPS, "--checkpointing-steps", 100,
        "--dataloader-num-workers", 1, "--output-dir", folder, *options, code=code,
    )  # fmt: skip
    return [record for record in records(RunDir(Path(folder))) if record.get("event") == "epoch"], said.err


def test_three_epochs_on_two_ranks_execute_the_printed_plan(workplace: Path) -> None:
    epochs, _ = train("runs/planned")
    plan = ("plan-buckets", FAMILY, "--demo", "--json", "--assignment", "--epochs", 3, "--world-size", 2)
    planned = json.loads(vfun_process(*plan, code=0).out)["epochs"]
    assert len(epochs) == len(planned) == 3
    for said, plan in zip(epochs, planned, strict=True):
        assert said["epoch"] == plan["epoch"] and said["steps"] == plan["steps"] == 4 and said["complete"]
        counts = {"samples": plan["trained"], "micro_batches": len(plan["assignment"])}
        assert said["planned"] == said["executed"] == {**counts, "assignment_digest": plan["assignment_digest"]}
        assert sum(len(batch["samples"]) for batch in plan["assignment"]) == plan["trained"] == 8
        assert said["agree"] and said["skipped"] == []


def test_a_clip_that_cannot_be_decoded_stops_the_run_or_is_left_out(workplace: Path) -> None:
    """Its header is whole, so validation lets it pass; one rank has it, and both make every step."""
    video = workplace / "vfun-demo" / FAMILY / "data/train/00000004.mp4"
    whole = video.read_bytes()
    start, end = whole.find(b"mdat") + 4, whole.find(b"moov") - 4
    video.write_bytes(whole[:start] + bytes((i * 7919 + 13) % 256 for i in range(end - start)) + whole[end:])
    rows = json.loads((video.parent.parent / "metadata.json").read_text())
    row = next(i for i, each in enumerate(rows) if each["file_path"].endswith(video.name))
    try:
        epochs, err = train("runs/skipping", "--on-bad-sample", "skip")
        assert [each["skipped"] for each in epochs] == [[row]] * 3
        assert all(each["executed"]["samples"] == each["planned"]["samples"] - 1 == 7 for each in epochs)
        assert all(each["executed"]["micro_batches"] == each["planned"]["micro_batches"] == 8 for each in epochs)
        assert all(each["agree"] for each in epochs)
        _, err = train("runs/stopping", code=3)
        assert f"row {row}: " in err and video.name in err and "--on-bad-sample skip" in " ".join(err.split())
    finally:
        video.write_bytes(whole)
