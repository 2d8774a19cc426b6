"""Rows and options become videos whose settings the family can make and whose media are there, or are all refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.jobs import vfun_here
from tests.metadata.small_media import encode_video, write_sound
from vfun_cli import families
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.families.cogvideox_fun import read_dims as cogvideox_dims
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.modeling.inputs import AudioSegment, ImageFrame, VideoFrames, load_inputs
from vfun_cli.sampling.requests import request_of
from vfun_cli.sampling.rows import Video, Videos, settings_json, videos_of_options, videos_of_rows
from vfun_cli.sampling.settings import Wanted
from vfun_cli.sampling.source import Source

S2V, FUN, T2V, I2V, V5_1, V5, COG = families.FAMILIES.values()
V1_1 = replace(FUN.model.dims, extra={**FUN.model.dims.extra, "reference": 1})
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 33, "num_layers": 1}

TEXT_ALONE = cogvideox_dims({**CONFIG, "in_channels": 16})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 2 s at 24 fps with control and sound, and pictures."""
    folder = tmp_path_factory.mktemp("data")
    encode_video(folder / "clip.mp4", frames=48, width=96, height=48)
    encode_video(folder / "control.mp4", frames=48, width=96, height=48)
    encode_video(folder / "short.mp4", frames=47, width=96, height=48)
    write_sound(folder / "sound.wav", seconds=2.0)
    Image.fromarray(np.zeros((90, 60, 3), np.uint8)).save(folder / "tall.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "square.png")
    return folder


def rows(data: Path, spec: FamilySpec, given: Any, dims: ModelDims | None = None, **wanted: Any) -> Videos:
    path = data / "rows.json"
    path.write_text(json.dumps(given if isinstance(given, list) else [given]))
    return videos_of_rows(path, None, spec, dims or spec.model.dims, Wanted(**wanted))


def options(
    data: Path, spec: FamilySpec, dims: ModelDims | None = None, wanted: Mapping[str, Any] | None = None, **given: Any
) -> Videos:
    prompts = given.pop("prompt", ["a cat"])
    media = {name: [data / file for file in files] for name, files in given.items()}
    return videos_of_options(prompts, media, spec, dims or spec.model.dims, Wanted(**(wanted or {})))  # type: ignore[arg-type]


def only(found: Videos) -> Video:
    found.require_ok()
    (video,) = found.videos
    return video


def codes(found: Videos) -> list[tuple[int | None, str, str | None]]:
    return [(problem.row, problem.code, problem.field) for problem in found.problems]


@pytest.mark.parametrize("spec", families.FAMILIES.values(), ids=lambda spec: spec.name)
def test_the_released_settings_are_the_default_and_can_be_made(spec: FamilySpec, data: Path) -> None:
    media = {name: ["square.png"] for name in spec.sampling.required if name != "audio"}
    sound = {"audio": ["sound.wav"]} if "audio" in spec.sampling.required else {}
    text_alone = only(options(data, spec, **media, **sound))
    usual = spec.sampling
    assert (text_alone.steps, text_alone.guidance, text_alone.frames) == (usual.steps, usual.guidance, usual.frames)
    assert (text_alone.seed, text_alone.fps, text_alone.negative_prompt) == (43, usual.fps, usual.negative_prompt)
    if not media:
        assert (text_alone.height, text_alone.width) == usual.size
    demo = replace(spec, sampling=replace(usual, **usual.demo))
    small = only(options(data, demo, **media, **sound))
    assert small.steps == 4 and max(small.height, small.width) <= 96
    stated = {"frames": usual.frames, "height": usual.size[0], "width": usual.size[1]}
    assert only(options(data, spec, None, stated, **media, **sound)).frames == usual.frames


def test_a_row_of_a_data_set_gives_its_control_its_sound_and_its_first_frame(data: Path) -> None:
    row = {
        "file_path": "clip.mp4", "control_file_path": "control.mp4", "audio_path": "sound.wav", "text": "A ball.",
        "type": "video", "width": 96, "height": 48, "frames": 48, "fps": 24,
    }  # fmt: skip
    paths = {name: str(data / file) for name, file in (("image", "clip.mp4"), ("control", "control.mp4"))}
    made = only(rows(data, S2V, row))
    assert {name: media.path for name, media in made.media.items()} == paths | {"audio": str(data / "sound.wav")}
    assert made.prompt == "A ball." and made.seconds == 2
    assert {name: media.path for name, media in only(rows(data, FUN, row, frames=17)).media.items()} == paths
    assert only(rows(data, T2V, row)).media == {}
    assert set(only(rows(data, I2V, row)).media) == {"image"}
    assert set(only(rows(data, V5, row, frames=9)).media) == {"control"}


def test_the_sound_of_the_clip_stands_in_for_a_file_of_its_own(data: Path) -> None:
    row = {"file_path": "clip.mp4", "text": "", "type": "video"}
    assert codes(rows(data, S2V, row)) == [(0, "no-audio-stream", "audio")]


def test_a_clip_gives_its_aspect_at_the_usual_area_on_the_grid(data: Path) -> None:
    wide = only(rows(data, T2V, {"file_path": "clip.mp4", "text": "", "type": "video"}))
    assert (wide.height, wide.width) == (448, 896)  # 2:1 of 832 x 480
    tall = only(options(data, I2V, image=["tall.png"]))
    assert (tall.height, tall.width) == (768, 512)  # 774 x 516
    assert (only(options(data, I2V, None, {"height": 96}, image=["tall.png"])).width) == 64
    assert (only(options(data, I2V, None, {"width": 64}, image=["tall.png"])).height) == 96
    assert (only(options(data, T2V, None, {"height": 416})).width) == 240


@pytest.mark.parametrize(
    ("spec", "wanted", "said"),
    [
        (
            FUN,
            {"frames": 50},
            r"--frames: wan-fun-control makes videos of 4k\+1 frames, not of 50; the nearest is 49\.",
        ),
        (S2V, {"frames": 1}, r"makes videos of 4k frames, not of 1; the nearest is 4\."),
        (
            FUN,
            {"height": 484},
            r"--height: wan-fun-control makes multiples of 16 pixels, not 484; the nearest is 480\.",
        ),
        (S2V, {"width": 32}, r"multiples of 16 pixels, at least 64, not 32; the nearest is 64\."),
        (T2V, {"steps": 0}, "--steps: steps is 0; it takes a whole number from 1 to 1000"),
        (T2V, {"guidance": float("nan")}, "--guidance: guidance is nan; it takes a finite number"),
    ],
)
def test_what_a_family_cannot_make_is_refused_with_the_nearest(
    spec: FamilySpec, wanted: dict[str, Any], said: str, data: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        options(data, spec, None, wanted)
    assert {
        code for _, code, _ in codes(rows(data, T2V, [{"prompt": "", "frames": 2}, {"prompt": "", "width": 5}]))
    } == {"unusable-setting"}


def test_lengths_of_cogvideox_follow_the_model(data: Path) -> None:
    pairs = cogvideox_dims({**CONFIG, "patch_size_t": 2, "use_rotary_positional_embeddings": True})
    assert only(options(data, COG, pairs)).frames == 45  # 49 would be 13 latents
    with pytest.raises(ConfigError, match="not of 49; the nearest is 45"):
        options(data, COG, pairs, {"frames": 49})
    table = cogvideox_dims({**CONFIG, "sample_frames": 49})
    with pytest.raises(ConfigError, match="not of 81; the nearest is 49"):
        options(data, COG, table, {"frames": 81})
    short = cogvideox_dims({**CONFIG, "sample_frames": 9})
    with pytest.raises(ConfigError, match="has positions for 9 frames") as error:
        options(data, COG, short)
    assert "--frames" in (error.value.hint or "")


def test_the_control_clip_is_read_by_time(data: Path) -> None:
    wanted = {"frames": 17, "height": 64, "width": 64}
    video = only(options(data, V5_1, None, wanted | {"frames": 13}, control=["control.mp4"]))
    assert video.indices == tuple(range(0, 39, 3))  # 24 fps shown at 8
    video = only(options(data, FUN, None, wanted, control=["control.mp4"]))
    assert video.indices[:6] == (0, 1, 3, 4, 6, 7)  # 24 fps shown at 16
    pixels = load_inputs({"control": request_of(video).control})["control"]
    assert pixels.shape == (17, 3, 64, 64)


def test_a_control_clip_that_ends_too_early_is_refused_unless_black_follows_it(data: Path) -> None:
    found = options(data, FUN, None, {"frames": 49}, control=["control.mp4"])
    assert codes(found) == [(0, "control-too-short", "control")]
    assert "it lasts 2.00 s, 49 frames at 16 fps last 3.06 s; it is enough for 29 frames" in found.problems[0].message
    assert len(only(options(data, FUN, None, {"frames": 29}, control=["control.mp4"])).indices) == 29
    given = {"image": ["square.png"], "audio": ["sound.wav"], "control": ["control.mp4"]}
    assert len(only(options(data, S2V, **given)).indices) == 32  # all of its 2 s
    assert len(only(options(data, S2V, None, {"frames": 4}, **given)).indices) == 32  # the sound's 2 s
    indices = only(options(data, S2V, **given | {"control": ["short.mp4"]})).indices
    assert len(indices) == 32 and indices[-1] == 46  # its last one is still shown at 31 / 16 s


def test_one_frame_is_a_picture_with_a_picture_to_control_it(data: Path) -> None:
    one = only(options(data, FUN, None, {"frames": 1}, control=["square.png"]))
    assert one.indices == (0,)
    assert codes(options(data, FUN, control=["square.png"])) == [(0, "control-type", "control")]
    row = {"file_path": "square.png", "control_file_path": "square.png", "text": "", "type": "image"}
    still = only(rows(data, FUN, row))
    assert still.frames == 1 and set(still.media) == {"control"}  # of a video it would be the first frame
    assert set(only(rows(data, FUN, {"prompt": "", "image": "square.png"})).media) == {"image"}


def test_an_edited_clip_gives_frames_aspect_and_the_mask_white_where_it_changes(data: Path) -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[:, :32] = (255, 239, 255)
    Image.fromarray(picture).save(data / "mask.png")
    wanted = {"frames": 13, "steps": 10, "width": 64}
    video = only(options(data, COG, None, wanted, edit=["clip.mp4"], edit_mask=["mask.png"]))
    assert (video.indices, video.height) == (tuple(range(0, 39, 3)), 32)
    assert (video.strength, video.steps_made) == (1.0, 10)
    request = request_of(video)
    pixels = load_inputs({"edit": request.edit, "mask": request.edit_mask})
    assert pixels["edit"].shape == (13, 3, 32, 64) and pixels["mask"].shape == (13, 1, 32, 64)
    assert not pixels["mask"][..., :30].any() and pixels["mask"][..., 34:].all()
    whole = only(options(data, COG, None, wanted, edit=["clip.mp4"]))
    assert (whole.strength, whole.steps_made, request_of(whole).edit_mask) == (0.7, 7, None)
    assert only(options(data, COG, None, wanted | {"strength": 1}, edit=["clip.mp4"])).steps_made == 10
    row = {"file_path": "clip.mp4", "text": "", "type": "video", "edit": "clip.mp4"}
    assert set(only(rows(data, COG, row, frames=13)).media) == {"edit"}  # not the clip's first frame


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"edit_mask": "square.png"}, ("missing-field", "edit")),
        ({"edit": "clip.mp4", "image": "square.png"}, ("not-taken", "image")),
        ({"edit": "clip.mp4", "end_image": "square.png"}, ("not-taken", "end_image")),
        ({"edit": "clip.mp4", "edit_mask": "clip.mp4"}, ("wrong-type", "edit_mask")),
        ({"edit": "square.png"}, ("control-type", "edit")),
        ({"edit": "clip.mp4", "frames": 17}, ("control-too-short", "edit")),
        ({"edit": "clip.mp4", "strength": 0.01}, ("unusable-setting", "strength")),
        ({"edit": "clip.mp4", "strength": 1.5}, ("unusable-setting", "strength")),
        ({"start_from_ref": True}, ("unusable-setting", "start_from_ref")),
    ],
)
def test_an_edit_that_would_not_be_one_is_refused(given: dict[str, Any], found: tuple[str, str], data: Path) -> None:
    assert codes(rows(data, COG, {"prompt": "", "frames": 13, **given})) == [(0, *found)]


def test_a_start_from_the_reference_is_read_from_a_table_too(data: Path) -> None:
    table = data / "rows.csv"
    table.write_text("prompt,image,audio,start_from_ref\na,square.png,sound.wav,true\nb,square.png,sound.wav,false\n")
    found = videos_of_rows(table, None, S2V, S2V.model.dims, Wanted())
    found.require_ok()
    assert [request_of(video).start_from_ref for video in found.videos] == [True, False]
    with pytest.raises(ConfigError, match="--start-from-ref: hunyuanvideo-i2v always starts from an image"):
        options(data, I2V, None, {"start_from_ref": True}, image=["square.png"])
    with pytest.raises(ConfigError, match="--strength: hunyuanvideo-i2v edits no clip"):
        options(data, I2V, None, {"strength": 0.5}, image=["square.png"])


def test_options_are_given_once_for_all_or_once_for_each(data: Path) -> None:
    found = options(data, I2V, prompt=["a", "b"], image=["square.png"])
    assert [(video.row, video.prompt, set(video.media)) for video in found.videos] == [
        (0, "a", {"image"}), (1, "b", {"image"})
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--prompt is given 2 times, for 3 videos"):
        options(data, I2V, prompt=["a", "b"], image=["square.png"] * 3)


@pytest.mark.parametrize(
    ("spec", "dims", "given", "said", "hint"),
    [
        (T2V, None, {"image": ["square.png"]}, "--image: hunyuanvideo-t2v makes no video from it", "--prompt"),
        (S2V, None, {"image": ["square.png"]}, "no --audio is given", "--prompt, --image, --audio and, where wanted, "),
        (S2V, None, {"audio": ["sound.wav"]}, "no --image is given", "--control"),
        (FUN, None, {"reference": ["square.png"]}, "--reference: only V1.1 models", "--image, --control"),
        (V5, None, {"image": ["square.png"]}, "--image: this model has no channels", "--control"),
        (COG, TEXT_ALONE, {"image": ["square.png"]}, "is no InP model", "--prompt"),
        (COG, TEXT_ALONE, {"edit": ["clip.mp4"], "edit_mask": ["square.png"]}, "--edit-mask: this model", "--edit"),
        (I2V, None, {"prompt": [], "image": ["square.png"]}, "no --prompt is given", "--image"),
    ],
)
def test_an_input_that_the_model_does_not_take_or_lacks_is_said(
    spec: FamilySpec, dims: ModelDims | None, given: dict[str, Any], said: str, hint: str, data: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        options(data, spec, dims, **dict(given))
    assert hint in (error.value.hint or "")
    assert set(only(options(data, FUN, V1_1, reference=["square.png"])).media) == {"reference"}


def test_all_that_is_wrong_with_rows_is_told_at_once(data: Path) -> None:
    (data / "text.mp4").write_text("no film")
    found = rows(
        data, S2V,
        [
            {"prompt": "a", "image": "none.png", "audio": "sound.wav"},
            {"prompt": "b", "image": "square.png"},
            {"prompt": 5, "image": "square.png", "audio": "clip.mp4", "seed": -1},
            {"prompt": "c", "image": "square.png", "audio": "sound.wav"},
            {"prompt": "d", "image": 7, "audio": "sound.wav", "reference": "tall.png", "fps": "fast"},
            {"prompt": "e", "image": "text.mp4", "audio": "sound.wav", "height": 100},
            7,
        ],
    )  # fmt: skip
    assert sorted(codes(found), key=str) == sorted(
        [
            (0, "missing-file", "image"), (1, "missing-field", "audio"), (2, "no-audio-stream", "audio"),
            (2, "unusable-setting", "prompt"), (2, "unusable-setting", "seed"), (4, "wrong-type", "image"),
            (4, "not-taken", "reference"), (4, "unusable-setting", "fps"), (5, "unreadable-media", "image"),
            (5, "unusable-setting", "height"), (6, "malformed-row", None),
        ],
        key=str,
    )  # fmt: skip
    assert [video.prompt for video in found.videos] == ["c"]
    with pytest.raises(MetadataError, match="6 of 7 videos cannot be made") as error:
        found.require_ok()
    assert "row 0, image: missing-file: no such file" in error.value.message
    assert error.value.hint == "What to do: vfun validate-meta --explain missing-file"
    told = vfun_here("validate-meta", "--explain", "missing-file")
    assert told.code == 0 and "Correct the path" in told.out


def test_a_clip_that_is_not_there_is_told_whether_it_is_needed_or_not(data: Path) -> None:
    row = {"file_path": "none.mp4", "text": "", "type": "video"}
    assert codes(rows(data, T2V, row)) == [(0, "missing-file", "file_path")]
    assert codes(rows(data, I2V, row)) == [(0, "missing-file", "image")]
    assert codes(videos_of_rows(data / "none.json", None, T2V, T2V.model.dims, Wanted())) == [
        (None, "unreadable-metadata", None)
    ]


def test_rows_may_be_a_table_with_other_names(data: Path) -> None:
    path = data / "rows.csv"
    path.write_text("prompt,image_path,seed,guidance,frames\na,square.png,7,2.5,\nb,tall.png,,,9\n")
    first, second = videos_of_rows(path, None, COG, COG.model.dims, Wanted()).videos
    assert (first.seed, first.guidance, first.frames) == (7, 2.5, 49)
    assert (second.seed, second.guidance, second.frames) == (43, 6.0, 9)
    assert [Path(each.media["image"].path).name for each in (first, second)] == ["square.png", "tall.png"]


@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_written_beside_a_video_makes_it_again(indent: int | None, data: Path, tmp_path: Path) -> None:
    row = {
        "file_path": "clip.mp4", "control_file_path": "control.mp4", "audio_path": "sound.wav", "text": "Ein Bär.",
        "type": "video", "steps": 7, "negative_prompt": "", "seed": 11,
    }  # fmt: skip
    made = rows(data, S2V, [{"prompt": "", "image": "tall.png", "audio": "sound.wav"}, row], frames=8).videos[1]
    source = Source(path=Path("checkpoint-3"), spec=S2V, model=Path("model"))
    beside = tmp_path / "0001.json"
    beside.write_text(json.dumps(settings_json(made, source), indent=indent, ensure_ascii=False), encoding="utf-8")
    again = only(videos_of_rows(beside, None, S2V, S2V.model.dims, Wanted()))
    assert again == made and (again.row, again.seed, again.steps, again.fps) == (1, 11, 7, 16)
    assert only(videos_of_rows(beside, None, S2V, S2V.model.dims, Wanted(seed=3))) == replace(made, seed=3)
    stated = settings_json(made, source)
    assert stated["fps"] == "16" and stated["weights"] == "trained" and stated["source"].endswith("/checkpoint-3")


def test_a_request_has_its_media_unread_and_of_its_size(data: Path) -> None:
    given = {"image": ["tall.png"], "audio": ["sound.wav"], "control": ["control.mp4"]}
    request = request_of(only(options(data, S2V, None, {"height": 128, "width": 64, "seed": 5}, **given)))
    assert isinstance(request.image, ImageFrame) and isinstance(request.control, VideoFrames)
    assert isinstance(request.audio, AudioSegment)
    assert request.fps == Fraction(16) and request.seconds == 2 and request.key.seed == 5
    loaded = load_inputs({"image": request.image, "control": request.control, "audio": request.audio})
    assert loaded["image"].shape == (1, 3, 128, 64) and loaded["control"].shape == (32, 3, 128, 64)
    assert loaded["audio"].shape == (32_000,)
    second = options(data, I2V, prompt=["a", "b"], image=["clip.mp4"]).videos[1]
    first, key = request_of(second).image, request_of(second).key
    assert (key.seed, key.row) == (43, 1)
    assert isinstance(first, VideoFrames) and first.indices == (0,)


def test_of_several_captions_a_row_gives_the_first_as_its_prompt(data: Path) -> None:
    assert only(rows(data, T2V, {"text": ["a cat", "a grey cat sits"]})).prompt == "a cat"
    assert only(rows(data, T2V, {"prompt": ["a cat", "a dog"], "text": "a bird"})).prompt == "a cat"
    for wrong in ([], [7]):
        assert codes(rows(data, T2V, {"text": wrong})) == [(0, "unusable-setting", "prompt")]
