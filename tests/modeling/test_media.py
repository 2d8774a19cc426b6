"""Frames and audio samples come back from where they were put."""

import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vfun_cli.demo.media import CLIPS, build_media
from vfun_cli.errors import MetadataError
from vfun_cli.metadata.checks import validate
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.probe import probe_audio
from vfun_cli.metadata.records import read_metadata
from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.montage import beside, contact_sheet
from vfun_cli.modeling.media.pictures import read_image
from vfun_cli.modeling.media.sound import read_audio, read_sound
from vfun_cli.modeling.media.writing import write_png, write_video, write_wav
from vfun_cli.modeling.pixels import float_pixels

NTSC = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, torch.zeros(100, 3, 32, 64), NTSC)
    return path


@pytest.mark.parametrize("fps", [NTSC, Fraction(24000, 1001), Fraction(25, 2), Fraction(16)])
def test_every_written_frame_has_its_exact_time(fps: Fraction, tmp_path: Path) -> None:
    write_video(tmp_path / "film.mp4", torch.zeros(50, 3, 32, 64), fps)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert container.streams.video[0].average_rate == fps
        assert [frame.pts * frame.time_base * fps for frame in container.decode(video=0)] == list(range(50))


def boxes(path: Path) -> list[bytes]:
    """The kinds of an mp4's outer boxes, in order."""
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        found.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    return found


def test_a_written_video_is_what_browsers_play_at_once(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_video(path, torch.zeros(20, 3, 32, 64), Fraction(16), (tone(2, 48000), 48000))
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (sound.codec_context.name, sound.codec_context.sample_rate) == ("aac", 48000)
    kinds = boxes(path)
    assert kinds.index(b"moov") < kinds.index(b"mdat"), "the index comes first"


def test_the_same_pictures_are_the_same_file(tmp_path: Path) -> None:
    """Whatever lay in the memory that the encoder gets."""
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.uniform(-1, 1, (9, 3, 8, 8)).astype(np.float32)).repeat_interleave(8, 2)
    pixels, written, rubbish = pixels.repeat_interleave(8, 3), set[bytes](), list[bytes]()
    for number in range(20):
        rubbish = [*rubbish[-5:], draw.bytes(draw.integers(1, 200_000))]
        write_video(tmp_path / f"{number}.mp4", pixels, Fraction(8))
        written.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(written) == 1


def test_a_written_video_keeps_its_colours_and_names_their_matrix(tmp_path: Path) -> None:
    colours = torch.tensor([[1, -1, -1], [-0.5, 0.8, 0.1], [-1, -0.2, 1]])  # [F, 3]
    pixels = colours[:, :, None, None].expand(3, 3, 720, 64)
    write_video(tmp_path / "film.mp4", pixels, Fraction(8))
    found = float_pixels(read_frames(tmp_path / "film.mp4", range(3), 720, 64))
    torch.testing.assert_close(found, pixels.contiguous(), atol=4 / 127.5, rtol=0)
    with av.open(str(tmp_path / "film.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (int(context.colorspace), int(context.color_range)) == (5, 1)  # BT.601, 16 to 235


@pytest.mark.parametrize(("height", "width"), [(33, 64), (32, 63)])
def test_a_video_with_an_odd_side_keeps_it(height: int, width: int, tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", torch.zeros(3, 3, height, width), Fraction(8))
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert {(frame.height, frame.width) for frame in container.decode(video=0)} == {(height, width)}


def test_clips_are_joined_side_by_side_and_sheets_show_evenly_spaced_frames() -> None:
    clip = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 2, 4)
    joined = beside(clip, -clip[..., :3])
    assert joined.shape == (9, 3, 2, 7) and joined[5, 0, 0].tolist() == [5] * 4 + [-5] * 3
    assert contact_sheet(clip, 3)[1, 1].tolist() == [0] * 4 + [4] * 4 + [8] * 4
    assert contact_sheet(clip, 1).shape == (3, 2, 4)
    assert contact_sheet(clip[:2], 5)[0, 0].tolist() == [0] * 4 + [1] * 4


# Sound


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode_sound(path: Path, samples: np.ndarray, rate: int, *, video: bool = False, start: int = 0) -> None:
    """Stereo sound in the format that the suffix names; ``start`` in samples, beside a black film if ``video``."""
    codec = {".flac": "flac", ".mp3": "libmp3lame", ".m4a": "aac", ".mp4": "aac", ".wav": "pcm_s16le"}[path.suffix]
    with av.open(str(path), "w") as container:
        if video:
            film = container.add_stream("libx264", rate=25)
            film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout="stereo")
        if video:
            for _ in range(50):
                black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                container.mux(film.encode(black))
            container.mux(film.encode())
        whole = av.AudioFrame.from_ndarray(np.stack([samples, samples]), format="fltp", layout="stereo")
        whole.sample_rate, whole.pts = rate, 0
        size = sound.codec_context.frame_size or 1024
        cutter = av.AudioResampler(format=sound.format, layout="stereo", rate=rate, frame_size=size)
        for given in (whole, None):
            for piece in cutter.resample(given):
                piece.pts += start
                container.mux(sound.encode(piece))
        container.mux(sound.encode())


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 16000])
@pytest.mark.parametrize("start", [Fraction(0), Fraction(1234567, 10**6), Fraction(48, 1) / NTSC])
def test_samples_are_where_the_clock_says(rate: int, start: Fraction, tmp_path: Path) -> None:
    encode_sound(tmp_path / "a.wav", tone(3, rate), rate)
    found = read_audio(tmp_path / "a.wav", start, Fraction(80) / NTSC / 4)
    assert found.dtype == np.float32 and len(found) == round(Fraction(80) / NTSC / 4 * 16000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * (round(start * 16000) + np.arange(len(found))) / 16000)
    assert np.abs(found - expected)[64:].max() < 1e-4  # 64: the filter's edge at the very start of a file


@pytest.mark.parametrize(("suffix", "tolerance"), [(".flac", 1e-4), (".mp3", 0.05), (".m4a", 0.05), (".mp4", 0.05)])
def test_compressed_sound_keeps_its_place(suffix: str, tolerance: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    encode_sound(path, tone(2, 44100), 44100, video=suffix == ".mp4")
    found = read_audio(path, Fraction(1), Fraction(1, 2))
    expected = 0.5 * np.sin(2 * np.pi * 440 * (16000 + np.arange(8000)) / 16000)
    assert np.abs(found - expected).max() < tolerance


def test_a_late_sound_track_is_heard_late(tmp_path: Path) -> None:
    encode_sound(tmp_path / "late.mp4", tone(1.5, 16000), 16000, video=True, start=3200)
    found = read_audio(tmp_path / "late.mp4", Fraction(0), Fraction(1))
    assert np.abs(found[:2000]).max() < 1e-3  # aac smears a few milliseconds before the attack
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(12800) / 16000)
    assert np.abs(found[3200:] - expected)[500:].max() < 0.05


CLICKS = (0.25, 1.0, 1.9)
"""Seconds"""


def clicks(seconds: float, rate: int) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return sum(
        0.5 * np.exp(-0.5 * ((time - at) / 0.002) ** 2) * np.cos(2 * np.pi * 500 * (time - at)) for at in CLICKS
    ).astype(np.float32)


@pytest.mark.parametrize("channels", [0, 1, 2])
@pytest.mark.parametrize("rate", [48000, 44100, 16000, 192000, 11127])
def test_a_click_is_heard_where_it_was_written(rate: int, channels: int, tmp_path: Path) -> None:
    fps = Fraction(24000, 1001)
    samples = clicks(2.5, rate)
    sound = np.stack([samples] * channels) if channels else samples
    write_video(tmp_path / "film.mp4", torch.zeros(48, 3, 32, 32), fps, (sound, rate))
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert [stream.start_time for stream in container.streams] == [0, 0]
    heard = read_audio(tmp_path / "film.mp4", Fraction(0), Fraction(2), 48000)
    for at in CLICKS:
        low = round((at - 0.1) * 48000)
        near = heard[low : low + 9600]
        assert abs((low + near.argmax()) / 48000 - at) < 5e-4
        assert near.max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("seconds", "heard"), [(5, Fraction(88288, 44100)), (1, Fraction(1)), (0.01, Fraction(1, 100))]
)
def test_sound_ends_with_the_last_picture_or_before(seconds: float, heard: Fraction, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_video(path, torch.zeros(48, 3, 32, 32), Fraction(24000, 1001), (tone(seconds, 44100), 44100))
    facts = probe_audio(path)
    assert (facts.duration, facts.offset) == (heard, 0)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert video.duration * video.time_base == Fraction(48 * 1001, 24000)


@pytest.mark.slow
def test_sound_and_picture_of_one_second_are_beside_each_other_in_the_file(tmp_path: Path) -> None:
    """A player that must look for one of them far from the other stutters."""
    path = tmp_path / "film.mp4"
    write_video(path, torch.zeros(960, 3, 32, 32), Fraction(16), (tone(60, 16000), 16000))
    at: dict[str, list[tuple[int, Fraction]]] = {"video": [], "audio": []}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.size:
                at[packet.stream.type].append((packet.pos, packet.dts * packet.time_base))
    assert len(at["video"]) == 960 and len(at["audio"]) > 900
    for place, second in at["video"]:
        before = [heard for other, heard in at["audio"] if other < place]
        assert not before or abs(before[-1] - second) < 1


def test_sound_of_a_source_goes_into_a_video_as_it_is(tmp_path: Path) -> None:
    """Left and right apart, and what 16 kHz has no place for: 440 Hz on one side and 12 kHz on the other."""
    both = np.stack([tone(3, 48000), tone(3, 48000, 12000.0)])
    write_video(tmp_path / "source.mp4", torch.zeros(75, 3, 32, 32), Fraction(25), (both, 48000))
    samples, rate = read_sound(tmp_path / "source.mp4", Fraction(1, 2), Fraction(2))
    assert samples.shape == (2, 96000) and rate == 48000
    write_video(tmp_path / "copy.mp4", torch.zeros(50, 3, 32, 32), Fraction(25), (samples, rate))
    found, _ = read_sound(tmp_path / "copy.mp4", Fraction(1, 2), Fraction(1))
    error = np.sqrt(np.square(found - both[:, 48000:96000]).mean(1))
    assert error.max() < 0.04, "of 0.35; AAC twice leaves 0.02"


def test_channels_are_averaged(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.tile(np.array([16384, 0], "<i2"), 1600).tobytes())
    assert np.all(read_audio(tmp_path / "s.wav", Fraction(0), Fraction(1, 10)) == 0.25)


def test_a_short_tail_is_filled_with_silence_and_a_longer_one_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(1, 16000), 16000)
    found = read_audio(tmp_path / "a.wav", Fraction(1, 2), Fraction(515, 1000))
    assert len(found) == 8240 and np.abs(found[8000:]).max() == 0 and np.abs(found[7900:8000]).max() > 0.4
    with pytest.raises(MetadataError, match=r"a\.wav.*ends at 1\.000 s"):
        read_audio(tmp_path / "a.wav", Fraction(1, 2), Fraction(53, 100))


def test_sound_that_is_not_there_is_an_error(tmp_path: Path, film: Path) -> None:
    with pytest.raises(MetadataError, match="no audio stream"):
        read_audio(film, Fraction(0), Fraction(1))
    for content in (b"", b"no sound" * 50):
        (tmp_path / "x.wav").write_bytes(content)
        with pytest.raises(MetadataError, match=r"x\.wav"):
            read_audio(tmp_path / "x.wav", Fraction(0), Fraction(1))


def test_a_written_wav_and_png_come_back(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(1, 16000), 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", Fraction(0), Fraction(1)), tone(1, 16000), atol=4e-5)
    pixels = torch.linspace(-1, 1, 3 * 16 * 24).reshape(1, 3, 16, 24)
    write_png(tmp_path / "p.png", pixels)
    found = float_pixels(read_image(tmp_path / "p.png", 16, 24))
    torch.testing.assert_close(found, pixels, atol=1 / 255 + 1e-6, rtol=0)


# The demo data set


@pytest.mark.slow
def test_the_demo_media_are_valid_small_and_always_the_same(tmp_path: Path) -> None:
    fields = (
        MetadataField(name="file_path", media="visual"),
        MetadataField(name="audio_path", media="audio", required=False),
        MetadataField(name="control_file_path", media="control"),
    )
    path = build_media(tmp_path / "one", control=True, audio=True, images=True)
    report = validate(read_metadata(path), fields, ("video", "image"), tmp_path / "one")
    assert report.problems == () and report.rows == len(CLIPS) + 2
    table = report.table()
    videos = ~table.is_image
    assert table.frames[videos].tolist() == [clip.frames for clip in CLIPS]
    rates = [Fraction(int(n), int(d)) for n, d in zip(table.fps_num[videos], table.fps_den[videos], strict=True)]
    assert rates == [clip.fps for clip in CLIPS]
    files = [file for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    build_media(tmp_path / "two", control=True, audio=True, images=True)
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.slow
def test_the_demo_media_leave_out_what_is_not_asked_for(tmp_path: Path) -> None:
    path = build_media(tmp_path, control=False, audio=False, images=False, seed=1)
    assert {item.name for item in tmp_path.iterdir()} == {"metadata.json", "train"}
    assert all(set(record.fields) == {"file_path", "text", "type"} for record in read_metadata(path).records)


def test_validation_needs_no_torch() -> None:
    code = (
        "import sys, vfun_cli.metadata.report, vfun_cli.metadata.checks, vfun_cli.metadata.fix, vfun_cli.demo.media;"
        "assert not {'torch', 'decord', 'av'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
