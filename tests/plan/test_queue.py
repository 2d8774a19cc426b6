"""What waits in /dev/shm: how much it can be, and that it fits before anything is started."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import FitError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan import queue
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.run_plan import RunPlan

OPTIONS = PlanOptions(
    video_sample_size=512, token_sample_size=512, video_sample_n_frames=49, video_sample_stride=1, train_batch_size=2
)
CONFIG = RunConfig(num_processes=4, num_machines=2, dataloader_num_workers=3, gradient_accumulation_steps=2)
CLIP = 512 * 512 * 3 * 49
Usage = namedtuple("Usage", "total used free")


def table(count: int, *, width: int, height: int, frames: int) -> ClipTable:
    return ClipTable.from_columns(
        width=[width] * count, height=[height] * count, frames=[frames] * count, fps=[(25, 1)] * count,
        is_image=[False] * count,
    )  # fmt: skip


def plan_of(spec: FamilySpec, table: ClipTable, **options: Any) -> RunPlan:
    return RunPlan(
        spec=spec, dims=spec.model.dims, options=replace(OPTIONS, enable_bucket=False, **options), table=table
    )


def test_the_largest_micro_batch_is_as_large_as_its_clips(plain: FamilySpec) -> None:
    clips = table(4, width=1280, height=720, frames=100)
    assert queue.largest_micro_batch(plan_of(plain, clips)) == 2 * CLIP
    assert queue.largest_micro_batch(plan_of(plain, clips, train_batch_size=5)) == 5 * CLIP
    short = table(4, width=1280, height=720, frames=10)
    assert queue.largest_micro_batch(plan_of(plain, short)) == 2 * CLIP * 9 // 49
    small = plan_of(plain, table(4, width=300, height=300, frames=100), training_with_video_token_length=True)
    assert queue.largest_micro_batch(small) <= 2 * 375 * 375 * 3 * 49


@pytest.mark.parametrize(
    ("total", "free", "ahead", "fits"),
    [(40, 40, 2, True), (39, 14, 1, True), (39, 13, 1, False), (0, 0, 1, False)],
)
def test_fewer_are_decoded_ahead_before_a_run_is_refused(
    total: int, free: int, ahead: int, fits: bool, plain: FamilySpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two ranks a machine, each with three processes and the four micro-batches of two steps: 20 ahead, 14 at least."""
    plan = plan_of(plain, table(4, width=1280, height=720, frames=100))
    micro_batch = 2 * CLIP
    monkeypatch.setattr(queue.shutil, "disk_usage", lambda path: Usage(total * micro_batch, 0, free * micro_batch))
    assert queue.micro_batches_ahead(CONFIG, plan) == ahead
    if fits:
        queue.check_shared_memory(CONFIG, plan)
    else:
        with pytest.raises(FitError, match=r"3 decoding processes of each of 2 ranks .* /dev/shm") as caught:
            queue.check_shared_memory(CONFIG, plan)
        assert "--shm-size" in str(caught.value.hint) and "--dataloader-num-workers" in str(caught.value.hint)
    queue.check_shared_memory(replace(CONFIG, dataloader_num_workers=0), plan)


def test_a_machine_without_shared_memory_is_one_without_room(
    plain: FamilySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MEMORY", Path("/no/such"))
    with pytest.raises(FitError, match="/no/such"):
        queue.check_shared_memory(CONFIG, plan_of(plain, table(4, width=1280, height=720, frames=100)))
