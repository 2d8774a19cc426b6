"""Several data sets: which clips an epoch shows how often, and that one set plans as it always did."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.conftest import PLAIN
from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.clips import draw_epoch, prepare, times_shown
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import EpochPlan, count_steps, plan_run

SIZES: dict[str, Any] = {
    "video_sample_size": 256, "image_sample_size": 256, "token_sample_size": 256, "video_sample_n_frames": 9,
    "video_sample_stride": 1,
}  # fmt: skip

repeats = st.fractions(Fraction(1, 10), 4, max_denominator=10)


def clips_of(sizes: list[int], *, images: int = 0) -> ClipTable:
    """So many clips of each set, of them the first few images."""
    number = sum(sizes)
    table = ClipTable.from_columns(
        width=[640] * number,
        height=[480] * number,
        frames=[30] * number,
        fps=(25, 1),
        is_image=[index < images for index in range(number)],
    )
    return replace(table, set=np.repeat(np.arange(len(sizes)), sizes))


def shown(plan: EpochPlan) -> Counter[int]:
    """How often an epoch draws each row, whether it is trained now or later."""
    return Counter(plan.row.tolist()) + Counter(plan.carry.row.tolist())


@pytest.mark.slow
@given(
    sets=st.lists(st.tuples(st.integers(1, 12), repeats), min_size=1, max_size=4),
    epochs=st.integers(1, 12),
    video_repeat=st.integers(0, 3),
    images=st.integers(0, 6),
    seed=st.integers(0, 2**40),
)
def test_over_epochs_each_clip_of_a_set_is_drawn_as_often_as_the_others_within_one_and_the_set_as_it_says(
    sets: list[tuple[int, Fraction]], epochs: int, video_repeat: int, images: int, seed: int
) -> None:
    table = clips_of([number for number, _ in sets], images=images)
    options = PlanOptions(**SIZES, video_repeat=video_repeat, seed=seed, repeats=tuple(times for _, times in sets))
    clips = prepare(PLAIN, PLAIN.model.dims, table, options)
    drawn = Counter[int]()
    for epoch in range(epochs):
        samples = draw_epoch(clips, epoch)
        drawn.update(table.row[samples.clip].tolist())
        assert len(set(zip(samples.clip.tolist(), samples.copy.tolist(), strict=True))) == len(samples)
    often = {row: drawn[row] // (1 if table.is_image[row] else max(1, video_repeat)) for row in table.row.tolist()}
    first = 0
    for number, times in sets:
        found = [often[row] for row in range(first, first + number)]
        assert sum(found) == int(number * times * epochs)
        assert {int(times * epochs), -int(-times * epochs // 1)} >= set(found)
        first += number
    assert times_shown(clips, epochs).sum() == sum(drawn.values())


@given(seed=st.integers(0, 2**40), ranks=st.sampled_from([1, 2, 3, 8]), accumulation=st.sampled_from([1, 2]))
@settings(max_examples=30)
def test_what_is_trained_of_weighted_sets_is_the_same_on_any_number_of_ranks(
    seed: int, ranks: int, accumulation: int
) -> None:
    table, times = clips_of([24, 16], images=4), (Fraction(2), Fraction(1, 2))
    options = PlanOptions(**SIZES, seed=seed, repeats=times)
    several = replace(options, world_size=ranks, gradient_accumulation_steps=accumulation)
    dims = PLAIN.model.dims
    alone, together = (list(plan_run(PLAIN, dims, table, each, 4)) for each in (options, several))
    every, left = Counter[int](), together[-1].carry.row.tolist()
    for plan in together:
        every.update(plan.row.tolist())
    every.update(left)
    assert every == sum((Counter(plan.row.tolist()) for plan in alone), Counter()) + Counter(
        alone[-1].carry.row.tolist()
    )
    assert all(every[row] == 8 for row in range(24)) and all(every[row] == 2 for row in range(24, 40))
    assert sum(plan.num_steps for plan in together) == count_steps(PLAIN, dims, table, several, 4)


def test_one_set_plans_as_it_did_before_there_could_be_several(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    plan = next(plan_run(plain, plain.model.dims, mixed(200), PlanOptions(**SIZES, world_size=4), 3))
    assert plan.digest() == "d9a1b50a0ae394a68f17bde5ea0f1743d6085dd9e53ea09d888fc4eefb29b8c7"


def test_sets_that_each_epoch_shows_once_are_planned_as_one_of_all_their_rows(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    table, options = mixed(200), PlanOptions(**SIZES, world_size=4)
    apart = replace(table, set=np.arange(200) // 50)
    times = replace(options, repeats=(Fraction(1),) * 4)
    dims = plain.model.dims
    for one, several in zip(
        plan_run(plain, dims, table, options, 3), plan_run(plain, dims, apart, times, 3), strict=True
    ):
        assert one.digest() == several.digest()


def test_the_ledger_has_a_line_for_each_set(plain: FamilySpec) -> None:
    options = PlanOptions(**SIZES, repeats=(Fraction(2), Fraction(1, 4)))
    first, second = islice(plan_run(plain, plain.model.dims, clips_of([10, 8]), options, 4), 2)
    assert [(line.repeats, line.rows, line.used, line.samples) for line in first.ledger.sets] == [
        ("2", 10, 10, 20),
        ("0.25", 8, 8, 2),
    ]
    assert sum(shown(first).values()) == first.ledger.samples == 22 == second.ledger.samples


def test_repeats_that_can_leave_an_epoch_without_a_clip_are_refused(plain: FamilySpec) -> None:
    options = PlanOptions(**SIZES, repeats=(Fraction(1, 10),))
    with pytest.raises(ConfigError, match="show none of 9 clips"):
        next(plan_run(plain, plain.model.dims, clips_of([9]), options, 1))
    assert next(plan_run(plain, plain.model.dims, clips_of([10]), options, 1)).ledger.samples == 1


def test_a_run_too_small_for_a_step_borrows_from_epochs_that_show_little(plain: FamilySpec) -> None:
    options = PlanOptions(**SIZES, world_size=8, repeats=(Fraction(1, 2),))
    (plan,) = plan_run(plain, plain.model.dims, clips_of([4]), options, 1)
    assert plan.num_steps == 1 and shown(plan) == dict.fromkeys(range(4), 2)
