"""Sound as mono samples, by the clock of the picture."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from vfun_cli.errors import MetadataError, first_line
from vfun_cli.metadata.sounds import time_zero

AUDIO_TAIL_TOLERANCE = Fraction(20, 1000)
"""Seconds of audio that may be missing at the end of a clip (less than one video frame); filled with silence."""
AUDIO_WARM_UP = Fraction(1, 20)
"""Seconds decoded on both sides of the wanted audio, so that the resampling filter never sees an edge."""
TIMESTAMP_JITTER = Fraction(20, 1000)
"""Audio timestamps closer than this to the running sample count are rounding of the container's clock, not gaps."""


def read_audio(path: str | Path, start: Fraction, duration: Fraction, rate: int = 16000) -> NDArray[np.float32]:
    """Mono audio [round(duration * rate)] float32 of ``start`` .. ``start + duration`` seconds, sampled at ``rate``.

    Second 0 is the first video frame in a file that has video, otherwise the first sample. Channels are averaged.

    Raises:
        MetadataError: there is no audio stream, or it ends more than AUDIO_TAIL_TOLERANCE too early.
    """
    first, count = round(start * rate), round(duration * rate)
    if first < 0 or count < 0:
        raise ValueError(f"audio of {float(duration)} s from second {float(start)}")
    try:
        wanted = Fraction(first, rate), Fraction(first + count, rate)
        native, native_rate, origin, end = _native_audio(path, *wanted, rate)
    except MetadataError:
        raise
    except Exception as error:
        raise MetadataError(
            f"{path}: the audio cannot be decoded ({type(error).__name__}: {first_line(error)}).",
            hint="Encode the file again, or leave its row out.",
        ) from error
    missing = wanted[1] - end
    if missing > AUDIO_TAIL_TOLERANCE:
        raise MetadataError(
            f"{path}: audio from {float(start):.3f} s to {float(start + duration):.3f} s is needed, "
            f"and the file ends at {float(end):.3f} s.",
            hint="Use a longer file, or a shorter clip.",
        )
    samples = _resample(native, native_rate, rate)
    skip = first - round(origin * rate)  # exact: origin lies on both sampling grids
    out = np.zeros(count, np.float32)
    piece = samples[skip : skip + count]
    out[: len(piece)] = piece
    return out


def _native_audio(
    path: str | Path, start: Fraction, end: Fraction, rate: int
) -> tuple[NDArray[np.float32], int, Fraction, Fraction]:
    """Decoded mono samples around [start, end) seconds at the file's own rate.

    Returns (samples, their rate, the second of sample 0, the second at which the audio ends). Sample 0 lies on a
    whole sample of both rates, so that resampling to ``rate`` keeps its phase wherever a clip starts.
    Decoding begins at the start of the file: it takes 1 ms per 10 s of WAV, and seeking is not exact in mp3.
    """
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise MetadataError(f"{path} has no audio stream.", hint="Name a file with sound in audio_path.")
        stream = container.streams.audio[0]
        native_rate = stream.rate
        grid = Fraction(1, np.gcd(native_rate, rate).item())  # seconds between common sampling points
        origin = max(Fraction(0), (start - AUDIO_WARM_UP) // grid * grid)
        begin, stop = int(origin * native_rate), int((end + AUDIO_WARM_UP) * native_rate)  # samples
        buffer = np.zeros(stop - begin, np.float32)
        zero = time_zero(container)
        position, known = 0, False  # samples since second 0
        for frame in container.decode(stream):
            if frame.sample_rate != native_rate:
                raise MetadataError(f"{path}: the sampling rate changes from {native_rate} to {frame.sample_rate}.")
            if frame.pts is not None and frame.time_base is not None:
                stated = (frame.pts * frame.time_base - zero) * native_rate
                if not known or abs(stated - position) > TIMESTAMP_JITTER * native_rate:
                    position, known = round(stated), True
            _place(buffer, frame, position - begin)
            position += frame.samples
            if position >= stop:
                break
    return buffer, native_rate, origin, Fraction(position, native_rate)


def _place(buffer: NDArray[np.float32], frame: AudioFrame, at: int) -> None:
    """Write what falls into ``buffer`` of one decoded frame, averaged over its channels, from sample ``at``."""
    low, high = max(0, -at), min(frame.samples, len(buffer) - at)
    if low < high:
        buffer[at + low : at + high] = _to_float(frame).mean(axis=0)[low:high]


def _to_float(frame: AudioFrame) -> NDArray[np.float32]:
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
    frame = AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts = native_rate, 0
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    pieces: Iterator[AudioFrame] = (piece for given in (frame, None) for piece in resampler.resample(given))
    return np.concatenate([piece.to_ndarray()[0] for piece in pieces])
