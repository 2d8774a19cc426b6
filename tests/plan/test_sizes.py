"""Sizes and lengths: the published examples, and the rules behind them."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.report import size_table
from vfun_cli.plan.sizes import (
    ASPECTS,
    bases,
    bucket,
    check_options,
    frames_at,
    nearest_aspect,
    round_frames,
    size_set,
)

TOKEN_LENGTH: dict[str, Any] = {"random_hw_adapt": True, "training_with_video_token_length": True}


def options(**values: Any) -> PlanOptions:
    start: dict[str, Any] = {
        "video_sample_size": 512, "token_sample_size": 512, "video_sample_n_frames": 49, "video_sample_stride": 1,
    }  # fmt: skip
    return PlanOptions(**{**start, **values})


def table(spec: FamilySpec, chosen: PlanOptions) -> dict[int, tuple[int, int]]:
    return {
        row.size: (row.frames, row.tokens) for row in size_table(chosen, spec, spec.model.dims) if row.kind == "video"
    }


def test_documents_token_length_example_of_the_speech_family() -> None:
    chosen = options(video_sample_size=768, token_sample_size=512, **TOKEN_LENGTH)
    spec = FAMILIES["wan-s2v"]
    rows = table(spec, chosen)
    assert list(rows) == [256, 384, 512, 640, 768]
    assert (rows[256][0], rows[512][0], rows[768][0]) == (49, 49, 21)
    assert rows[512][1] == 13312
    own = {row.size: row.clip_frames for row in size_table(chosen, spec, spec.model.dims)}
    assert own == {256: 48, 384: 48, 512: 48, 640: 28, 768: 20}


@pytest.mark.parametrize("family", ["plain", "speech"])
def test_documents_frames_at_larger_sizes_stay_within_the_budget(family: str, request: pytest.FixtureRequest) -> None:
    spec = request.getfixturevalue(family)
    chosen = options(video_sample_size=256, image_sample_size=1024, **TOKEN_LENGTH)
    rows = table(spec, chosen)
    assert {size: rows[size][0] for size in (512, 768, 1024)} == {512: 49, 768: 21, 1024: 9}
    assert rows[512][1] == 13312
    assert all(frames * size**2 <= 49 * 512**2 for size, (frames, _) in rows.items() if size >= 512)


@pytest.mark.parametrize("video, image", [(256, 1024), (1024, 256)])
@pytest.mark.parametrize("token, last", [(1024, 49), (512, 9)])
def test_both_orders_of_the_two_sizes_give_the_documents_range(
    plain: FamilySpec, video: int, image: int, token: int, last: int
) -> None:
    chosen = options(video_sample_size=video, image_sample_size=image, token_sample_size=token, **TOKEN_LENGTH)
    rows = table(plain, chosen)
    assert list(rows) == [256, 384, 512, 640, 768, 896, 1024]
    assert (rows[256][0], rows[1024][0]) == (49, last)
    images = [row for row in size_table(chosen, plain, plain.model.dims) if row.kind == "image"]
    assert [(row.size, row.frames) for row in images] == [(size, 1) for size in (256, 512, 682, 819, 1024)]


def test_the_high_end_belongs_to_the_range_even_off_the_grid(speech: FamilySpec) -> None:
    assert bases("video", options(video_sample_size=700, **TOKEN_LENGTH), speech) == [256, 384, 512, 640, 700]
    assert bases("video", options(video_sample_size=96, **TOKEN_LENGTH), speech) == [96]


@pytest.mark.parametrize(
    "video, image, videos, images",
    [
        (1024, 1024, (512, 1024), (512, 1024)),
        (256, 1024, (256, 256), (256, 1024)),
        (1024, 256, (256, 256), (256, 1024)),
        (768, None, (512, 768), (512, 768)),
    ],
)
def test_documents_examples_of_random_hw_adapt_alone(
    plain: FamilySpec, video: int, image: int | None, videos: tuple[int, int], images: tuple[int, int]
) -> None:
    chosen = options(video_sample_size=video, image_sample_size=image, random_hw_adapt=True)
    for kind, ends in (("video", videos), ("image", images)):
        found = bases(kind, chosen, plain)
        assert [found[0], found[-1]] == list(ends)
    assert {size.frames for size in size_set("video", chosen, plain, plain.model.dims).sizes} == {49}


def test_without_adaptation_each_kind_has_its_own_size(plain: FamilySpec) -> None:
    chosen = options(video_sample_size=384, image_sample_size=640)
    assert bases("video", chosen, plain) == [384]
    assert bases("image", chosen, plain) == [640]


def test_eighty_frames_are_kept_where_the_command_line_asks_for_eighty(speech: FamilySpec) -> None:
    chosen = options(video_sample_n_frames=80, token_sample_size=640)
    own = [frames_at(size, chosen, speech, speech.model.dims) for size in (256, 640, 768, 896, 1024)]
    assert own == [80, 80, 52, 40, 28]


def test_frames_are_rounded_down_never_up(plain: FamilySpec) -> None:
    assert [round_frames(n, plain, plain.model.dims) for n in (0, 1, 4, 5, 48, 49, 80, 81)] == [
        0,
        1,
        1,
        5,
        45,
        49,
        77,
        81,
    ]


def test_a_family_may_shorten_clips_further(plain: FamilySpec) -> None:
    def even_latents(frames: int, dims: ModelDims) -> int:
        return frames - 4 if ((frames - 1) // 4 + 1) % 2 and frames > 1 else frames

    spec = replace(plain, plan=replace(plain.plan, adjust_frames=even_latents))
    chosen = options(video_sample_size=512, image_sample_size=1024, **TOKEN_LENGTH)
    assert [frames for frames, _ in table(spec, chosen).values()] == [45, 29, 21, 13, 5]


def test_buckets_scale_the_aspect_table_and_floor_to_whole_tokens(plain: FamilySpec) -> None:
    expected = {(0.57, 640): (480, 832), (1.75, 896): (1168, 672), (0.25, 256): (128, 512), (0.94, 640): (592, 640)}
    place = {key: index for index, (key, _, _) in enumerate(ASPECTS)}
    for (key, base), sides in expected.items():
        assert bucket(place[key], Fraction(base), plain) == sides
    assert bucket(place[0.57], Fraction(1024) / Fraction(3, 2), plain)[0] == 512  # exactly; 682 would give 496
    assert len(ASPECTS) == 40


@pytest.mark.parametrize(
    ("vae_stride", "patch_size", "grid"),
    [((4, 8, 8), (1, 2, 2), (16, 16)), ((4, 16, 16), (1, 2, 2), (32, 32)), ((4, 8, 16), (1, 2, 4), (16, 64))],
)
def test_every_bucket_is_made_of_whole_tokens_along_both_sides(
    plain: FamilySpec, vae_stride: tuple[int, int, int], patch_size: tuple[int, int, int], grid: tuple[int, int]
) -> None:
    spec = replace(plain, plan=replace(plain.plan, vae_stride=vae_stride, patch_size=patch_size))
    chosen = options(video_sample_size=256, image_sample_size=1000, **TOKEN_LENGTH)
    for kind in ("video", "image"):
        found = size_set(kind, chosen, spec, spec.model.dims)
        assert found.heights.shape == (40, len(found.sizes))
        assert not (found.heights % grid[0]).any() and not (found.widths % grid[1]).any()
        assert found.heights.min() >= grid[0] and found.widths.min() >= grid[1]


def test_nearest_aspect_is_the_key_with_the_smallest_difference() -> None:
    keys = [Fraction(str(key)) for key, _, _ in ASPECTS]
    rng = np.random.default_rng(1)
    height, width = rng.integers(16, 3000, 500), rng.integers(16, 3000, 500)
    height[0], width[0] = 109, 200  # 0.545, half-way between 0.52 and 0.57
    ratios = [Fraction(h, w) for h, w in zip(height.tolist(), width.tolist(), strict=True)]
    nearest = [min(range(40), key=lambda i: (abs(keys[i] - ratio), i)) for ratio in ratios]
    assert nearest_aspect(height, width).tolist() == nearest


def test_probabilities_favour_what_the_family_says(plain: FamilySpec) -> None:
    chosen = options(video_sample_size=256, image_sample_size=1024, **TOKEN_LENGTH)
    alike = size_set("video", chosen, plain, plain.model.dims).cumulative
    assert np.allclose(np.diff(alike[4, :4], prepend=0), 0.25)
    spec = replace(plain, plan=replace(plain.plan, token_size_share=0.5))
    half = size_set("video", chosen, spec, spec.model.dims).cumulative
    assert np.allclose(np.diff(half[7], prepend=0)[2], 0.5)  # 512
    assert np.allclose(np.diff(half[2, :2], prepend=0), [0.5, 0.5])
    full = size_set("video", options(video_sample_size=1024, random_hw_adapt=True), plain, plain.model.dims).cumulative
    assert np.allclose(np.diff(full[4], prepend=0), [0.25 / 3, 0.25 / 3, 0.25 / 3, 0.75])


@pytest.mark.parametrize(
    ("video", "chances"),
    [
        (256, {256: 0.0625, 512: 0.0625, 682: 0.0625, 819: 0.0625, 1024: 0.75}),
        (512, {512: 0.125, 682: 0.0625, 819: 0.0625, 1024: 0.75}),
        (1024, {512: 0.0625, 682: 0.0625, 819: 0.0625, 1024: 0.8125}),
    ],
)
def test_an_image_size_that_the_originals_list_twice_is_twice_as_likely(
    plain: FamilySpec, video: int, chances: dict[int, float]
) -> None:
    """1, 1.25, 1.5 and 2, then image / video."""
    found = size_set(
        "image", options(video_sample_size=video, image_sample_size=1024, random_hw_adapt=True), plain, plain.model.dims
    )
    drawn = np.diff(found.cumulative[-1], prepend=0)
    assert {int(size.base): pytest.approx(chance) for size, chance in zip(found.sizes, drawn, strict=True)} == chances


def test_images_shrink_by_the_same_divisors_whether_or_not_token_lengths_shorten_videos(plain: FamilySpec) -> None:
    both = options(video_sample_size=256, image_sample_size=1024, **TOKEN_LENGTH)
    alone = replace(both, training_with_video_token_length=False)
    length = replace(both, random_hw_adapt=False)
    expected = size_set("image", both, plain, plain.model.dims)
    assert expected.sizes[0].base == 256 and expected.sizes[-1].base == 1024
    assert np.allclose(np.diff(expected.cumulative[5], prepend=0), [0.0625] * 4 + [0.75])
    for chosen in (alone, length):
        found = size_set("image", chosen, plain, plain.model.dims)
        assert found.sizes == expected.sizes and np.array_equal(found.cumulative, expected.cumulative)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"video_sample_size": 8}, "video-sample-size"),
        ({"video_sample_n_frames": 4}, "video-sample-n-frames"),
        ({"token_sample_size": 64, **TOKEN_LENGTH}, "token-sample-size"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_way_out(
    plain: FamilySpec, wrong: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        check_options(options(**wrong), plain, plain.model.dims)
    assert caught.value.hint


def test_every_family_plans_with_its_own_defaults() -> None:
    assert FAMILIES
    for spec in FAMILIES.values():
        chosen = PlanOptions.pick(spec.defaults.train)
        check_options(chosen, spec, spec.model.dims)
        assert table(spec, chosen)
