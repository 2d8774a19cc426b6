"""The examples of the five training documents, for each of their families and in both orders of the two sizes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vfun_cli.families import FAMILIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.report import SizeRow, size_table
from vfun_cli.plan.schedule import plan_epoch
from vfun_cli.plan.sizes import size_set

SPEECH = "wan-s2v"
OTHERS = (
    "wan-fun-control",
    "hunyuanvideo-t2v",
    "hunyuanvideo-i2v",
    "easyanimate-v5.1-control",
    "easyanimate-v5-control",
    "cogvideox-fun",
)
DOCUMENTED = (SPEECH, *OTHERS)
BOTH_ORDERS = pytest.mark.parametrize("order", [1, -1], ids=["as-printed", "swapped"])

SHARES: dict[str, tuple[float, float | None]] = {SPEECH: (0.9, None), "wan-fun-control": (0.9, 0.5)}
"""Share of the full size with random_hw_adapt alone, of the token size in token-length mode; others: (0.75, None)."""


def chosen(spec: FamilySpec, **values: Any) -> PlanOptions:
    """The family's documented command line with other sizes; 49 frames as in all examples."""
    return PlanOptions.pick({**spec.defaults.train, "video_sample_n_frames": 49, **values})


def table(spec: FamilySpec, kind: str = "video", **values: Any) -> dict[int, SizeRow]:
    return {row.size: row for row in size_table(chosen(spec, **values), spec, spec.model.dims) if row.kind == kind}


def sizes(order: int, video: int, image: int) -> dict[str, int]:
    first, second = (video, image)[::order]
    return {"video_sample_size": first, "image_sample_size": second}


def test_speech_token_length_example() -> None:
    """token 512, size 768: 256x256x49, 512x512x49, 768x768x21."""
    found = table(FAMILIES[SPEECH], video_sample_size=768, token_sample_size=512)
    assert {size: found[size].frames for size in (256, 512, 768)} == {256: 49, 512: 49, 768: 21}
    assert max(found) == 768 and min(found) == 256


def test_speech_adaptation_example() -> None:
    """random_hw_adapt with size 768: 512x512x49, 768x768x49."""
    found = table(FAMILIES[SPEECH], video_sample_size=768, training_with_video_token_length=False)
    assert min(found) == 512 and max(found) == 768 and {row.frames for row in found.values()} == {49}


@BOTH_ORDERS
@pytest.mark.parametrize("family", OTHERS)
def test_token_length_examples(family: str, order: int) -> None:
    """256 and 1024: images of 256 to 1024; videos of 49 frames at 256, and at 1024 of 49 (token 1024) or 9 (512)."""
    spec = FAMILIES[family]
    for token, last in ((1024, 49), (512, 9)):
        found = table(spec, **sizes(order, 256, 1024), token_sample_size=token)
        assert min(found) == 256 and max(found) == 1024
        assert (found[256].frames, found[1024].frames) == (49, last)
        images = table(spec, "image", **sizes(order, 256, 1024), token_sample_size=token)
        if "image" in spec.media_types:
            assert min(images) == 256 and max(images) == 1024
        else:
            assert images == {}


@pytest.mark.parametrize("family", DOCUMENTED)
def test_token_lengths_of_512_768_and_1024(family: str) -> None:
    """512x512x49 is 13,312 tokens; the same budget holds 21 frames at 768 and 9 at 1024."""
    found = table(FAMILIES[family], **sizes(1, 256, 1024) if family != SPEECH else {"video_sample_size": 1024},
                  token_sample_size=512)  # fmt: skip
    assert found[512].tokens == 13312
    assert {size: found[size].frames for size in (512, 768, 1024)} == {512: 49, 768: 21, 1024: 9}
    assert all(row.frames * size**2 <= 49 * 512**2 for size, row in found.items() if size >= 512)


@BOTH_ORDERS
@pytest.mark.parametrize("family", OTHERS)
def test_adaptation_examples(family: str, order: int) -> None:
    """Without token lengths. 1024 and 1024: all of 512 to 1024. 256 and 1024: images 256 to 1024, videos 256."""
    spec = FAMILIES[family]
    alone = {"training_with_video_token_length": False, "random_hw_adapt": True}
    expected = {(1024, 1024): ((512, 1024), (512, 1024)), (256, 1024): ((256, 256), (256, 1024))}
    for (video, image), (videos, images) in expected.items():
        found = table(spec, **sizes(order, video, image), **alone)
        assert (min(found), max(found)) == videos
        assert {row.frames for row in found.values()} == {49}
        if "image" in spec.media_types:
            found = table(spec, "image", **sizes(order, video, image), **alone)
            assert (min(found), max(found)) == images


@pytest.mark.parametrize("family", OTHERS)
def test_one_fixed_size_everywhere_is_what_the_documents_recommend_to_beginners(family: str) -> None:
    for size in (320, 480, 512, 640, 960):
        found = table(FAMILIES[family], **sizes(1, size, size), token_sample_size=size)
        assert [(row.size, row.frames) for row in found.values()] == [(size, 49)]


@pytest.mark.parametrize("family", DOCUMENTED)
def test_the_chances_of_sizes_are_those_of_the_original_scripts(family: str) -> None:
    spec = FAMILIES[family]
    full, token = SHARES.get(family, (0.75, None))
    alone = chosen(spec, **sizes(1, 1024, 1024), random_hw_adapt=True, training_with_video_token_length=False)
    drawn = np.diff(size_set("video", alone, spec, spec.model.dims).cumulative[-1], prepend=0)
    assert drawn[-1] == pytest.approx(full) and np.allclose(drawn[:-1], (1 - full) / (len(drawn) - 1))
    if "image" in spec.media_types:
        images = chosen(spec, **sizes(1, 256, 1024))
        drawn = np.diff(size_set("image", images, spec, spec.model.dims).cumulative[-1], prepend=0)
        assert drawn[-1] == pytest.approx(full) and np.allclose(drawn[:-1], (1 - full) / 4)
    by_token = chosen(spec, **sizes(1, 256, 1024), token_sample_size=512, training_with_video_token_length=True)
    found = size_set("video", by_token, spec, spec.model.dims)
    drawn = np.diff(found.cumulative[-1], prepend=0)
    place = [int(size.base) for size in found.sizes].index(512)
    assert drawn[place] == pytest.approx(token or 1 / len(drawn))


@pytest.mark.parametrize("crop", [True, False], ids=["random_frame_crop", "short-clips"])
def test_paired_latents_of_cogvideox_v15_stay_paired_however_a_clip_is_shortened(crop: bool) -> None:
    spec = FAMILIES["cogvideox-fun"]
    paired = replace(spec.model.dims, extra={**spec.model.dims.extra, "patch_frames": 2, "most_frames": 0})
    lengths = [200] * 2000 if crop else list(range(15, 215))
    table = ClipTable.from_columns(width=[512] * len(lengths), height=[512] * len(lengths), frames=lengths, fps=(25, 1))
    frames = set(plan_epoch(spec, paired, table, chosen(spec, random_frame_crop=crop), 0).frames.tolist())
    assert frames == {5, 13, 21, 29, 37, 45}


def test_paired_latents_of_cogvideox_v15_take_45_of_49_frames() -> None:
    spec = FAMILIES["cogvideox-fun"]
    paired = replace(spec.model.dims, extra={**spec.model.dims.extra, "patch_frames": 2, "most_frames": 0})
    options = chosen(spec, **sizes(1, 256, 1024), token_sample_size=512)
    found = {row.size: row.clip_frames for row in size_table(options, spec, paired) if row.kind == "video"}
    assert (found[512], found[768], found[1024]) == (45, 21, 5)
    assert all(((frames - 1) // 4 + 1) % 2 == 0 for frames in found.values())
