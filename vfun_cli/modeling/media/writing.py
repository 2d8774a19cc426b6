"""Pixels and samples into files that people look at and listen to."""

import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def write_video(path: str | Path, pixels: Tensor, fps: Fraction) -> None:
    """[F, 3, H, W] in [-1, 1] to an H.264 mp4 (MPEG-4 where this build of PyAV has no x264)."""
    import av

    frames = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with_x264 = "libx264" in av.codecs_available
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264" if with_x264 else "mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        # Subsampled chroma is what every player shows, but it needs even sides.
        even = stream.height % 2 == 0 and stream.width % 2 == 0
        stream.pix_fmt = "yuv420p" if even or not with_x264 else "yuv444p"
        stream.options = {"crf": "12", "preset": "veryfast"} if with_x264 else {"qscale": "2"}
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode())


def write_wav(path: str | Path, samples: NDArray[np.float32], rate: int) -> None:
    """Mono float samples in [-1, 1] to a 16-bit WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def write_png(path: str | Path, pixels: Tensor) -> None:
    """[3, H, W] (or one frame, [1, 3, H, W]) in [-1, 1] to a PNG."""
    image = pixels[0] if pixels.ndim == 4 else pixels
    array = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)
