"""Sounds with a click at known times, in sync with white frames where there is video, and where vfun hears them.

A click is a cosine of 500 Hz under a Gaussian, so that every codec keeps it, 8 kHz speech codecs too. Where a file has
video, its decoded frames say when each click is due; otherwise the clicks were written where CLICKS says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np

from vfun_cli.errors import MetadataError
from vfun_cli.metadata.probe import probe_audio
from vfun_cli.modeling.media.sound import AUDIO_TAIL_TOLERANCE, read_audio

SECONDS = 4
CLICKS = (8, 17, 28, 45, 53, 62, 79, 90)
"""Frames with a click: unevenly far apart, so that no shift fits but the right one."""
LEVEL = 0.4
PITCH = 500.0
WIDTH = 0.004
"""Standard deviation of a click in seconds."""
NOISE = 5e-4
"""FFmpeg's Vorbis encoder aborts on pure silence."""
RATE = 16000
X264 = {"preset": "ultrafast", "threads": "1", "bf": "2", "g": "25", "x264-params": "b-adapt=0:scenecut=0:keyint=25"}
OPEN_GOPS = {"threads": "1", "x264-params": "open-gop=1:keyint=25:min-keyint=25:scenecut=0:bframes=3:b-adapt=0"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one file is made."""

    name: str
    """Also its suffix: ``late.mp4``."""
    codec: str
    rate: int = 48000
    layout: str = "stereo"
    heard: Sequence[str] = ()
    """Channels that have the clicks; all if none is named."""
    sample_format: str | None = None
    bit_rate: int | None = None
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    video: str | None = None
    video_options: dict[str, str] = field(default_factory=lambda: X264)
    fps: Fraction = Fraction(25)
    sound_starts: Fraction = Fraction(0)
    picture_starts: Fraction = Fraction(0)
    trimmed: Fraction = Fraction(0)
    """Seconds that an edit list hides."""
    cut: Fraction = Fraction(-1)
    """Seconds whose packets are left out, wherever the next key frame is."""
    unstated: Fraction = Fraction(0)
    """Seconds that the encoder puts before the sound, in a file with no place to say so: every player is late by it."""
    surplus: Fraction = Fraction(0)
    """Seconds that decoding yields beyond the last packet."""
    patch: tuple[tuple[int | bytes, bytes], ...] = ()
    """Bytes to write over others: (where or what, new)."""


AAC, MP3 = Fraction(1024), Fraction(1105)
"""Samples of delay that FFmpeg's encoder of AAC and LAME have."""
F = Fraction
FILM: dict[str, Any] = {"video": "libx264"}
PLAIN_WAV = {"fflags": "bitexact"}
"""Without a chunk of remarks before the samples."""
LENGTHS_UNKNOWN = ((4, b"\xff\xff\xff\x7f"), (40, b"\xff\xff\xff\x7f"))
SAY_HE_AAC = ((b"\x56\xe5\0", b"\x56\xe5\x98"),)
"""The configuration of AAC then announces 48 kHz on top of 24 (ISO/IEC 14496-3, 1.6.5): it is decoded to 48 kHz, 481
samples of 24 kHz later. An encoder of HE-AAC would count these in its edit list."""
KINDS = (
    Kind(name="8bit.wav", codec="pcm_u8", rate=8000, layout="mono"),
    Kind(name="16bit.wav", codec="pcm_s16le", rate=16000, layout="mono"),
    Kind(name="24bit.wav", codec="pcm_s24le"),
    Kind(name="32bit.wav", codec="pcm_s32le", rate=96000),
    Kind(name="float.wav", codec="pcm_f32le", rate=44100),
    Kind(name="mulaw.wav", codec="pcm_mulaw", rate=8000, layout="mono"),
    Kind(name="piped.wav", codec="pcm_s16le", rate=16000, layout="mono", options=PLAIN_WAV, patch=LENGTHS_UNKNOWN),
    Kind(name="rf64.wav", codec="pcm_s16le", options={"rf64": "always"}),
    Kind(name="centre.wav", codec="pcm_s16le", layout="5.1", heard=("FC",)),
    Kind(name="a.aiff", codec="pcm_s16be", rate=44100),
    Kind(name="a.flac", codec="flac", rate=44100),
    Kind(name="96k.flac", codec="flac", rate=96000, sample_format="s32"),
    Kind(name="a.m4a", codec="aac", rate=44100),
    Kind(name="fronts.m4a", codec="aac", layout="5.1", heard=("FL", "FR"), bit_rate=384000),
    Kind(name="alac.m4a", codec="alac"),
    Kind(name="trimmed.m4a", codec="aac", trimmed=F(507, 1000)),
    Kind(name="he.m4a", codec="aac", rate=24000, layout="mono", patch=SAY_HE_AAC, unstated=F(481, 24000)),
    Kind(name="a.mp3", codec="libmp3lame", rate=44100),
    Kind(name="bare.mp3", codec="libmp3lame", rate=22050, layout="mono", options={"write_xing": "0"},
         unstated=MP3 / 22050),
    Kind(name="a.aac", codec="aac", rate=44100, format="adts", unstated=AAC / 44100),
    Kind(name="a.ogg", codec="vorbis"),
    Kind(name="a.opus", codec="libopus"),
    Kind(name="centre.ac3", codec="ac3", layout="5.1", heard=("FC",), bit_rate=448000, unstated=F(256, 48000)),
    Kind(name="a.amr", codec="amr_nb", rate=8000, layout="mono", unstated=F(1, 160)),
    Kind(name="a.mka", codec="flac"),
    Kind(name="a.wma", codec="wmav2", rate=44100, bit_rate=128000, unstated=F(2048, 44100), surplus=F(2048, 44100)),
    Kind(name="film.mp4", codec="aac", **FILM),
    Kind(name="ntsc.mp4", codec="aac", rate=44100, fps=F(30000, 1001), **FILM),
    Kind(name="late.mp4", codec="aac", sound_starts=F(1, 5), **FILM),
    Kind(name="early.mp4", codec="aac", picture_starts=F(1, 5), **FILM),
    Kind(name="trimmed.mp4", codec="aac", trimmed=F(800, 1000), **FILM),
    Kind(name="pieces.mp4", codec="aac", options={"movflags": "frag_keyframe+empty_moov"}, **FILM),
    Kind(name="opus.mp4", codec="libopus", **FILM),
    Kind(name="trimmed.mov", codec="pcm_s16le", trimmed=F(480, 1000), **FILM),
    Kind(name="film.mkv", codec="aac", **FILM),
    Kind(name="late.mkv", codec="libopus", sound_starts=F(1, 5), **FILM),
    Kind(name="cut.mkv", codec="libmp3lame", cut=F(6, 10), **FILM),
    Kind(name="film.webm", codec="libopus", video="libvpx-vp9", video_options={"deadline": "realtime"}),
    Kind(name="film.ts", codec="aac", **FILM),
    Kind(name="late.ts", codec="ac3", sound_starts=F(1, 5), **FILM),
    Kind(name="cut.ts", codec="mp2", cut=F(1), video="libx264", video_options=OPEN_GOPS),
    Kind(name="film.avi", codec="libmp3lame", unstated=MP3 / 48000, **FILM),
    Kind(name="pcm.avi", codec="pcm_s16le", rate=44100, **FILM),
    Kind(name="film.flv", codec="aac", rate=44100, **FILM),
    Kind(name="early.flv", codec="libmp3lame", rate=44100, picture_starts=F(1, 5), **FILM),
    Kind(name="film.asf", codec="wmav2", rate=44100, bit_rate=128000, video="mpeg4", video_options={},
         surplus=F(2048, 44100)),
    Kind(name="film.mpg", codec="mp2", video="mpeg2video", video_options={"bf": "2"}),
)  # fmt: skip


def write_kind(folder: Path, kind: Kind) -> Path:
    """The file of a kind."""
    path = folder / kind.name
    if kind.trimmed or kind.cut > 0:
        whole = path.with_stem("whole")
        _encode(whole, kind)
        _copy(whole, path, kind)
    else:
        _encode(path, kind)
    content = bytearray(path.read_bytes())
    for place, new in kind.patch:
        at = place if isinstance(place, int) else content.index(place)
        content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def _encode(path: Path, kind: Kind) -> None:
    with av.open(str(path), "w", format=kind.format, options=kind.options) as container:
        if kind.video:
            video = container.add_stream(kind.video, rate=kind.fps, options=dict(kind.video_options))
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        # FFmpeg calls its Vorbis encoder experimental: strict
        sound: Any = container.add_stream(kind.codec, kind.rate, layout=kind.layout, options={"strict": "-2"})
        sound.format = kind.sample_format or sound.format
        if kind.bit_rate:
            sound.bit_rate = kind.bit_rate
        if kind.video:
            for index in range(round(SECONDS * kind.fps)):
                picture = np.full((48, 64, 3), 235 if index in CLICKS else 20, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = 1 / kind.fps
                frame.pts = index + round(kind.picture_starts * kind.fps)
                container.mux(video.encode(frame))
            container.mux(video.encode())
        for frame in _sound_frames(kind, sound):
            container.mux(sound.encode(frame))
        container.mux(sound.encode())


def _sound_frames(kind: Kind, sound: Any) -> Iterator[av.AudioFrame]:
    """Cut as the encoder wants them; the clicks are due at their frames wherever sound or picture start."""
    time = np.arange(round(SECONDS * kind.rate)) / kind.rate + float(kind.sound_starts - kind.picture_starts)
    wave = NOISE * np.random.default_rng(0).standard_normal(len(time))
    for index in CLICKS:
        wave += LEVEL * _click(time - float(index / kind.fps)).real
    names = [channel.name for channel in sound.layout.channels]
    channels = [wave if not kind.heard or name in kind.heard else 0 * wave for name in names]
    whole = av.AudioFrame.from_ndarray(np.stack(channels).astype(np.float32), format="fltp", layout=kind.layout)
    whole.sample_rate, whole.pts, whole.time_base = kind.rate, 0, Fraction(1, kind.rate)
    size = sound.codec_context.frame_size or 1024
    cutter = av.AudioResampler(format=sound.format, layout=kind.layout, rate=kind.rate, frame_size=size)
    for given in (whole, None):
        for piece in cutter.resample(given):
            piece.pts, piece.time_base = piece.pts + round(kind.sound_starts * kind.rate), Fraction(1, kind.rate)
            yield piece


def _click(time: Any) -> Any:
    return np.exp(-0.5 * (time / WIDTH) ** 2 + 2j * np.pi * PITCH * time)


def _copy(source: Path, path: Path, kind: Kind) -> None:
    """The packets without those of ``cut``, or all of them with ``trimmed`` before the file's zero."""
    with av.open(str(source)) as given, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            decoded = packet.pts if packet.dts is None else packet.dts  # Matroska states no dts of a key frame
            if packet.size and decoded * packet.time_base >= kind.cut:
                packet.pts -= round(kind.trimmed / packet.time_base)
                packet.dts = decoded - round(kind.trimmed / packet.time_base)
                packet.stream = streams[packet.stream.index]
                container.mux(packet)


def due_times(path: Path, kind: Kind) -> list[Fraction]:
    """Seconds at which a click is due: by the white frames of the file, or as written."""
    if not kind.video:
        return [index / kind.fps - kind.trimmed + kind.unstated for index in CLICKS]
    with av.open(str(path)) as container:
        frames = (frame.to_ndarray(format="gray").mean() > 128 for frame in container.decode(video=0))
        return [index / kind.fps + kind.unstated for index, white in enumerate(frames) if white]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a file."""

    clicks: int
    """Clicks that were due in the pieces."""
    worst: float
    """Seconds between a click and its time, at most."""
    quietest: float
    loudest: float
    """Their level over the written one."""
    length: Fraction
    """Seconds of sound behind second 0, as validation has it."""


def measure(path: Path, kind: Kind, pieces: int, seed: int = 0) -> Measured:
    """Read pieces at random frames with random strides and find their clicks.

    Raises:
        AssertionError: validation and reading differ about the length by more than a millisecond.
    """
    rng, due, facts = Random(seed), due_times(path, kind), probe_audio(path)
    frames = int(facts.end * kind.fps)
    errors, levels = [], []
    for _ in range(pieces):
        stride, count = rng.randint(1, 3), rng.choice([12, 16, 24])
        start = rng.randrange(max(1, frames - stride * count))
        first, length = start / kind.fps, min(stride * count, frames - start) / kind.fps
        heard = read_audio(path, first, length, RATE)
        for time in due:
            if first + F(1, 20) < time < first + length - F(1, 20):
                error, level = _find(heard, float(time - first))
                errors.append(error)
                levels.append(level / LEVEL)
    _check_end(path, facts.end + kind.surplus)
    return Measured(
        clicks=len(errors), worst=max(errors, key=abs), quietest=min(levels), loudest=max(levels), length=facts.end
    )


def _find(heard: Any, time: float) -> tuple[float, float]:
    """How many seconds after ``time`` the click is, and its level."""
    template = _click(np.arange(-4 * WIDTH, 4 * WIDTH, 1 / RATE))
    match = np.abs(np.correlate(heard, template, "same"))
    low, high = max(0, round((time - 0.15) * RATE)), round((time + 0.15) * RATE)
    at = low + int(match[low:high].argmax())
    return (at - len(template) % 2) / RATE - time, 2 * float(match[at]) / float(np.sum(np.abs(template) ** 2))


def _check_end(path: Path, end: Fraction) -> None:
    """Reading ends where validation says, to a millisecond."""
    there = end + AUDIO_TAIL_TOLERANCE - F(1, 1000)
    read_audio(path, F(0), there, RATE)
    try:
        read_audio(path, F(0), there + F(2, 1000), RATE)
    except MetadataError:
        return
    raise AssertionError(f"{path}: validation ends at {float(end):.4f} s, and there is more")
