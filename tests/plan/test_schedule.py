"""The schedule: every clip once, one shape a micro-batch, equal cost on all ranks, whatever the world size."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError, MetadataError, RunError
from vfun_cli.families import FAMILIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.records import metadata_digest
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.balance import independent_balance, mean_over_max
from vfun_cli.plan.clips import KINDS, prepare
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.run_plan import RunPlan, load_plan
from vfun_cli.plan.schedule import Carry, EpochPlan, count_steps, plan_epoch, plan_run

SETTINGS: dict[str, Any] = {
    "video_sample_size": 256, "image_sample_size": 768, "token_sample_size": 512, "video_sample_n_frames": 49,
    "video_sample_stride": 2, "random_hw_adapt": True, "training_with_video_token_length": True,
}  # fmt: skip

Key = tuple[int, int, int]


def options(**values: Any) -> PlanOptions:
    return PlanOptions(**{**SETTINGS, **values})


def trained(plans: Iterable[EpochPlan]) -> Counter[Key]:
    """(row, copy, epoch) of every sample that some rank trains."""
    found: Counter[Key] = Counter()
    for plan in plans:
        for rank in range(plan.world_size):
            for step in plan.micro_batches_for(rank):
                found.update((s.row, s.copy, s.epoch) for batch in step for s in batch.samples)
    return found


def carried(carry: Carry) -> Counter[Key]:
    return Counter(zip(carry.row.tolist(), carry.copy.tolist(), carry.epoch.tolist(), strict=True))


clip = st.tuples(
    st.sampled_from([0, 200, 480, 720, 1080, 1920]),
    st.sampled_from([0, 270, 480, 720, 1080]),
    st.integers(0, 200),
    st.sampled_from([(24, 1), (30000, 1001), (0, 1)]),
    st.booleans(),
)
datasets = st.lists(clip, min_size=1, max_size=40).map(
    lambda rows: ClipTable.from_columns(
        width=[r[0] for r in rows], height=[r[1] for r in rows], frames=[r[2] for r in rows],
        fps=[r[3] for r in rows], is_image=[r[4] for r in rows],
    )
)  # fmt: skip
choices = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 5),
        "gradient_accumulation_steps": st.integers(1, 3),
        "train_batch_size": st.integers(1, 3),
        "tokens_per_batch": st.sampled_from([None, 1, 30_000]),
        "video_repeat": st.integers(0, 2),
        "random_frame_crop": st.booleans(),
        "heaviest_first": st.booleans(),
        "enable_bucket": st.booleans(),
        "seed": st.integers(0, 2**64),
    }
)


@pytest.mark.slow
@settings(max_examples=60)
@given(table=datasets, chosen=choices, videos_only=st.booleans())
def test_every_clip_is_trained_once_an_epoch_or_carried(
    plain: FamilySpec, speech: FamilySpec, table: ClipTable, chosen: dict[str, Any], videos_only: bool
) -> None:
    spec = speech if videos_only else plain
    picked = options(**chosen)
    used = prepare(spec, spec.model.dims, table, picked).used
    if not used.any():
        with pytest.raises(MetadataError):
            plan_epoch(spec, spec.model.dims, table, picked, 0)
        return
    times = {r: 1 if table.is_image[r] else max(1, picked.video_repeat) for r in np.flatnonzero(used).tolist()}
    carry = Carry.empty()
    for epoch in range(3):
        plan = plan_epoch(spec, spec.model.dims, table, picked, epoch, carry=carry)
        drawn = Counter((row, copy, epoch) for row, count in times.items() for copy in range(count))
        assert trained([plan]) + carried(plan.carry) == drawn + carried(carry)
        ledger = plan.ledger
        assert ledger.used + sum(ledger.dropped.values()) == ledger.rows == len(table)
        assert ledger.samples + ledger.carried_in - ledger.carried_out == ledger.trained == len(plan.row)
        assert ledger.borrowed == 0 and 0 <= ledger.truncated <= ledger.used
        assert int(plan.buckets.clips.sum()) == ledger.samples
        assert plan.steps.shape == (plan.num_steps, picked.slots)
        assert sorted(plan.steps.reshape(-1).tolist()) == list(range(len(plan.frames)))
        carry = plan.carry


@pytest.mark.slow
@settings(max_examples=50)
@given(table=datasets, chosen=choices)
def test_no_micro_batch_mixes_shapes_or_enlarges_too_much(
    plain: FamilySpec, table: ClipTable, chosen: dict[str, Any]
) -> None:
    picked = options(**chosen)
    clips = prepare(plain, plain.model.dims, table, picked)
    if not clips.used.any():
        return
    alone = replace(picked, train_batch_size=1, tokens_per_batch=None, world_size=1, gradient_accumulation_steps=1)
    shapes = {}
    for batch in (
        b for step in plan_epoch(plain, plain.model.dims, table, alone, 0).micro_batches_for(0) for b in step
    ):
        shapes[batch.samples[0]] = (batch.kind, batch.shape)
    plan = plan_epoch(plain, plain.model.dims, table, picked, 0)
    for number in range(len(plan.frames)):
        batch = plan.micro_batch(number)
        tokens = plain.model.sequence_tokens(batch.shape, plain.model.dims)
        full = max(1, picked.tokens_per_batch // tokens) if picked.tokens_per_batch else picked.train_batch_size
        assert len(batch.samples) == full
        for sample in batch.samples:
            assert shapes[sample] == (batch.kind, batch.shape)
            assert batch.kind == KINDS[int(table.is_image[sample.row])]
            height, width = int(table.height[sample.row]), int(table.width[sample.row])
            assert max(Fraction(batch.shape.height, height), Fraction(batch.shape.width, width)) <= Fraction(5, 4)
            if batch.kind == "video":
                assert (batch.shape.frames - 1) * sample.stride < table.frames[sample.row]
                assert batch.shape.frames % 4 == 1 and batch.shape.frames >= 5


@pytest.mark.slow
@settings(max_examples=30)
@given(table=datasets, chosen=choices, ranks=st.integers(2, 4))
def test_the_samples_of_a_run_do_not_depend_on_the_world_size(
    plain: FamilySpec, table: ClipTable, chosen: dict[str, Any], ranks: int
) -> None:
    one = options(**{**chosen, "world_size": 1, "gradient_accumulation_steps": 1})
    if not prepare(plain, plain.model.dims, table, one).used.any():
        return
    runs = {}
    for world_size in (1, ranks):
        carry, plans = Carry.empty(), []
        for epoch in range(3):
            picked = replace(one, world_size=world_size)
            plans.append(plan_epoch(plain, plain.model.dims, table, picked, epoch, carry=carry))
            carry = plans[-1].carry
        runs[world_size] = trained(plans) + carried(carry)
    assert runs[1] == runs[ranks]


@pytest.mark.slow
@settings(max_examples=60)
@given(table=datasets, chosen=choices)
def test_one_process_accumulating_two_takes_the_steps_of_two_processes(
    plain: FamilySpec, table: ClipTable, chosen: dict[str, Any]
) -> None:
    single = options(**{**chosen, "world_size": 1, "gradient_accumulation_steps": 2})
    pair = replace(single, world_size=2, gradient_accumulation_steps=1)
    if not prepare(plain, plain.model.dims, table, single).used.any():
        return
    left, right = (plan_epoch(plain, plain.model.dims, table, picked, 0) for picked in (single, pair))
    assert left.digest() == right.digest()
    together = [a + b for a, b in zip(right.micro_batches_for(0), right.micro_batches_for(1), strict=True)]
    assert list(left.micro_batches_for(0)) == together


def test_a_draw_does_not_depend_on_the_other_rows(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    table = mixed(200)
    kept = np.arange(50, 120)
    part = ClipTable(**{name: column[kept] for name, column in vars(table).items()})
    shapes = []
    for each in (table, part):
        plan = plan_epoch(plain, plain.model.dims, each, options(), 3)
        shapes.append({b.samples[0].row: b.shape for s in plan.micro_batches_for(0) for b in s})
    assert len(shapes[1]) > 50
    assert shapes[1].items() <= shapes[0].items()


def test_equal_input_gives_equal_bytes_and_any_change_another_digest(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    def digest(epoch: int = 0, **values: Any) -> str:
        return plan_epoch(plain, plain.model.dims, mixed(300), options(**values), epoch).digest()

    assert digest() == digest()
    others = [digest(1), digest(seed=1), digest(world_size=2), digest(train_batch_size=2), digest(video_repeat=2)]
    assert len({digest(), *others}) == 6


def test_the_plan_is_the_same_on_every_machine(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    table = ClipTable.from_columns(width=[1280] * 40, height=[720] * 40, frames=[200] * 40, fps=(25, 1))
    digest = plan_epoch(plain, plain.model.dims, table, options(world_size=4), 0).digest()
    assert digest == "906c60a2bfbb645296e02cac32f93d64118cc7b3e0b71f2377c881db59f25178"


def test_zero_and_one_repeat_both_mean_once(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    counts = [
        plan_epoch(plain, plain.model.dims, mixed(100), options(video_repeat=n), 0).ledger.samples for n in (0, 1, 2)
    ]
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("world_size", [8, 64])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ranks_are_equally_loaded_with_the_published_settings(family: str, world_size: int) -> None:
    spec = FAMILIES[family]
    table = ClipTable.from_columns(
        width=[1280] * 8000, height=[720] * 8000, frames=[400] * 8000, fps=(25, 1), is_image=[False] * 8000
    )
    plan = plan_epoch(spec, spec.model.dims, table, PlanOptions.pick(spec.defaults.train, world_size=world_size), 0)
    assert plan.num_steps >= 100
    assert mean_over_max(plan) >= 0.98


@pytest.mark.parametrize("batch", [{}, {"train_batch_size": 4}, {"tokens_per_batch": 40_000}])
@pytest.mark.parametrize("world_size, num_rows", [(8, 8000), (64, 40_000)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ranks_are_equally_loaded_on_mixed_sets(
    family: str, world_size: int, num_rows: int, batch: dict[str, Any], mixed: Callable[..., ClipTable]
) -> None:
    spec = FAMILIES[family]
    table = mixed(num_rows, images=0.3 if "image" in spec.media_types else 0.0)
    chosen = PlanOptions.pick(spec.defaults.train, world_size=world_size, **batch)
    plan = plan_epoch(spec, spec.model.dims, table, chosen, 0)
    assert mean_over_max(plan) >= 0.98


def test_independent_draws_waste_half_of_the_hardware_with_the_published_settings() -> None:
    spec = FAMILIES["wan-s2v"]
    table = ClipTable.from_columns(width=[1280] * 8000, height=[720] * 8000, frames=[400] * 8000, fps=(25, 1))
    plan = plan_epoch(spec, spec.model.dims, table, PlanOptions.pick(spec.defaults.train, world_size=8), 0)
    figures = [independent_balance(plan, world_size=ranks) for ranks in (8, 64, 512)]
    assert figures == pytest.approx([0.486, 0.463, 0.464], abs=0.015)


def test_the_heaviest_step_opens_the_epoch_on_request(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    usual, first = (
        plan_epoch(plain, plain.model.dims, mixed(500), options(world_size=4, heaviest_first=wish), 0)
        for wish in (False, True)
    )
    assert first.flops[first.steps[0]].max() == first.flops.max() != usual.flops[usual.steps[0]].max()
    assert sorted(map(tuple, first.steps.tolist())) == sorted(map(tuple, usual.steps.tolist()))


def test_steps_are_shuffled_rather_than_sorted(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_epoch(plain, plain.model.dims, mixed(2000), options(world_size=4), 0)
    cost = plan.flops[plan.steps].max(axis=1)
    assert abs(np.corrcoef(cost, np.arange(len(cost)))[0, 1]) < 0.2


def test_few_clips_make_progress_over_epochs(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[640] * 3, height=[640] * 3, frames=[100] * 3, fps=(25, 1))
    chosen = options(world_size=8)
    plans = list(plan_run(plain, plain.model.dims, table, chosen, 100))
    assert sum(plan.num_steps for plan in plans) == 300 // 8 == count_steps(plain, plain.model.dims, table, chosen, 100)
    assert max(len(plan.carry) for plan in plans) < 8


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_too_small_for_a_step_borrows_from_the_following_epochs(plain: FamilySpec, batch: int) -> None:
    table = ClipTable.from_columns(width=[640] * 3, height=[640] * 3, frames=[100] * 3, fps=(25, 1))
    chosen = options(world_size=8, train_batch_size=batch)
    for num_epochs in (1, 2):
        plans = list(plan_run(plain, plain.model.dims, table, chosen, num_epochs))
        assert [plan.num_steps for plan in plans] == [0] * (num_epochs - 1) + [1]
        assert plans[-1].ledger.borrowed > 0
        found = trained(plans)
        assert sum(found.values()) == 8 * batch
        assert max(found.values()) == 1
        assert count_steps(plain, plain.model.dims, table, chosen, num_epochs) == 1


def test_borrowing_makes_one_step_and_leaves_the_rest_to_its_own_epochs(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[960, 540, 720] * 3, height=[540, 960, 720] * 3, frames=[100] * 9, fps=(25, 1))
    chosen = options(
        image_sample_size=None, video_sample_size=512, training_with_video_token_length=False, random_hw_adapt=False,
        train_batch_size=4,
    )  # fmt: skip
    (plan,) = plan_run(plain, plain.model.dims, table, chosen, 1)
    assert (plan.num_steps, plan.ledger.trained, plan.ledger.borrowed) == (1, 4, 1)
    assert len(plan.carry) == 6 and (plan.carry.epoch == 0).all()


@pytest.mark.slow
@settings(max_examples=30)
@given(table=datasets, chosen=choices, num_epochs=st.integers(1, 6))
def test_counted_steps_are_the_planned_steps(
    plain: FamilySpec, table: ClipTable, chosen: dict[str, Any], num_epochs: int
) -> None:
    picked = options(**chosen)
    if not prepare(plain, plain.model.dims, table, picked).used.any():
        return
    plans = plan_run(plain, plain.model.dims, table, picked, num_epochs)
    assert sum(plan.num_steps for plan in plans) == count_steps(plain, plain.model.dims, table, picked, num_epochs)


def test_nothing_waits_for_more_than_one_epoch(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    for plan in plan_run(plain, plain.model.dims, mixed(300), options(world_size=64), 6):
        assert (plan.carry.epoch == plan.epoch).all()


def test_an_epoch_planned_from_what_the_one_before_left_equals_the_run(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    table, chosen = mixed(150), options(world_size=8, train_batch_size=2)
    whole = list(plan_run(plain, plain.model.dims, table, chosen, 6))
    assert len(whole[2].carry) > 0
    alone = plan_epoch(plain, plain.model.dims, table, chosen, 3, carry=whole[2].carry)
    assert alone.digest() == whole[3].digest()


def test_strides_follow_the_option_or_the_highest_frame_rate(plain: FamilySpec, speech: FamilySpec) -> None:
    rates = [(24, 1), (30, 1), (30000, 1001), (3002, 100), (50, 1), (60000, 1001), (60, 1), (120, 1)]
    table = ClipTable.from_columns(width=[640] * 8, height=[640] * 8, frames=[500] * 8, fps=rates)
    assert prepare(plain, plain.model.dims, table, options(video_sample_stride=3)).stride.tolist() == [3] * 8
    assert prepare(speech, speech.model.dims, table, options(video_sample_stride=1)).stride.tolist() == [
        1, 1, 1, 1, 2, 2, 2, 4,
    ]  # fmt: skip


def test_dropped_rows_are_counted_by_reason(speech: FamilySpec) -> None:
    table = ClipTable.from_columns(
        width=[0, 640, 640, 640, 100, 640, 640],
        height=[640] * 7,
        frames=[100, 0, 100, 6, 100, 100, 7],
        fps=[(25, 1), (25, 1), (0, 0), (25, 1), (25, 1), (25, 1), (25, 1)],
        is_image=[False, False, False, False, False, True, False],
    )
    ledger = plan_epoch(speech, speech.model.dims, table, options(video_sample_stride=2), 0).ledger
    assert ledger.used == 1
    reasons = ["unsupported-type", "unknown-size", "unknown-length", "unknown-fps", "too-short", "too-small"]
    assert ledger.dropped == dict.fromkeys(reasons, 1)


def test_a_set_without_any_usable_row_names_the_reasons_and_the_way_out(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[640, 64], height=[640, 64], frames=[3, 100], fps=(25, 1))
    with pytest.raises(MetadataError, match=r"1 too-short.*1 too-small") as caught:
        plan_epoch(plain, plain.model.dims, table, options(), 0)
    assert caught.value.hint is not None and "9 frames" in caught.value.hint
    empty = ClipTable.from_columns(width=[], height=[], frames=[], fps=(25, 1))
    with pytest.raises(MetadataError, match="no rows"):
        plan_epoch(plain, plain.model.dims, empty, options(), 0)


def test_squares_only_without_buckets(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_epoch(plain, plain.model.dims, mixed(200), options(enable_bucket=False), 0)
    assert (plan.height == plan.width).all()


def test_frame_crop_keeps_most_clips_whole_and_all_lengths_legal(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[480] * 4000, height=[480] * 4000, frames=[200] * 4000, fps=(25, 1))
    chosen = options(video_sample_size=480, image_sample_size=480, random_frame_crop=True)
    frames, counts = np.unique(plan_epoch(plain, plain.model.dims, table, chosen, 0).frames, return_counts=True)
    assert frames.tolist() == list(range(5, 50, 4))
    assert counts[-1] / 4000 == pytest.approx(0.9, abs=0.02)
    assert counts[:-1].min() > 15


def test_a_table_survives_its_file(tmp_path: Any, mixed: Callable[..., ClipTable]) -> None:
    table = mixed(20)
    table.save(tmp_path / "clips.npz")
    again = ClipTable.load(tmp_path / "clips.npz")
    assert all(np.array_equal(column, vars(again)[name]) for name, column in vars(table).items())


def test_processes_refuse_a_plan_that_the_launch_did_not_show(
    tmp_path: Path, plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    rows = tmp_path / "metadata.json"
    rows.write_text("[]")
    config, clips = RunConfig(train_data_meta=parse_data_sets(rows, "rows"), num_processes=2), tmp_path / "clips.npz"
    table = mixed(20)
    table.save(clips)
    shown = RunPlan.of(config, plain, plain.model.dims, table)
    described = {"clips": str(clips), "metadata_sha256": metadata_digest(rows)}
    digest = shown.first_epoch.digest()
    assert load_plan(config, plain, {**described, "plan_digest": digest}).first_epoch.digest() == digest
    mixed(21).save(clips)
    with pytest.raises(RunError, match="other steps than the launch showed"):
        load_plan(config, plain, {**described, "plan_digest": digest})


def test_clips_narrower_than_the_transformer_takes_are_refused_with_their_size(plain: FamilySpec) -> None:
    wide = ClipTable.from_columns(width=[640], height=[360], frames=[100], fps=[(25, 1)], is_image=[False])
    square = ClipTable.from_columns(width=[360], height=[360], frames=[100], fps=[(25, 1)], is_image=[False])
    picked = options(video_sample_size=64, token_sample_size=64)
    needy = replace(plain, plan=replace(plain.plan, smallest_side=64))
    with pytest.raises(ConfigError, match=r"train at 80x48; .* at least 64 pixels a side") as caught:
        prepare(needy, needy.model.dims, wide, picked)
    assert "--video-sample-size" in str(caught.value.hint)
    assert (
        prepare(needy, needy.model.dims, square, picked).used.all()
        and prepare(plain, plain.model.dims, wide, picked).used.all()
    )


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("family", ["wan-s2v", "easyanimate-v5-control", "cogvideox-fun"])
def test_a_video_of_the_length_that_messages_name_is_trained_and_a_shorter_one_is_not(family: str, stride: int) -> None:
    spec = FAMILIES[family]
    needed = spec.plan.clip_needs(stride).shortest_video(stride)
    table = ClipTable.from_columns(width=[640] * 2, height=[640] * 2, frames=[needed - 1, needed], fps=(25, 1))
    picked = PlanOptions.pick(spec.defaults.train, video_sample_stride=stride)
    assert prepare(spec, spec.model.dims, table, picked).used.tolist() == [False, True]
