"""Frames come back as a player shows them: every kind of file, every start and stride."""

import dataclasses
import io
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.coded_clips import (
    HEIGHT,
    MATRIX,
    WIDTH,
    Coded,
    encode,
    held_after_training,
    numbers,
    picture,
    sequential,
    show_parts,
    shown,
    true_numbers,
    validated,
)
from vfun_cli.errors import MetadataError
from vfun_cli.metadata.timeline import Timeline
from vfun_cli.modeling.inputs import ConcatenatedClip, ConstantFrames, MediaFile, VideoFrames, load_inputs
from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.sizes import cover_size, resize_and_crop
from vfun_cli.modeling.media.writing import write_video
from vfun_cli.modeling.pixels import float_pixels

NTSC = Fraction(30000, 1001)
BY_NAME = {clip.name: clip for clip in MATRIX}
SHORT_FORM = (
    "open.mp4", "closed.avi", "closed.ts", "trim.mp4", "av1.mp4", "refresh.mp4", "ten-bit.mp4", "trim-open.mp4",
    "late.mp4", "turned90-trim.mp4", "turned270-open.mov", "phone-open.mp4", "fragments-open.mp4", "cut-open.mp4",
    "ntsc.mkv", "cut-hevc.mkv", "phone.mkv", "open.avi", "cut-open.ts", "open.m2ts", "ntsc.flv", "trim-hevc.mp4",
    "open-hevc.ts", "cut-plain-hevc.mov", "trim-av1.mp4", "vp9.webm", "mpeg2.mpg", "mpeg4.avi", "mpeg4-gaps.avi",
    "h264.asf", "wmv2-ntsc.asf", "turned.mkv", "trim-prores.mov", "animation.gif", "animation.png",
)  # fmt: skip
"""One of each difficulty; all of them, and longer: benchmarks/frame_matrix.py."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT_FORM)
def test_what_a_run_trains_on_is_what_a_player_shows(name: str, tmp_path: Path) -> None:
    clip = BY_NAME[name]
    path = encode(clip, tmp_path)
    facts = validated(path)
    pictures = sequential(path)
    assert [number for _, number in pictures] == true_numbers(clip)
    assert facts.frames == len(pictures)
    assert facts.variable == (clip.spacing.__name__ != "even")
    if not facts.variable:
        assert abs(facts.fps - clip.fps) * 1000 < clip.fps
    assert (facts.height, facts.width) == (HEIGHT, WIDTH)
    for held in held_after_training(path, facts, tmp_path / "run", draws=3):
        assert held.found == held.expected


@pytest.mark.parametrize("name", ["open.mkv", "open.avi", "h264.asf", "mpeg2.mpg", "open.mp4", "open-hevc.mkv"])
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_a_film_of_a_few_pictures_is_one(name: str, frames: int, tmp_path: Path) -> None:
    """Fewer than an encoder reorders: Matroska then has no times of decoding, and decoders show all at the end."""
    path = encode(dataclasses.replace(BY_NAME[name], frames=frames), tmp_path)
    facts = validated(path)
    assert (facts.kind, facts.frames, facts.fps, facts.variable) == ("video", frames, 25, False)
    pixels = read_frames(path, range(frames), HEIGHT, WIDTH)
    assert numbers(pixels.permute(0, 2, 3, 1).numpy()) == list(range(frames))


@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "open-hevc.ts", "mpeg2.vob", "refresh.mp4", "mpeg1.mpg"])
def test_a_seek_into_a_longer_file_finds_the_frames_asked_for(name: str, tmp_path: Path) -> None:
    path = encode(dataclasses.replace(BY_NAME[name], frames=200), tmp_path)
    for indices in ([150], [60, 61, 199], [3, 97, 96, 180], list(range(130, 190, 7))):
        assert numbers(read_frames(path, indices, HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()) == indices


@pytest.mark.parametrize("indices", [range(100), range(3, 100, 7), [99], [50, 2, 2, 98, 0]])
def test_frames_come_back_as_bytes_in_the_order_asked_for(indices, film: Path) -> None:
    pixels = read_frames(film, indices, 32, 128)
    assert pixels.shape == (len(indices), 3, 32, 128) and pixels.dtype == torch.uint8
    assert numbers(pixels.permute(0, 2, 3, 1).numpy()) == list(indices)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "numbered clip ä.mp4"
    return encode(Coded(name=path.name, codec="libx264", fps=NTSC, frames=100, options={"g": "12"}), path.parent)


def test_pictures_that_vp8_keeps_for_reference_alone_do_not_count(tmp_path: Path) -> None:
    """Two passes of its encoder make some. Here: key frames out of WebP pictures, some again with a bit that hides."""
    path = tmp_path / "hidden.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_mux_stream("vp8", rate=25, width=WIDTH, height=HEIGHT)
        for number in range(20):
            webp = io.BytesIO()
            Image.fromarray(picture(number)).save(webp, "WEBP", quality=90)
            coded = webp.getvalue()[webp.getvalue().index(b"VP8 ") + 8 :]
            hidden = bytes([coded[0] & 0b1110_1111]) + coded[1:]
            for place, part in enumerate((coded, hidden) if number % 4 == 3 else (coded,)):
                packet = av.Packet(part)
                packet.stream, packet.time_base = stream, Fraction(1, 1000)
                packet.pts = packet.dts = 40 * number + 20 * place
                packet.is_keyframe = True
                container.mux(packet)
    assert [number for _, number in sequential(path)] == list(range(20))
    facts = validated(path)
    assert facts.frames == 20 and not facts.variable
    assert numbers(read_frames(path, [3, 4, 19], HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()) == [3, 4, 19]


def test_recordings_that_follow_one_another_in_a_stream_are_counted_through(tmp_path: Path) -> None:
    """``cat one.ts two.ts``: the clock begins anew in the middle, and a player goes on."""
    first = encode(BY_NAME["open.ts"], tmp_path).read_bytes()
    second = encode(dataclasses.replace(BY_NAME["closed.ts"], frames=30), tmp_path).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second)
    facts = validated(path)
    assert [number for _, number in sequential(path)] == [*range(48), *range(30)]
    assert (facts.frames, facts.fps, facts.variable) == (78, 25, False)
    found = numbers(read_frames(path, [3, 47, 48, 77], HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy())
    assert found == [3, 47, 0, 29]


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("closed.mp4", [(400, 24), (400, 0)], [*range(24, 34), *range(10)]),
        ("intra.mp4", [(800, 0), (720, 30)], [*range(20), *range(30, 48)]),
        ("open-hevc.mp4", [(800, 0), (720, 30)], [*range(20), *range(36, 48)]),  # 30 to 35 refer to what is cut off
    ],
)
def test_parts_that_an_edit_list_joins_are_shown_in_its_order(
    name: str, parts: list[tuple[int, int]], expected: list[int], tmp_path: Path
) -> None:
    path = encode(BY_NAME[name], tmp_path)
    reordering = 0 if name == "intra.mp4" else 1024
    show_parts(path, [(milliseconds, reordering + 512 * picture) for milliseconds, picture in parts])
    assert [number for _, number in sequential(path)] == expected
    facts = validated(path)
    assert facts.frames == len(expected)
    pixels = read_frames(path, range(len(expected)), HEIGHT, WIDTH)
    assert numbers(pixels.permute(0, 2, 3, 1).numpy()) == shown(path, facts.fps, variable=facts.variable)


def test_uneven_pictures_are_taken_by_the_middle_of_a_frame_s_time() -> None:
    times = [0, 100, 110, 300, 400]
    timeline = Timeline(times=times, tick=Fraction(1, 100), rate=Fraction(1), variable=True, keys=[0])
    assert [timeline.picture(frame) for frame in range(5)] == [0, 2, 2, 3, 4]  # at 0.5, 1.5, 2.5, 3.5 and 4.5 s
    even = dataclasses.replace(timeline, variable=False)
    assert [even.picture(frame) for frame in range(5)] == [0, 1, 2, 3, 4]


def test_a_pause_in_an_uneven_film_lasts_as_long_as_it_is_shown(tmp_path: Path) -> None:
    path = encode(BY_NAME["phone.mp4"], tmp_path)
    facts = validated(path)
    numbers_by_time = shown(path, facts.fps, variable=True)
    pause = [number for number in numbers_by_time if number == 29]  # 26 frames of 25 a second
    assert len(pause) == pytest.approx(26 / 25 * facts.fps, abs=1)
    pixels = read_frames(path, range(facts.frames), HEIGHT, WIDTH)
    assert numbers(pixels.permute(0, 2, 3, 1).numpy()) == numbers_by_time


def test_an_uneven_film_has_one_rate_in_validation_and_in_training(tmp_path: Path) -> None:
    path = encode(dataclasses.replace(BY_NAME["screen.mp4"], frames=200), tmp_path)
    facts = validated(path)
    pixels = read_frames(path, range(facts.frames), HEIGHT, WIDTH)
    assert numbers(pixels.permute(0, 2, 3, 1).numpy()) == shown(path, facts.fps, variable=True)


def test_one_picture_at_a_time_is_held_at_its_own_size(tmp_path: Path) -> None:
    path = encode(Coded(name="large.mp4", codec="libx264", frames=40, options={"preset": "ultrafast"}), tmp_path)
    large = tmp_path / "large2.mp4"
    with av.open(str(path)) as source, av.open(str(large), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 960, 540, "yuv420p"
        for frame in source.decode(video=0):
            out.mux(stream.encode(frame.reformat(960, 540, format="yuv420p")))
        out.mux(stream.encode())
    tracemalloc.start()
    try:
        read_frames(large, range(40), 64, 128)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 960 * 540 * 3


def test_decoded_clips_travel_as_bytes_and_constant_ones_as_one_number(film: Path) -> None:
    grey, clip = ConstantFrames(0.0, 50, (32, 128)), VideoFrames(MediaFile(str(film)), (4, 5), (32, 128))
    loaded = load_inputs({"clip": ConcatenatedClip((grey, clip))})["clip"]
    assert [part.untyped_storage().nbytes() for part in loaded.parts] == [4, 2 * 3 * 32 * 128]
    pixels = float_pixels(loaded)
    assert pixels.shape == (52, 3, 32, 128) and pixels.dtype == torch.float32
    assert (pixels[:50] == 0).all() and pixels[50:].min() < -0.8 and pixels[50:].max() > 0.8


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    clip = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    expected = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(float_pixels(clip)[0, 0, 0], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 64), (80, 32)])
def test_clips_are_resized_to_cover_and_cropped_in_the_middle(height: int, width: int, tmp_path: Path) -> None:
    clip = torch.full((1, 3, 64, 96), -0.9)
    clip[..., 24:40, 40:56] = 0.9  # a white square in the middle
    write_video(tmp_path / "c.mp4", clip, Fraction(25))
    (frame,) = float_pixels(read_frames(tmp_path / "c.mp4", [0], height, width)).mean(1)
    rows, columns = torch.nonzero(frame > 0, as_tuple=True)
    assert rows.float().mean().item() == pytest.approx((height - 1) / 2, abs=0.6)
    assert columns.float().mean().item() == pytest.approx((width - 1) / 2, abs=0.6)
    assert (rows.max() - rows.min()).item() == pytest.approx((columns.max() - columns.min()).item(), abs=1)


def test_cover_size_keeps_the_aspect_and_never_falls_short() -> None:
    assert cover_size(720, 1280, 256, 448) == (256, 455)
    assert cover_size(1280, 720, 256, 256) == (455, 256)
    assert cover_size(100, 100, 100, 100) == (100, 100)
    for height, width, to_height, to_width in ((719, 1281, 333, 591), (31, 997, 64, 64), (5, 3, 512, 512)):
        found = cover_size(height, width, to_height, to_width)
        assert found[0] >= to_height and found[1] >= to_width and (found[0] == to_height or found[1] == to_width)


def test_resizing_bytes_stays_within_a_step_of_resizing_numbers() -> None:
    yy, xx = torch.meshgrid(torch.linspace(0, 6, 360), torch.linspace(0, 9, 640), indexing="ij")
    picture = torch.stack([torch.sin(xx * 2 + yy), torch.cos(yy * 3), torch.sin(xx - yy)])[None]
    picture = ((picture * 0.9 + 1) * 127.5).round()
    exact = resize_and_crop(picture, 96, 128)
    assert (resize_and_crop(picture.byte(), 96, 128) - exact).abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "indices", "message"),
    [
        (b"", [0], "frame 0"),
        (b"no film" * 99, [3], "cannot be decoded"),
        (None, [0, 100], "frame 100 .* has 100 frames"),
    ],
)
def test_unreadable_frames_are_named(
    content: bytes | None, indices: list[int], message: str, film: Path, tmp_path: Path
) -> None:
    path = film
    if content is not None:
        path = tmp_path / "bad.mp4"
        path.write_bytes(content)
    with pytest.raises(MetadataError, match=message) as raised:
        read_frames(path, indices, 32, 112)
    assert str(path) in str(raised.value)


def test_a_frame_in_a_damaged_stretch_is_an_error_that_names_it(film: Path, tmp_path: Path) -> None:
    content = bytearray(film.read_bytes())
    start = content.find(b"mdat") + len(content) // 4
    content[start : start + 4000] = bytes(i * 7919 % 256 for i in range(4000))
    (tmp_path / "damaged.mp4").write_bytes(bytes(content))
    with pytest.raises(MetadataError, match=r"damaged\.mp4: frame \d+ cannot be decoded"):
        read_frames(tmp_path / "damaged.mp4", range(100), 32, 112)


@pytest.mark.parametrize("name", ["open.mp4", "trim.mp4", "open.mkv", "open.avi", "open.ts", "mpeg2.mpg"])
def test_damaged_videos_end_in_frames_or_in_an_error_that_names_them(name: str, tmp_path: Path) -> None:
    whole = encode(BY_NAME[name], tmp_path).read_bytes()
    path = tmp_path / f"damaged-{name}"
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(15):
        content = bytearray(whole[: rng.integers(1000, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(content), rng.choice([1, 3, 20])):
            content[place] = rng.integers(256)
        path.write_bytes(bytes(content))
        try:
            outcomes.add(tuple(read_frames(path, [3, 30], HEIGHT, WIDTH).shape))
        except MetadataError as error:
            outcomes.add("error")
            assert path.name in str(error)
    assert outcomes == {(2, 3, HEIGHT, WIDTH), "error"}


def test_a_damaged_picture_behind_a_clock_that_jumps_is_an_error_and_no_endless_search(tmp_path: Path) -> None:
    """An hour between the first picture and the key frame after it: each search for an earlier one finds the same."""
    path = encode(BY_NAME["mpeg2.mpg"], tmp_path)
    content = bytearray(path.read_bytes())
    clock_of_the_first_packet, first_picture = 39, 118
    content[clock_of_the_first_packet] = 78
    content[first_picture] = 220
    path.write_bytes(bytes(content))
    with pytest.raises(MetadataError, match="frame 0 cannot be decoded"):
        read_frames(path, [0, 9], HEIGHT, WIDTH)
