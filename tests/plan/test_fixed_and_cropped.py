"""One size for every clip, and aspects that are drawn: --fix-sample-size and --random-ratio-crop."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from io import StringIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vfun_cli.config.resolve import resolve
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.families import FAMILIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.batches import batches
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.clips import REASONS, USED, draw_epoch, dropped, prepare
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.preview import preview
from vfun_cli.plan.queue import largest_micro_batch
from vfun_cli.plan.report import plan_json, why, why_lines
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan, plan_epoch
from vfun_cli.plan.sizes import ASPECTS, CROPS, MOST_ENLARGED, bucket

SETTINGS: dict[str, Any] = {
    "video_sample_size": 512, "token_sample_size": 512, "video_sample_n_frames": 49, "video_sample_stride": 1,
}  # fmt: skip
TOKENS = {"image_sample_size": 256, "random_hw_adapt": True, "training_with_video_token_length": True}


def options(**values: Any) -> PlanOptions:
    return PlanOptions(**{**SETTINGS, **values})


clip = st.tuples(
    st.sampled_from([0, 200, 480, 720, 1080, 1920]), st.sampled_from([0, 270, 480, 720, 1080]), st.integers(1, 200),
    st.booleans(),
)  # fmt: skip
datasets = st.lists(clip, min_size=1, max_size=40).map(
    lambda rows: ClipTable.from_columns(
        width=[r[0] for r in rows], height=[r[1] for r in rows], frames=[r[2] for r in rows],
        fps=[(24, 1)] * len(rows), is_image=[r[3] for r in rows],
    )
)  # fmt: skip


def samples_of(epoch: EpochPlan) -> Counter[tuple[int, ...]]:
    """(row, copy, epoch, frames, height, width) of all that the ranks train."""
    return Counter(
        (sample.row, sample.copy, sample.epoch, *vars(batch.shape).values())
        for rank in range(epoch.world_size)
        for step in epoch.micro_batches_for(rank)
        for batch in step
        for sample in batch.samples
    )


@pytest.mark.slow
@given(
    table=datasets,
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 9),
    tokens=st.sampled_from([None, 30_000]),
)
@settings(max_examples=60)
def test_every_clip_has_the_fixed_size_or_is_dropped_for_being_too_small(
    plain: FamilySpec, table: ClipTable, size: tuple[int, int], ranks: int, seed: int, tokens: int | None
) -> None:
    height, width = size[0] * 16, size[1] * 16
    chosen = options(fix_sample_size=(height, width), world_size=ranks, seed=seed, tokens_per_batch=tokens)
    clips = prepare(plain, plain.model.dims, table, chosen)
    fits = (height <= table.height * MOST_ENLARGED) & (width <= table.width * MOST_ENLARGED)
    small = clips.reason == list(REASONS).index("too-small")
    assert not (clips.used & ~fits).any()
    assert not (small & fits).any()
    drawn = draw_epoch(clips, 0)
    assert set(zip(drawn.height.tolist(), drawn.width.tolist(), strict=True)) <= {(height, width)}
    assert set(drawn.clip.tolist()) == set(np.flatnonzero(clips.reason == USED).tolist())
    if clips.used.any():
        epoch = plan_epoch(plain, plain.model.dims, table, chosen, 0)
        assert {key[4:] for key in samples_of(epoch)} <= {(height, width)}


@given(table=datasets, seed=st.integers(0, 2**40), mode=st.sampled_from([{}, TOKENS]), repeat=st.integers(1, 3))
@settings(max_examples=60)
def test_a_drawn_aspect_never_enlarges_a_clip_too_much_and_loses_none(
    plain: FamilySpec, table: ClipTable, seed: int, mode: dict[str, Any], repeat: int
) -> None:
    chosen = options(random_ratio_crop=True, seed=seed, video_repeat=repeat, **mode)
    clips = prepare(plain, plain.model.dims, table, chosen)
    bases = [size.base for sizes in clips.sets if sizes is not None for size in sizes.sizes]
    buckets = {
        bucket(aspect, base, plain) for aspect, (key, _, _) in enumerate(ASPECTS) if key in CROPS for base in bases
    }
    drawn = draw_epoch(clips, 3)
    assert (drawn.height <= table.height[drawn.clip] * MOST_ENLARGED).all()
    assert (drawn.width <= table.width[drawn.clip] * MOST_ENLARGED).all()
    assert set(zip(drawn.height.tolist(), drawn.width.tolist(), strict=True)) <= buckets
    times = np.where(table.is_image, 1, repeat)
    assert Counter(drawn.clip.tolist()) == {int(i): int(times[i]) for i in np.flatnonzero(clips.used)}
    # what is too small is so at every aspect that could be drawn
    for row, reason, _ in dropped(clips):
        if reason == "too-small":
            sizes = clips.sets[int(table.is_image[row])]
            assert sizes is not None
            sides = [bucket(a, sizes.sizes[0].base, plain) for a, (key, _, _) in enumerate(ASPECTS) if key in CROPS]
            assert all(h > table.height[row] * MOST_ENLARGED or w > table.width[row] * MOST_ENLARGED for h, w in sides)


def test_aspects_are_drawn_as_often_as_the_original_scripts_draw_them(plain: FamilySpec) -> None:
    num = 62_000
    table = ClipTable.from_columns(
        width=[1920] * num, height=[1080] * num, frames=[60] * num, fps=[(24, 1)] * num, is_image=[False] * num
    )
    clips = prepare(plain, plain.model.dims, table, options(random_ratio_crop=True))
    drawn = draw_epoch(clips, 0)
    found = Counter(zip(drawn.height.tolist(), drawn.width.tolist(), strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    for aspect, (key, _, _) in enumerate(ASPECTS):
        expected[bucket(aspect, Fraction(512), plain)] += 1000 * CROPS.get(key, 0)
    assert sum(expected.values()) == num
    assert found.keys() == {size for size, count in expected.items() if count}
    assert all(abs(found[size] - count) < 5 * count**0.5 for size, count in expected.items() if count)
    again, other = draw_epoch(clips, 0), draw_epoch(clips, 1)
    assert (again.height == drawn.height).all()
    assert (other.height != drawn.height).any()


def test_the_draw_of_an_aspect_depends_neither_on_ranks_nor_on_what_else_is_in_the_table(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    table, chosen = mixed(300), options(random_ratio_crop=True, **TOKENS)
    whole = draw_epoch(prepare(plain, plain.model.dims, table, chosen), 2)
    few = ClipTable(**{name: column[100:200] for name, column in vars(table).items()})
    part = draw_epoch(prepare(plain, plain.model.dims, few, replace(chosen, world_size=8)), 2)
    rows = {row: place for place, row in enumerate(table.row[whole.clip].tolist())}
    places = np.array([rows[row] for row in few.row[part.clip].tolist()])
    for column in ("frames", "height", "width"):
        assert (getattr(part, column) == getattr(whole, column)[places]).all()
    shapes = [samples_of(plan_epoch(plain, plain.model.dims, table, replace(chosen, world_size=n), 0)) for n in (1, 2)]
    assert len(shapes[0] & shapes[1]) > 0.9 * len(table)


def test_sizes_and_lengths_are_drawn_as_they_are_without_the_crop(
    plain: FamilySpec, mixed: Callable[..., ClipTable]
) -> None:
    table = mixed(200)
    square = ClipTable(**{**vars(table), "height": np.full(200, 4000), "width": np.full(200, 4000)})
    plans = [
        draw_epoch(prepare(plain, plain.model.dims, square, options(random_ratio_crop=crop, **TOKENS)), 1)
        for crop in (False, True)
    ]
    assert (plans[0].frames == plans[1].frames).all()
    assert (plans[0].height != plans[1].height).any()


@pytest.mark.parametrize("with_clips", [False, True])
@pytest.mark.parametrize("choice", [{"fix_sample_size": (480, 832)}, {"random_ratio_crop": True}])
def test_a_plan_shows_what_was_chosen(
    plain: FamilySpec, mixed: Callable[..., ClipTable], choice: dict[str, Any], with_clips: bool
) -> None:
    table = mixed(200) if with_clips else ClipTable.empty()
    plan = RunPlan(spec=plain, dims=plain.model.dims, options=options(**choice), table=table, num_epochs=1)
    epochs = [plan.first_epoch] if with_clips else []
    console = Console(width=120, record=True, file=StringIO())
    console.print(preview(plan, epochs))
    shown = console.export_text()
    told = plan_json(plan, epochs)
    heaviest = batches(plan, epochs[0] if epochs else None).heaviest
    if "fix_sample_size" in choice:
        assert "every clip 480x832, up to 49 frames" in shown
        assert "480x832 image" in shown
        assert (heaviest.height, heaviest.width) == (480, 832)
        assert {tuple(size["latents"][1:]) for size in told["sizes"] + told["image_sizes"]} == {(60, 104)}
        assert all((b["height"], b["width"]) == (480, 832) for b in told.get("buckets", ()))
    else:
        assert "one size, up to 49 frames, cropped to random aspects" in shown
    if with_clips:
        assert largest_micro_batch(plan) >= 3 * heaviest.frames * heaviest.height * heaviest.width
        row = int(epochs[0].row[0])
        words = "\n".join(why_lines(why(plan, row, epochs)))
        assert ("cropped to one of 0.42, 0.5" in words) == ("random_ratio_crop" in choice)
        assert ("bucket 480x832" in words) == ("fix_sample_size" in choice)


def test_a_clip_of_no_possible_aspect_says_how_far_it_is_from_the_nearest(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[300], height=[200], frames=[60], fps=[(24, 1)], is_image=[False])
    clips = prepare(plain, plain.model.dims, table, options(random_ratio_crop=True))
    ((_, reason, words),) = dropped(clips)
    assert reason == "too-small"
    assert words == "300x200 would be enlarged 2.08 times for the smallest bucket, 608x416"
    with pytest.raises(MetadataError):
        plan_epoch(plain, plain.model.dims, table, options(random_ratio_crop=True), 0)


@pytest.mark.parametrize("typed", ["480,832", ["480", "832"], [480, 832], ["480,832"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_size_silently_ends_the_familys_own_range_of_sizes(family: str, typed: Any) -> None:
    spec = FAMILIES[family]
    before = resolve("train", spec, {}, environ={}).config
    assert before.random_hw_adapt
    resolved = resolve("train", spec, {"fix_sample_size": typed}, environ={})
    chosen = plan_options(resolved.config)
    assert chosen.fix_sample_size == (480, 832)
    assert not (chosen.random_hw_adapt or chosen.training_with_video_token_length)
    assert resolved.sources["random_hw_adapt"] == "fix_sample_size"


@pytest.mark.parametrize(
    ("given_options", "said"),
    [
        ({"fix_sample_size": [480]}, "takes a height and a width"),
        ({"fix_sample_size": [480, 832, 16]}, "takes a height and a width"),
        ({"fix_sample_size": [480, 830]}, "nearest is --fix-sample-size 480 832"),
        ({"fix_sample_size": [3, 832]}, "nearest is --fix-sample-size 16 832"),
        ({"fix_sample_size": "480,wide"}, "takes a whole number"),
        ({"fix_sample_size": [0, 832]}, "the least that makes sense is 1"),
        ({"fix_sample_size": [480, 832], "random_ratio_crop": True}, "random_ratio_crop gives it several"),
        ({"fix_sample_size": [480, 832], "enable_bucket": False}, "cropped to a square"),
        ({"random_ratio_crop": True, "enable_bucket": False}, "cropped to a square"),
    ],
)
def test_what_contradicts_a_chosen_size_is_refused(given_options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("train", FAMILIES["wan-fun-control"], given_options, environ={})
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_a_fixed_size_turns_off_what_chooses_sizes_and_says_so_where_that_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported = {"VFUN_RANDOM_HW_ADAPT": "true", "VFUN_FIX_SAMPLE_SIZE": "480,832"}
    config = resolve("train", FAMILIES["wan-fun-control"], {}, environ=exported).config
    assert not config.random_hw_adapt and not config.training_with_video_token_length
    assert "no effect of random_hw_adapt" in " ".join(capsys.readouterr().err.split())
