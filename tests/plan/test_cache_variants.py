"""With ``--cache-variants`` the draws that decide what encoders see repeat, and are as random as before."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.modeling.clips import frame_indices
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import plan_run
from vfun_cli.training.data.stream import RowToTrain, micro_batches

Draw = tuple[int, int, int, int]
"""Start, frames, height, width."""


def draws(spec: FamilySpec, table: ClipTable, variants: int | None, num_epochs: int) -> dict[int, list[Draw]]:
    """What a run draws of each row, epoch by epoch."""
    options = PlanOptions(
        video_sample_size=256, image_sample_size=768, token_sample_size=512, video_sample_n_frames=49,
        video_sample_stride=2, random_hw_adapt=True, training_with_video_token_length=True, cache_variants=variants,
    )  # fmt: skip
    plan = RunPlan(
        spec=spec, dims=spec.model.dims, table=table, options=options, num_epochs=num_epochs, max_steps=10**6
    )
    found: dict[int, dict[int, Draw]] = defaultdict(dict)
    for batch in micro_batches(plan, lambda row: RowToTrain(record={}, place=""), rank=0, first_step=0):
        for each in batch.requests:
            found[each.key.row][each.key.epoch] = (frame_indices(each)[0], each.frames, each.height, each.width)
    return {row: [epochs[epoch] for epoch in range(num_epochs)] for row, epochs in found.items()}


@pytest.mark.parametrize("variants", [1, 2, 5])
def test_each_clip_has_as_many_random_starts_and_sizes_as_variants_and_then_repeats(
    variants: int, plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    found = draws(plain, mixed(120, images=0), variants, 3 * variants)
    assert len(found) > 60
    for drawn in found.values():
        assert drawn == 3 * drawn[:variants] and len({*drawn}) <= variants
    for epoch in range(variants):
        starts, _, heights, _ = zip(*[drawn[epoch] for drawn in found.values()], strict=True)
        assert len({*starts}) > len(found) / 4 and len({*heights}) > 10
    if variants > 1:
        different = [drawn for drawn in found.values() if len({draw[0] for draw in drawn}) > 1]
        assert len(different) > 0.8 * len(found)
        assert any(len({draw[1:] for draw in drawn}) > 1 for drawn in found.values())
    endless = draws(plain, mixed(120, images=0), None, 3 * variants)
    assert {row: drawn[:variants] for row, drawn in endless.items()} == {
        row: drawn[:variants] for row, drawn in found.items()
    }
    assert all(len({*endless[row]}) >= len({*found[row]}) for row in found)
    assert endless != found


def test_a_cache_changes_nothing_of_the_plan_but_the_variants_that_it_sets(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    spec = families.find("wan-fun-control")

    def plan(**given: object) -> tuple[PlanOptions, list[str]]:
        options = plan_options(
            resolve("train", spec, {"num_processes": 2, "strategy": "ddp", **given}, environ={}).config
        )
        return options, [plan.digest() for plan in plan_run(plain, plain.model.dims, mixed(40), options, 6)]

    assert plan(cache=Path("latents"), cache_variants=3) == plan(cache_variants=3)
    assert plan(cache=Path("latents")) == plan(cache_variants=4)
    assert plan(cache_variants=3) != plan(cache_variants=4) != plan()
