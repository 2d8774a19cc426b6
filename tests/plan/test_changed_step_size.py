"""A run whose steps change their size: every sample of every epoch once, and no other plan than a function's."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.plan.conftest import PLAIN
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import EpochPlan, RunSegment, count_steps, earlier_segments, plan_run

OPTIONS = PlanOptions(
    video_sample_size=640, token_sample_size=512, video_sample_n_frames=49, video_sample_stride=1, world_size=8,
    random_hw_adapt=True, training_with_video_token_length=True,
)  # fmt: skip

Mixed = Callable[..., ClipTable]


def samples(plans: Sequence[EpochPlan]) -> Counter[tuple[int, int, int]]:
    """(row, copy, epoch) of everything that is trained."""
    seen: Counter[tuple[int, int, int]] = Counter()
    for plan in plans:
        for number in plan.steps.reshape(-1).tolist():
            seen.update((sample.row, sample.copy, sample.epoch) for sample in plan.micro_batch(number).samples)
    return seen


def run(table: ClipTable, options: PlanOptions, epochs: int, earlier: Sequence[RunSegment] = ()) -> list[EpochPlan]:
    return list(plan_run(PLAIN, PLAIN.model.dims, table, options, epochs, earlier))


@pytest.mark.parametrize("until", [1, 7, 19, 26])
def test_what_was_trained_before_the_change_is_what_was_planned_then(mixed: Mixed, until: int) -> None:
    table = mixed(200)
    straight, changed = (
        run(table, OPTIONS, 2),
        run(table, replace(OPTIONS, world_size=3), 2, [RunSegment(until=until, slots=8)]),
    )
    taken, before = [], 0
    for plan in straight:
        taken.append(plan.cut(max(0, min(plan.num_steps, until - before))))
        before += plan.num_steps
    first = [plan for plan in changed if plan.world_size == 8]
    assert sum(plan.num_steps for plan in first) == until
    assert samples(first) == samples(taken)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.integers(20, 90),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), max_size=3),
    last=st.integers(1, 9),
    batch=st.integers(1, 2),
)
@example(rows=20, sizes=[(4, 7)], last=1, batch=2)  # the size changes where the last epoch ends
def test_every_sample_of_every_epoch_is_trained_once_or_left_at_the_end(
    mixed: Mixed, rows: int, sizes: list[tuple[int, int]], last: int, batch: int
) -> None:
    table, epochs = mixed(rows), 4
    options = replace(OPTIONS, world_size=last, train_batch_size=batch)
    earlier, until = [], 0
    for steps, slots in sizes:
        until += steps
        if until > count_steps(PLAIN, PLAIN.model.dims, table, replace(options, world_size=slots), epochs, earlier):
            break  # a run of this size is over before
        earlier.append(RunSegment(until=until, slots=slots))
    plans = run(table, options, epochs, earlier)
    used = samples(plans)
    assert max(used.values()) == 1
    left = {*zip(*(column.tolist() for column in vars(plans[-1].carry).values()), strict=True)}
    drawn = {*used, *left}
    per_epoch = set(Counter(epoch for _, _, epoch in drawn).values())
    assert len(per_epoch) == 1, "an epoch lost or gained samples"
    assert not left & set(used)
    assert sum(plan.num_steps for plan in plans) == count_steps(
        PLAIN, PLAIN.model.dims, table, options, epochs, earlier
    )


def test_equal_step_sizes_leave_no_trace_in_the_history() -> None:
    state = {"step": 5, "world_size": 4, "run_config": {"gradient_accumulation_steps": 2}, "layouts": []}
    assert earlier_segments(state, 8) == ()
    assert earlier_segments(state, 3) == (RunSegment(until=5, slots=8),)
    again = state | {"step": 9, "world_size": 3, "run_config": {"gradient_accumulation_steps": 1}}
    again["layouts"] = [{"until": 5, "slots": 8}]
    assert earlier_segments(again, 3) == (RunSegment(until=5, slots=8),)
    assert earlier_segments(again, 8) == (RunSegment(until=5, slots=8), RunSegment(until=9, slots=3))
    assert earlier_segments(again | {"step": 5}, 8) == ()
