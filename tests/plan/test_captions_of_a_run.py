"""The captions of a run: the same on any number of ranks, from any step on, and no part of the plan."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.modeling.captions import CaptionOptions
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import plan_run
from vfun_cli.training.data.stream import RowToTrain, micro_batches

OPTIONS = PlanOptions(
    video_sample_size=256, token_sample_size=512, video_sample_n_frames=49, video_sample_stride=2, video_repeat=2,
)  # fmt: skip
DRAWN = CaptionOptions(prefix="ohwx", shuffle_tags=True)
PURPOSES = {"caption_prefix": "ohwx", "caption_suffix": "film", "caption_dropout": 0.5, "shuffle_tags": True}


def captions(plan: RunPlan, first_step: int = 0) -> Mapping[SampleKey, str]:
    """What all ranks read, by the key of the sample."""

    def read_row(row: int) -> RowToTrain:
        return RowToTrain(record={"text": [f"{row}, dog, grass", f"{row}, cat", f"{row}"]}, captions=DRAWN)

    found = {}
    for rank in range(plan.options.world_size):
        for batch in micro_batches(plan, read_row, rank=rank, first_step=first_step):
            found |= {each.key: each.caption for each in batch.requests}
    return found


def test_a_sample_has_its_caption_on_any_rank_and_from_any_step_on(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    def of(**changes: Any) -> RunPlan:
        return RunPlan(
            spec=plain, dims=plain.model.dims, table=mixed(60), options=replace(OPTIONS, **changes), num_epochs=3,
            max_steps=10**6,
        )  # fmt: skip

    alone = captions(of())
    assert len(alone) > 100 and len({*alone.values()}) > 100
    for options in ({"world_size": 3}, {"world_size": 2, "gradient_accumulation_steps": 2}, {"train_batch_size": 4}):
        shared = captions(of(**options))
        assert len(shared) > 100
        assert {key: alone[key] for key in shared.keys() & alone.keys()} == shared
    later = captions(of(), first_step=20)
    assert 0 < len(later) < len(alone) and later.items() <= alone.items()


def test_captions_are_no_part_of_the_plan(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    spec = families.find("wan-fun-control")
    plans = [
        plan_options(resolve("train", spec, {"num_processes": 1, "strategy": "single", **given}, environ={}).config)
        for given in ({}, PURPOSES)
    ]
    assert plans[0] == plans[1]
    digests = [[each.digest() for each in plan_run(plain, plain.model.dims, mixed(40), plan, 3)] for plan in plans]
    assert digests[0] == digests[1]
