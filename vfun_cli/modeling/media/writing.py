"""Pixels and samples into files that people look at and listen to."""

import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vfun_cli.modeling.media.encoder import PLAYED_AT_ONCE, add_video

if TYPE_CHECKING:
    from av.packet import Packet

Sound = tuple[NDArray[np.float32], int]
"""Samples in [-1, 1], mono [samples] or [1 or 2, samples], and their sampling rate."""
AAC_RATE = 48000
"""What sound of a sampling rate that AAC does not have is written at."""


def write_video(
    path: str | Path,
    pixels: Tensor,
    fps: Fraction,
    sound: Sound | None = None,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """[F, 3, H, W] in [-1, 1] to an mp4 that browsers play: H.264 (MPEG-4 where this build of PyAV has no x264).

    Sound begins with the first picture, ends with the last one at the latest, and is AAC. ``pause`` is called before
    each picture.
    """
    import av

    with av.open(str(path), "w", format="mp4", options=PLAYED_AT_ONCE) as container:
        video = add_video(container, height=pixels.shape[2], width=pixels.shape[3], fps=fps)
        if sound is not None:  # first: all streams must be there before a packet is given to the container
            samples, rate = np.atleast_2d(sound[0]), sound[1]
            container.mux(_encoded_sound(container, samples[:, : round(len(pixels) / fps * rate)], rate))
        for picture in pixels:
            pause()
            container.mux(video.encode(av.VideoFrame.from_ndarray(_picture_bytes(picture), format="rgb24")))
        container.mux(video.encode())


def _encoded_sound(container: Any, samples: NDArray[np.float32], rate: int) -> "list[Packet[Any]]":
    """Packets of samples [1 or 2, samples]; the encoder's 1024 samples of delay come before second 0."""
    import av

    layout = {1: "mono", 2: "stereo"}[len(samples)]
    rates = av.Codec("aac", "w").audio_rates or []
    stream = container.add_stream("aac", rate=rate if rate in rates else AAC_RATE, layout=layout)
    stream.bit_rate = len(samples) * min(96_000, 4 * stream.rate)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return [*stream.encode(frame), *stream.encode()]


def write_wav(path: str | Path, samples: NDArray[np.float32], rate: int) -> None:
    """Mono float samples in [-1, 1] to a 16-bit WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def write_png(path: str | Path, pixels: Tensor) -> None:
    """[3, H, W] (or one frame, [1, 3, H, W]) in [-1, 1] to a PNG."""
    Image.fromarray(_picture_bytes(pixels[0] if pixels.ndim == 4 else pixels)).save(path)


def byte_pixels(pixels: Tensor) -> Tensor:
    """uint8 of values in [-1, 1], of any shape: what ``pixels.float_pixels`` turns back."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _picture_bytes(picture: Tensor) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of one picture [3, H, W] in [-1, 1]."""
    array: NDArray[np.uint8] = byte_pixels(picture).permute(1, 2, 0).contiguous().cpu().numpy()
    return array
