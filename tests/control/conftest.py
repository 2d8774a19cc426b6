"""Videos and pictures whose edges are known."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def frame(number: int, height: int, width: int) -> np.ndarray:
    """[h, w, 3] uint8: a square that moves, on a ramp."""
    pixels = np.repeat(np.linspace(40, 90, width)[None, :, None], height, axis=0).repeat(3, axis=2).astype(np.uint8)
    begin = 4 + number % 12
    pixels[6 : height - 8, begin : begin + width // 3] = (220, 200, 60)
    return pixels


def write_clip(
    path: Path,
    *,
    frames: int = 9,
    size: tuple[int, int] = (48, 64),
    rate: Fraction = Fraction(25),
    times: Sequence[int] | None = None,
) -> Path:
    """A video of (height, width); its pictures are shown at these ticks of 1/600 s, or evenly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        stream.options = {"crf": "8", "threads": "1", "bf": "0"}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(frame(number, height, width), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 600)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_picture(path: Path, size: tuple[int, int] = (51, 67)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame(3, *size)).save(path)
    return path
