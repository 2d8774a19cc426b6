"""Sound by the clock of the picture: mono samples for models, and as it is for people."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vfun_cli.errors import MetadataError, first_line
from vfun_cli.metadata.sounds import TIMED, open_sound, stated_end, time_zero

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

AUDIO_TAIL_TOLERANCE = Fraction(20, 1000)
"""Seconds of audio that may be missing at the end of a clip (less than one video frame); filled with silence."""
AUDIO_WARM_UP = Fraction(1, 20)
"""Seconds decoded on both sides of the wanted audio, so that the resampling filter never sees an edge."""
TIMESTAMP_JITTER = Fraction(20, 1000)
"""Audio timestamps closer than this to the running sample count are rounding of the container's clock, not gaps."""
MPEG_WRAP = Fraction(2**33, 90000)
"""Seconds after which the clock of MPEG streams begins anew (26.5 h): sound just before its 0 is stated at its end."""
CHANNEL_WEIGHTS = {"FC": 1.0, "FL": 0.5, "FR": 0.5, "LFE": 0.0, "LFE2": 0.0}
"""See :func:`mono_weights`."""


@dataclass(frozen=True)
class _Mix:
    """How the channels of a file become those that are read."""

    channels: int
    """As many are read."""
    weights: Callable[[Sequence[str]], NDArray[np.float32]]
    """What each channel of the file, by its name, counts in each of them: float32 [channels, of the file]."""


def read_audio(path: str | Path, start: Fraction, duration: Fraction, rate: int = 16000) -> NDArray[np.float32]:
    """Mono audio [round(duration * rate)] float32 of ``start`` .. ``start + duration`` seconds, sampled at ``rate``.

    Second 0 is ``time_zero``: the first picture that is shown in a file that has video, otherwise the first sample.
    What is heard before it is left out. Channels are mixed by ``mono_weights``.

    Raises:
        MetadataError: there is no audio stream, or it ends more than AUDIO_TAIL_TOLERANCE too early.
    """
    mono: NDArray[np.float32] = _read(path, start, duration, rate, _Mix(1, mono_weights))[0]
    return mono


def read_sound(path: str | Path, start: Fraction, duration: Fraction) -> tuple[NDArray[np.float32], int]:
    """The same seconds to be listened to: float32 [channels, samples] and their sampling rate, which is the file's own.

    One channel if both sides are the same, otherwise left and right; see :func:`stereo_weights`.

    Raises:
        MetadataError: as ``read_audio``.
    """
    with _decoding(path):
        rate = _native_rate(path)
    sides = _read(path, start, duration, rate, _Mix(2, stereo_weights))
    return sides[:1] if np.array_equal(*sides) else sides, rate


def _read(path: str | Path, start: Fraction, duration: Fraction, rate: int, mix: _Mix) -> NDArray[np.float32]:
    """[channels, round(duration * rate)] float32"""
    first, count = round(start * rate), round(duration * rate)
    if first < 0 or count < 0:
        raise ValueError(f"audio of {float(duration)} s from second {float(start)}")
    wanted = Fraction(first, rate), Fraction(first + count, rate)
    with _decoding(path):
        pieces, end = _native_audio(path, *wanted, rate, mix)
    missing = wanted[1] - end
    if missing > AUDIO_TAIL_TOLERANCE:
        raise MetadataError(
            f"{path}: audio from {float(start):.3f} s to {float(start + duration):.3f} s is needed, "
            f"and the file ends at {float(end):.3f} s.",
            hint="Use a longer file, or a shorter clip.",
        )
    out = np.zeros((mix.channels, count), np.float32)
    for native_rate, piece in pieces.items():
        skip = first - round(piece.origin * rate)  # exact: origin lies on both sampling grids
        for channel, samples in zip(out, piece.samples, strict=True):
            heard = _resample(samples, native_rate, rate)[skip : skip + count]
            channel[: len(heard)] += heard
    return out


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is an error of the file."""
    try:
        yield
    except MetadataError:
        raise
    except Exception as error:
        raise MetadataError(
            f"{path}: the audio cannot be decoded ({first_line(error)}).",
            hint="Encode the file again, or leave its row out.",
        ) from error


@dataclass(frozen=True)
class _Piece:
    """Mixed samples at one sampling rate, zeros where the file has none at that rate."""

    origin: Fraction
    """The second of sample 0, a whole sample of this and of the wanted rate: resampling keeps its phase wherever a clip
    starts."""
    samples: NDArray[np.float32]
    """[channels, samples]"""


def _native_rate(path: str | Path) -> int:
    """That of the first decoded frame."""
    with open_sound(path) as container:
        first = next(container.decode(_sound_stream(container, path)), None)
        if first is None:
            raise MetadataError(f"{path}: the audio has no samples.", hint="Name a file with sound in audio_path.")
        return first.sample_rate


def _sound_stream(container: "InputContainer", path: str | Path) -> "AudioStream":
    if not container.streams.audio:
        raise MetadataError(f"{path} has no audio stream.", hint="Name a file with sound in audio_path.")
    return container.streams.audio[0]


def _native_audio(
    path: str | Path, start: Fraction, end: Fraction, rate: int, mix: _Mix
) -> tuple[dict[int, _Piece], Fraction]:
    """Mixed samples around [start, end) seconds by their sampling rate, and the second at which the audio ends.

    The rate is that of the decoded frames: a container may state half of it (HE-AAC), and it may change midway.
    Decoding begins at the start of the file: it takes 1 ms per 10 s of WAV, and seeking is not exact in mp3.
    """
    pieces: dict[int, _Piece] = {}
    with open_sound(path) as container:
        stream = _sound_stream(container, path)
        zero, stated = time_zero(container), stated_end(stream)
        timed = container.format.name in TIMED
        position, known = Fraction(0), False  # seconds since second 0
        for frame in container.decode(stream):
            native_rate = frame.sample_rate
            if frame.pts is not None and frame.time_base is not None:
                moment = frame.pts * frame.time_base - zero
                if container.format.name.startswith("mpeg"):
                    moment = (moment + MPEG_WRAP / 2) % MPEG_WRAP - MPEG_WRAP / 2
                if not known or (timed and abs(moment - position) > TIMESTAMP_JITTER):
                    position, known = moment, True
            if native_rate not in pieces:
                pieces[native_rate] = _empty_piece(mix.channels, start, end, native_rate, rate)
            piece = pieces[native_rate]
            _place(piece.samples, mix, frame, round((position - piece.origin) * native_rate))
            position += Fraction(frame.samples, native_rate)
            if position >= end + AUDIO_WARM_UP:
                break
    return pieces, position if stated is None else min(position, stated - zero)


def _empty_piece(channels: int, start: Fraction, end: Fraction, native_rate: int, rate: int) -> _Piece:
    grid = Fraction(1, np.gcd(native_rate, rate).item())  # seconds between common sampling points
    origin = max(Fraction(0), (start - AUDIO_WARM_UP) // grid * grid)
    return _Piece(origin, np.zeros((channels, int((end + AUDIO_WARM_UP - origin) * native_rate)), np.float32))


def _place(buffer: NDArray[np.float32], mix: _Mix, frame: "AudioFrame", at: int) -> None:
    """Write what falls into ``buffer`` of one decoded frame, mixed, from sample ``at``."""
    low, high = max(0, -at), min(frame.samples, buffer.shape[1] - at)
    if low < high:
        weights = mix.weights([channel.name for channel in frame.layout.channels])
        buffer[:, at + low : at + high] = weights @ _to_float(frame)[:, low:high]


def mono_weights(names: Sequence[str]) -> NDArray[np.float32]:
    """What each channel counts in the mono mix, float32 [1, channels], for speech to keep its level.

    Mono and the centre of surround sound, where films have their speech, count 1. The front left and right count 1/2: a
    voice that is on both keeps its level, in stereo as in 5.1. Surround channels count half the square root of a half
    (-9 dB), 3 dB less than the front ones as in ITU-R BS.775; low-frequency effects are left out. Channels that a file
    does not name are averaged, whatever their number.
    """
    if not {"FC", "FL"} & set(names):
        return np.full((1, len(names)), 1 / len(names), np.float32)
    return np.array([[CHANNEL_WEIGHTS.get(name, 0.5**1.5) for name in names]], np.float32)


def stereo_weights(names: Sequence[str]) -> NDArray[np.float32]:
    """What each channel counts on the left and on the right, float32 [2, channels].

    Mono is on both sides, and stereo as it is. Of surround sound, the centre is on both sides and what is beside or
    behind the listener on its own, 3 dB quieter than the fronts as in ITU-R BS.775; low-frequency effects are left out.
    Channels that a file does not name are on both sides, but two (of most WAV files) are left and right. A side's
    weights add up to 1 at most, so that it cannot clip.
    """
    if len(names) == 2 and names[0] == names[1]:
        names = ("FL", "FR")
    weights = np.array([_sides(name) for name in names], np.float32).T
    return weights / np.float32(weights.sum(1).max() or 1)


def _sides(name: str) -> tuple[float, float]:
    if name.startswith("LFE"):
        return 0.0, 0.0
    level = 1.0 if name in ("FL", "FR") else 0.5**0.5
    return (0.0 if name.endswith("R") else level), (0.0 if name.endswith("L") else level)


def _to_float(frame: "AudioFrame") -> NDArray[np.float32]:
    """[channels, samples] float32 in [-1, 1], whatever the sample format."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, len(frame.layout.channels)).T
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128.0) / 128.0
    if array.dtype.kind == "i":
        return array.astype(np.float32) / np.float32(2 ** (8 * array.dtype.itemsize - 1))
    return array.astype(np.float32)


def _resample(samples: NDArray[np.float32], native_rate: int, rate: int) -> NDArray[np.float32]:
    """FFmpeg's polyphase resampler over the whole piece at once; output sample 0 is input sample 0."""
    if native_rate == rate or not len(samples):
        return samples
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts = native_rate, 0
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    pieces: Iterator[av.AudioFrame] = (piece for given in (frame, None) for piece in resampler.resample(given))
    return np.concatenate([piece.to_ndarray()[0] for piece in pieces])
