"""Sounds of many kinds are as long as validation says, and are heard where and as loud as they are."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.click_sounds import KINDS, Kind, measure, write_kind
from vfun_cli.errors import MetadataError
from vfun_cli.metadata.probe import probe_audio
from vfun_cli.metadata.sounds import time_zero
from vfun_cli.modeling.media.sound import read_audio, read_sound
from vfun_cli.modeling.media.writing import write_wav

BY_NAME = {kind.name: kind for kind in KINDS}
SHORT_FORM = (
    "piped.wav", "centre.ac3", "he.m4a", "a.mp3", "bare.mp3", "trimmed.mp4", "late.mkv", "cut.ts", "film.avi",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT_FORM)
def test_clicks_are_heard_within_half_a_frame_at_their_level(name: str, tmp_path: Path) -> None:
    """The short form of benchmarks/sound_matrix.py; ``measure`` compares the lengths of validation and reading."""
    kind = BY_NAME[name]
    found = measure(write_kind(tmp_path, kind), kind, pieces=3)
    assert found.clicks > 3
    assert abs(found.worst) * kind.fps <= 0.5
    assert 0.9 < found.quietest <= found.loudest < 1.1


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, count).astype(np.float32)


def with_length(path: Path, stated: int) -> Path:
    """A second of 16 kHz whose header states ``stated`` bytes, in both places."""
    write_wav(path, noise(16000), 16000)
    content = bytearray(path.read_bytes())
    for place in (4, 40):
        content[place : place + 4] = stated.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "stated", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 2_000_000_000, 0xFFFFFFFF, 0xFFFFFFFF - 44, 2_000_000_036]
)
def test_a_wav_without_a_stated_length_is_read_to_its_end(stated: int, tmp_path: Path) -> None:
    path = with_length(tmp_path / "a.wav", stated)
    facts = probe_audio(path)
    assert (facts.duration, facts.truncated) == (1, False)
    np.testing.assert_allclose(read_audio(path, Fraction(0), Fraction(1)), noise(16000), atol=4e-5)


@pytest.mark.parametrize("stated", [32001, 64000, 600_000_000, 2_500_000_000])
def test_a_wav_that_is_shorter_than_it_plausibly_says_is_truncated(stated: int, tmp_path: Path) -> None:
    assert probe_audio(with_length(tmp_path / "a.wav", stated)).truncated


@pytest.mark.parametrize(("stated", "truncated"), [(32000, False), (0, False), (64000, True)])
@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_a_wav_with_64_bit_lengths_is_as_long_as_they_say(
    name: bytes, stated: int, truncated: bool, tmp_path: Path
) -> None:
    plain = with_length(tmp_path / "a.wav", 0xFFFFFFFF)
    lengths = (28).to_bytes(4, "little") + bytes(8) + stated.to_bytes(8, "little") + bytes(12)
    content = plain.read_bytes()
    plain.write_bytes(name + content[4:12] + b"ds64" + lengths + content[12:])
    facts = probe_audio(plain)
    assert (facts.duration, facts.truncated) == (1, truncated)
    np.testing.assert_allclose(read_audio(plain, Fraction(0), Fraction(1)), noise(16000), atol=4e-5)


def test_a_chunk_behind_silence_is_not_heard(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(1000, np.float32), 16000)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"LIST" + (4000).to_bytes(4, "little") + b"loud" * 1000)
    assert probe_audio(tmp_path / "a.wav").silent


QUIETER = 0.5**1.5


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("mono", [1]),
        ("stereo", [0.5, 0.5]),
        ("quad", [0.5, 0.5, QUIETER, QUIETER]),
        ("2.1", [0.5, 0.5, 0]),
        ("5.1", [0.5, 0.5, 1, 0, QUIETER, QUIETER]),
        ("7.1", [0.5, 0.5, 1, 0, *[QUIETER] * 4]),
    ],
)
def test_the_centre_and_a_voice_on_both_fronts_keep_their_level(
    layout: str, weights: list[float], tmp_path: Path
) -> None:
    """Every channel sounds for a tenth of a second, alone."""
    channels = len(weights)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout=layout)
        values = np.repeat(np.eye(channels, dtype=np.int16) * 16384, 1600, axis=1)
        frame = av.AudioFrame.from_ndarray(values.T.reshape(1, -1).copy(), format="s16", layout=layout)
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    heard = read_audio(tmp_path / "a.wav", Fraction(0), Fraction(channels, 10)).reshape(channels, -1)
    np.testing.assert_allclose(heard, np.outer(weights, np.full(1600, 0.5)), atol=1e-6)


@pytest.mark.slow
def test_sound_whose_rate_and_channels_change_midway_keeps_its_time(tmp_path: Path) -> None:
    parts = (replace(BY_NAME["a.aac"], layout="mono"), Kind(name="b.aac", codec="aac", rate=48000, format="adts"))
    first, second = (write_kind(tmp_path, part) for part in parts)
    both = tmp_path / "both.aac"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    lengths = [probe_audio(path).duration for path in (first, second)]
    assert probe_audio(both).duration == sum(lengths)
    found = read_audio(both, Fraction(round(lengths[0] * 16000), 16000), Fraction(3))
    expected = read_audio(second, Fraction(0), Fraction(3))
    assert np.abs(expected).max() > 0.3 and np.abs(found - expected)[1000:].max() < 0.03  # the start fades over


def test_an_mp4_cut_off_in_its_sound_is_truncated(tmp_path: Path) -> None:
    path = write_kind(tmp_path, replace(BY_NAME["a.m4a"], options={"movflags": "faststart"}))
    assert not probe_audio(path).truncated
    path.write_bytes(path.read_bytes()[:-5000])
    assert probe_audio(path).truncated


@pytest.mark.parametrize("name", ["trimmed.mp4", "early.mp4", "cut.mkv", "cut.ts"])
def test_second_0_is_the_first_picture_that_is_shown(name: str, tmp_path: Path) -> None:
    with av.open(str(write_kind(tmp_path, BY_NAME[name]))) as container:
        shown = next(container.decode(video=0))
        assert time_zero(container) == shown.pts * shown.time_base


# To be listened to


def write_channels(path: Path, values: np.ndarray, layout: str, rate: int = 48000) -> None:
    """int16 [channels, samples]"""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(values.T.reshape(1, -1).copy(), format="s16", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))


@pytest.mark.parametrize("rate", [44100, 48000, 22050])
def test_sound_to_be_listened_to_is_exactly_that_of_the_file(rate: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(-20000, 20000, (2, 2 * rate)).astype(np.int16)
    write_channels(tmp_path / "stereo.wav", values, "stereo", rate)
    write_channels(tmp_path / "mono.wav", values[:1], "mono", rate)
    start, duration = Fraction(1001, 3000), Fraction(48 * 1001, 48000)
    first = round(start * rate)
    wanted = values[:, first : first + round(duration * rate)] / 32768
    for name, expected in (("stereo.wav", wanted), ("mono.wav", wanted[:1])):
        samples, found = read_sound(tmp_path / name, start, duration)
        assert found == rate and samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected.astype(np.float32))


FRONT, SIDE = 1 / (1 + 2**0.5), 0.5**0.5 / (1 + 2**0.5)


@pytest.mark.parametrize(
    ("layout", "left", "right"),
    [
        ("2.1", [1, 0, 0], [0, 1, 0]),
        ("quad", [1 / (1 + 0.5**0.5), 0, 1 / (1 + 2**0.5), 0], [0, 1 / (1 + 0.5**0.5), 0, 1 / (1 + 2**0.5)]),
        ("5.1", [FRONT, 0, SIDE, 0, SIDE, 0], [0, FRONT, SIDE, 0, 0, SIDE]),
    ],
)
def test_surround_sound_becomes_left_and_right(
    layout: str, left: list[float], right: list[float], tmp_path: Path
) -> None:
    """Every channel sounds for a tenth of a second, alone."""
    values = np.repeat(np.eye(len(left), dtype=np.int16) * 16384, 4800, axis=1)
    write_channels(tmp_path / "a.wav", values, layout)
    samples, _ = read_sound(tmp_path / "a.wav", Fraction(0), Fraction(len(left), 10))
    expected = np.repeat(np.array([left, right]) / 2, 4800, axis=1)
    np.testing.assert_allclose(samples, expected, atol=1e-6)


def test_the_rate_to_listen_at_is_that_of_the_decoded_sound(tmp_path: Path) -> None:
    samples, rate = read_sound(write_kind(tmp_path, BY_NAME["he.m4a"]), Fraction(1, 4), Fraction(1))
    assert rate == 48000 and samples.shape[1] == 48000


def test_sound_that_is_not_there_cannot_be_listened_to(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", noise(16000), 16000)
    with pytest.raises(MetadataError, match=r"a\.wav.*ends at 1\.000 s"):
        read_sound(tmp_path / "a.wav", Fraction(0), Fraction(2))
    (tmp_path / "x.wav").write_bytes(b"no sound" * 50)
    for name in ("x.wav", "none.wav"):
        with pytest.raises(MetadataError, match=name):
            read_sound(tmp_path / name, Fraction(0), Fraction(1))
