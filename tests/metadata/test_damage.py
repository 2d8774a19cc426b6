"""Every kind of damage is found, under its own code, and nothing else is."""

import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from small_media import ROW, SPEECH_FIELDS, encode_video, write_sound

from vfun_cli.metadata.checks import Report
from vfun_cli.metadata.codes import CODES, explain
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.report import totals

Row = dict[str, Any]
Damage = Callable[[Path, Row], Any]


def edit(**values: Any) -> Damage:
    """A row with other values; None removes the key."""

    def damage(root: Path, row: Row) -> Row:
        return {key: value for key, value in {**row, **values}.items() if value is not None}

    return damage


def on(name: str, action: Callable[[Path], Any]) -> Damage:
    """Damage to the file ``name``."""

    def damage(root: Path, row: Row) -> Row:
        action(root / name)
        return row

    return damage


def cut(share: float) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def text_file(path: Path) -> None:
    path.write_text("this is no film\n" * 100)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def front_loaded_and_cut(path: Path) -> None:
    """An mp4 with its index in front, its last frames missing: it opens, and plays until it breaks."""
    encode_video(path, options={"movflags": "faststart"})
    cut(0.6)(path)


def no_frames(path: Path) -> None:
    """A recording (Matroska, whatever its name) that stopped before its first frame was written."""
    film = encode_video(path.with_suffix(".mkv"))
    content = film.read_bytes()
    cluster = content.find(b"\x1f\x43\xb6\x75")
    path.write_bytes(content[: content.find(b"\xa3", cluster)])  # up to the first block of the first cluster


def late_sound(path: Path) -> None:
    """An mp4 in which the sound starts 0.2 s after the picture."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(24):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode())
        for start in range(3200, 17000, 1024):
            samples = np.sin(np.arange(start, start + 1024) * 0.2)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())


def with_late_sound(root: Path, row: Row) -> Row:
    late_sound(root / "wav/late.mp4")
    return {**row, "audio_path": "wav/late.mp4"}


def elsewhere(root: Path, row: Row) -> Row:
    shutil.copy(root / "train/1.mp4", root.parent / "outside.mp4")
    return {**row, "file_path": "../outside.mp4"}


DAMAGE: list[tuple[str, Damage]] = [
    ("missing-field", edit(audio_path=None)),
    ("missing-field", edit(file_path=None)),
    ("missing-field", edit(text=None, txet="A ball.")),
    ("missing-control", edit(control_file_path=None)),
    ("missing-type", edit(type=None)),
    ("wrong-type", edit(file_path=7)),
    ("wrong-type", edit(text=7)),
    ("wrong-type", edit(text=["a", 7])),
    ("wrong-type", edit(text=[])),
    ("wrong-type", edit(width="640")),
    ("wrong-type", edit(frames=-3)),
    ("wrong-type", edit(fps=0)),
    ("wrong-type", edit(type=1)),
    ("unknown-type", edit(type="movie")),
    ("empty-caption", edit(text="  ")),
    ("empty-caption", edit(text=["A ball.", ""])),
    ("garbled-caption", edit(text="A caf\ufffd.")),
    ("garbled-caption", edit(text=["A ball.", "A caf\ufffd."])),
    ("invalid-path", edit(audio_path="wav/\0.wav")),
    ("invalid-path", edit(audio_path="")),
    ("path-outside-root", elsewhere),
    ("missing-file", edit(file_path="train/9.mp4")),
    ("missing-file", edit(control_file_path="control/9.mp4")),
    ("missing-file", edit(audio_path="wav/9.wav")),
    ("not-a-file", edit(file_path="train")),
    ("not-a-file", on("train/1.mp4", pipe)),
    ("not-a-file", on("wav/1.wav", pipe)),
    ("empty-file", on("train/1.mp4", lambda path: path.write_bytes(b""))),
    ("unreadable-media", on("train/1.mp4", text_file)),
    ("unreadable-media", on("wav/1.wav", text_file)),
    ("unreadable-media", on("train/1.mp4", cut(0.5))),
    ("unsupported-picture", on("train/1.mp4", lambda path: Image.new("F", (64, 48)).save(path, "TIFF"))),
    ("truncated-media", on("train/1.mp4", front_loaded_and_cut)),
    ("truncated-media", on("wav/1.wav", cut(0.7))),
    ("no-video-stream", edit(file_path="wav/1.wav")),
    ("no-audio-stream", edit(audio_path="train/1.mp4")),
    ("no-frames", on("train/1.mp4", no_frames)),
    ("variable-frame-rate", on("train/1.mp4", lambda path: encode_video(
        path, times=[50 * i + 30 * (i % 4 == 1) for i in range(24)]))),
    ("non-square-pixels", on("train/1.mp4", lambda path: encode_video(path, aspect=Fraction(4, 3)))),
    ("extreme-aspect", on("train/1.mp4", lambda path: encode_video(path, width=320))),
    ("clip-too-short", on("train/1.mp4", lambda path: encode_video(path, frames=8))),
    ("wrong-size", edit(width=65, height=48)),
    ("wrong-frames", edit(frames=25)),
    ("wrong-fps", edit(fps=30)),
    ("image-as-video", edit(file_path="train/2.jpg")),
    ("control-type", edit(control_file_path="control/2.jpg")),
    ("control-is-video", edit(control_file_path="train/1.mp4")),
    ("control-too-short", on("control/1.mp4", lambda path: encode_video(path, frames=23))),
    ("control-aspect", on("control/1.mp4", lambda path: encode_video(path, width=48))),
    ("control-frame-rate", on("control/1.mp4", lambda path: encode_video(path, fps=25))),
    ("audio-too-short", on("wav/1.wav", lambda path: write_sound(path, seconds=0.95))),
    ("audio-longer", on("wav/1.wav", lambda path: write_sound(path, seconds=3))),
    ("audio-offset", with_late_sound),
    ("silent-audio", on("wav/1.wav", lambda path: write_sound(path, level=0.0))),
    ("many-channels", on("wav/1.wav", lambda path: write_sound(path, channels=6))),
    ("odd-sample-rate", on("wav/1.wav", lambda path: write_sound(path, rate=11025))),
]  # fmt: skip

ALONGSIDE = {
    "extreme-aspect": {"control-aspect"},
    "image-as-video": {"control-type"},
    "clip-too-short": {"audio-longer"},
    "truncated-media": {"audio-too-short"},
}
"""Codes that the same damage rightly causes too."""


def codes(report: Report) -> set[str]:
    return {problem.code for problem in report.problems}


@pytest.mark.parametrize(("code", "damage"), DAMAGE, ids=[f"{i}-{code}" for i, (code, _) in enumerate(DAMAGE)])
def test_damage_is_found_under_its_code_and_no_other(
    code: str, damage: Damage, data: Path, check: Callable[..., Report]
) -> None:
    report = check([damage(data, dict(ROW))])
    assert code in codes(report)
    assert codes(report) - {code} <= ALONGSIDE.get(code, set())
    assert report.ok == (CODES[code].severity != "error")
    assert all(problem.message and problem.row == 0 for problem in report.problems)


def test_a_clean_row_has_no_problem(check: Callable[..., Report]) -> None:
    report = check([ROW], deep=True)
    assert report.problems == ()
    assert (report.rows, report.ok) == (1, 1)


def test_a_clean_image_row_has_no_problem(check: Callable[..., Report]) -> None:
    fields = (SPEECH_FIELDS[0], MetadataField(name="control_file_path", media="control"))
    row = {"file_path": "train/2.jpg", "control_file_path": "control/2.jpg", "text": "A ball.", "type": "image"}
    assert check([row], fields=fields, media_types=("video", "image"), deep=True).problems == ()


def test_a_picture_with_alpha_is_noted_once_for_each_field_and_trains(data: Path, check: Callable[..., Report]) -> None:
    Image.new("RGBA", (64, 48)).save(data / "train/3.png")
    fields = (SPEECH_FIELDS[0], MetadataField(name="control_file_path", media="control"))
    row = {"file_path": "train/3.png", "control_file_path": "control/2.jpg", "text": "A ball.", "type": "image"}
    report = check(
        [row, {**row, "file_path": "train/2.jpg", "control_file_path": "train/3.png"}],
        fields=fields,
        media_types=("image",),
    )
    assert [(problem.row, problem.code, problem.field) for problem in report.problems] == [
        (0, "transparent-picture", "file_path"),
        (1, "transparent-picture", "control_file_path"),
    ]
    assert report.ok == 2


SOUND_OF_THE_VIDEO = (SPEECH_FIELDS[0], MetadataField(name="audio_path", media="audio", otherwise="file_path"))
MUTE = {"file_path": "train/1.mp4", "text": "A ball rolls.", "type": "video"}


def talking(path: Path, seconds: float = 1.0) -> Path:
    """The video with ``seconds`` of sound in it."""
    silent = path.rename(path.with_stem("silent"))
    with av.open(str(silent)) as given, av.open(str(path), "w", format="mov") as container:
        video = container.add_stream_from_template(given.streams.video[0])
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = video
                container.mux(packet)
        samples = (9000 * np.sin(np.arange(round(seconds * 16000)) * 0.2)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
    return path


def test_a_row_without_a_sound_of_its_own_uses_that_of_its_video(data: Path, check: Callable[..., Report]) -> None:
    talking(data / "train/1.mp4")
    assert check([MUTE, {**MUTE, "text": "b", "audio_path": None}], fields=SOUND_OF_THE_VIDEO, deep=True).ok == 2


def test_the_sound_of_a_video_is_checked_as_any_other(data: Path, check: Callable[..., Report]) -> None:
    talking(data / "train/1.mp4", seconds=0.9)
    (problem,) = check([MUTE], fields=SOUND_OF_THE_VIDEO).problems
    assert (problem.code, problem.field) == ("audio-too-short", "audio_path")


def test_a_row_without_sound_over_a_video_without_sound_says_both_ways_out(check: Callable[..., Report]) -> None:
    (problem,) = check([MUTE], fields=SOUND_OF_THE_VIDEO).problems
    assert (problem.code, problem.field) == ("missing-field", "audio_path")
    assert "name a file with sound, or use a video with sound" in problem.message


@pytest.mark.parametrize("damage", [edit(file_path="train/9.mp4"), edit(file_path=None), elsewhere,
    on("train/1.mp4", text_file), on("train/1.mp4", front_loaded_and_cut)])  # fmt: skip
def test_what_is_wrong_with_a_video_is_said_once(damage: Damage, data: Path, check: Callable[..., Report]) -> None:
    talking(data / "train/1.mp4")
    report = check([damage(data, dict(MUTE))], fields=SOUND_OF_THE_VIDEO)
    assert [problem.field for problem in report.problems] == ["file_path"]


def test_a_mistyped_key_is_not_taken_for_a_row_without_sound(data: Path, check: Callable[..., Report]) -> None:
    talking(data / "train/1.mp4")
    (problem,) = check([{**MUTE, "audio_pth": "wav/1.wav"}], fields=SOUND_OF_THE_VIDEO).errors
    assert problem.code == "missing-field" and "audio_pth" in problem.message


def test_a_truncated_picture_is_found(data: Path, check: Callable[..., Report]) -> None:
    cut(0.5)(data / "train/2.jpg")
    row = {"file_path": "train/2.jpg", "text": "A ball.", "type": "image"}
    assert codes(check([row], fields=SPEECH_FIELDS[:1], media_types=("video", "image"))) == {"truncated-media"}


def test_a_video_declared_as_image_is_found(check: Callable[..., Report]) -> None:
    row = {"file_path": "train/1.mp4", "text": "A ball.", "type": "image"}
    assert codes(check([row], fields=SPEECH_FIELDS[:1], media_types=("video", "image"))) == {"video-as-image"}


def test_a_type_that_the_family_does_not_train_is_found(check: Callable[..., Report]) -> None:
    row = {"file_path": "train/2.jpg", "text": "A ball.", "type": "image"}
    assert codes(check([row], fields=SPEECH_FIELDS[:1])) == {"unsupported-type"}


def test_duplicate_and_conflicting_rows_name_the_first_one(check: Callable[..., Report]) -> None:
    report = check([ROW, ROW, {**ROW, "text": "Another caption."}])
    found = [(problem.row, problem.code, problem.message) for problem in report.problems]
    assert [item[:2] for item in found] == [(1, "duplicate-row"), (2, "conflicting-row")]
    assert all("row 0" in item[2] for item in found)


def test_a_row_whose_captions_earlier_rows_all_have_is_a_duplicate(check: Callable[..., Report]) -> None:
    several = {**ROW, "text": ["A ball.", "A ball flies."]}
    report = check([several, {**ROW, "text": "A ball flies."}, {**ROW, "text": ["A ball.", "A round thing."]}])
    found = [(problem.row, problem.code) for problem in report.problems]
    assert found == [(1, "duplicate-row"), (2, "conflicting-row")]


def test_every_caption_of_a_list_is_counted_and_a_bad_one_is_named(check: Callable[..., Report]) -> None:
    report = check([{**ROW, "text": ["A ball.", "A ball flies.", " "]}])
    assert totals(report)["caption_characters"] == [1, 7, 13]
    assert [problem.message for problem in report.problems] == ["caption 2 of the list is empty"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("[]", "empty-metadata"),
        ("", "empty-metadata"),
        ('[{"file_path": "a"},]', "unparsable-metadata"),
        ('{"rows": [\n1]}', "unparsable-metadata"),
        ('[{"file_path": "a",\n "text": "b"},\n .....\n]', "unparsable-metadata"),
    ],
)
def test_a_bad_metadata_file_is_one_problem_of_the_file(content: str, code: str, check: Callable[..., Report]) -> None:
    report = check(content)
    assert [(problem.row, problem.code) for problem in report.problems] == [(None, code)]
    assert len(report.table()) == 0


def test_a_row_that_is_no_object_is_reported_and_the_others_are_checked(check: Callable[..., Report]) -> None:
    report = check([ROW, ["train/1.mp4"], {**ROW, "audio_path": "wav/9.wav"}])
    assert [(problem.row, problem.code) for problem in report.problems][:2] == [
        (1, "malformed-row"),
        (2, "missing-file"),
    ]
    assert (report.rows, report.ok) == (3, 1)
    assert list(report.table().row) == [0]


def test_deep_finds_damaged_frames_that_headers_do_not_show(data: Path, check: Callable[..., Report]) -> None:
    video = data / "train/1.mp4"
    body = bytearray(video.read_bytes())
    start = body.find(b"mdat") + 900
    body[start : start + 600] = bytes(i * 7919 % 256 for i in range(600))
    video.write_bytes(bytes(body))
    assert codes(check([ROW])) == set()
    report = check([ROW], deep=True)
    assert codes(report) == {"decode-error"} and report.problems[0].field == "file_path"


def test_deep_gives_up_on_a_file_that_takes_too_long(check: Callable[..., Report]) -> None:
    report = check([ROW], deep=True, deep_timeout=0.0)
    assert codes(report) == {"decode-timeout"}


def test_at_least_thirty_kinds_of_damage_are_planted() -> None:
    assert len({code for code, _ in DAMAGE}) >= 30
    assert {code for code, _ in DAMAGE} <= set(CODES)


def test_every_code_is_explained_with_an_example_and_a_way_out() -> None:
    for name in CODES:
        code = explain(name)
        assert code.explanation and code.example and code.fix
        assert name == name.lower() and " " not in name
