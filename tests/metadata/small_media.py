"""Small real media, encoded for the metadata tests, and one good row over them."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vfun_cli.metadata.fields import MetadataField

SPEECH_FIELDS = (
    MetadataField(name="file_path", media="visual"),
    MetadataField(name="audio_path", media="audio"),
    MetadataField(name="control_file_path", media="control", required=False),
)
ROW = {
    "file_path": "train/1.mp4",
    "audio_path": "wav/1.wav",
    "control_file_path": "control/1.mp4",
    "text": "A ball rolls.",
    "type": "video",
}


def encode_video(
    path: Path, *, frames: int = 24, width: int = 64, height: int = 48, fps: Fraction | int = 24,
    times: list[int] | None = None, aspect: Fraction | None = None, options: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Moving bars; ``times`` are presentation times in 1/1200 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "threads": "1", "g": "8"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times:
            stream.codec_context.time_base = Fraction(1, 1200)
        for index in range(frames):
            picture = np.full((height, width, 3), 40, np.uint8)
            picture[:, 2 * index % width :: 16] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1200)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path, *, seconds: float = 1.0, rate: int = 16000, level: float = 0.3, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = level * np.sin(np.arange(round(seconds * rate)) * 0.2)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples * 32767, channels).astype("<i2").tobytes())
    return path
