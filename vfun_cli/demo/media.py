"""A tiny data set of real encoded media, made on the spot: moving shapes, tones in syllables, control clips."""

import json
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NTSC = Fraction(30000, 1001)


@dataclass(frozen=True, kw_only=True)
class DemoClip:
    """What one demo clip looks like."""

    width: int
    height: int
    frames: int
    fps: Fraction
    audio_rate: int
    text: str


CLIPS = (
    DemoClip(width=256, height=256, frames=88, fps=Fraction(25), audio_rate=16000,
             text="A red ball rolls in a circle while a voice counts slowly."),
    DemoClip(width=320, height=192, frames=64, fps=Fraction(16), audio_rate=44100,
             text="Two coloured discs drift across a blue evening sky."),
    DemoClip(width=192, height=320, frames=80, fps=NTSC, audio_rate=16000,
             text="A tall picture of a green sphere bouncing up and down as someone speaks."),
    DemoClip(width=256, height=256, frames=72, fps=NTSC, audio_rate=44100,
             text="Orange and violet shapes pass each other in front of a soft gradient."),
    DemoClip(width=320, height=192, frames=90, fps=Fraction(25), audio_rate=16000,
             text="A yellow disc swings like a pendulum to the rhythm of speech."),
    DemoClip(width=192, height=320, frames=60, fps=Fraction(16), audio_rate=16000,
             text="A small white ball falls slowly through a dark room."),
)  # fmt: skip
"""Square, wide and tall; whole and fractional frame rates; two audio rates."""


def build_media(folder: Path, *, control: bool, audio: bool, images: bool, seed: int = 0) -> Path:
    """Write ``metadata.json`` and ``train/``, on request ``control/``, ``wav/`` and still images; returns the metadata.

    The folders are named as in the published examples. Equal arguments give equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, clip in enumerate(CLIPS, 1):
        name = f"{number:08d}"
        frames, control_frames = draw(clip, np.random.default_rng([seed, number]))
        row: dict[str, Any] = {"file_path": f"train/{name}.mp4"}
        _write_video(folder / row["file_path"], frames, clip.fps)
        if audio:
            row["audio_path"] = f"wav/{name}.wav"
            samples = speak(clip, np.random.default_rng([seed, number, 1]))
            _write_wav(folder / row["audio_path"], samples, clip.audio_rate)
        if control:
            row["control_file_path"] = f"control/{name}.mp4"
            _write_video(folder / row["control_file_path"], control_frames, clip.fps)
        rows.append(row | {"text": clip.text, "type": "video"})
        if images and number <= 2:
            rows.append(_still(folder, f"{number + len(CLIPS):08d}", frames[0], control_frames[0], control, clip.text))
    path = folder / "metadata.json"
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return path


def draw(clip: DemoClip, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The clip and its control (the outlines alone, white on black), both [F, H, W, 3]."""
    count, height, width = clip.frames, clip.height, clip.width
    top, bottom = rng.uniform(20, 140, (2, 1, 1, 3))
    fade = np.linspace(0, 1, height)[:, None, None]
    background = np.broadcast_to(top * (1 - fade) + bottom * fade, (height, width, 3)).astype(np.uint8)
    frames = np.repeat(background[None], count, axis=0)
    outlines = np.zeros_like(frames)
    for _ in range(2):
        colour = rng.uniform(120, 255, 3)
        radius = int(rng.uniform(0.12, 0.2) * min(height, width))
        turns = rng.uniform(0, 1) + rng.uniform(0.8, 1.6) * np.arange(count) / count
        tops = (height * (0.5 + 0.3 * np.sin(2 * np.pi * turns))).astype(int) - radius
        lefts = (width * (0.5 + 0.3 * np.cos(2 * np.pi * turns))).astype(int) - radius
        yy, xx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        distance = np.hypot(yy, xx)
        inside, edge = np.clip(radius - distance, 0, 1)[..., None], np.abs(distance - radius + 2) < 1.5
        for index, (y, x) in enumerate(zip(tops, lefts, strict=True)):
            box = index, slice(y, y + 2 * radius + 1), slice(x, x + 2 * radius + 1)
            frames[box] = (frames[box] * (1 - inside) + colour * inside).astype(np.uint8)
            outlines[box][edge] = 255
    return frames, outlines


def speak(clip: DemoClip, rng: np.random.Generator) -> NDArray[np.float32]:
    """Speech-like sound exactly as long as the clip: a pitch with overtones, in four syllables a second, [samples]."""
    count = round(clip.frames / clip.fps * clip.audio_rate)
    seconds = np.arange(count) / clip.audio_rate
    pitch = rng.uniform(100, 220) * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * seconds))
    phase = 2 * np.pi * np.cumsum(pitch) / clip.audio_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 8))
    syllables = np.clip(np.sin(2 * np.pi * 2 * seconds), 0, None) ** 0.5
    noise = rng.normal(0, 0.02, count)
    return (0.25 * voice * syllables + noise).astype(np.float32)


def _still(
    folder: Path, name: str, frame: NDArray[np.uint8], outline: NDArray[np.uint8], control: bool, text: str
) -> dict[str, Any]:
    from PIL import Image

    row = {"file_path": f"train/{name}.jpg"}
    Image.fromarray(frame).save(folder / row["file_path"], quality=92)
    if control:
        row["control_file_path"] = f"control/{name}.jpg"
        Image.fromarray(outline).save(folder / row["control_file_path"], quality=92)
    return row | {"text": text, "type": "image"}


def _write_video(path: Path, frames: NDArray[np.uint8], fps: Fraction) -> None:
    """[F, H, W, 3] to H.264 (MPEG-4 where this build of PyAV has no x264)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with_x264 = "libx264" in av.codecs_available
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264" if with_x264 else "mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: the slices of several would make the bytes depend on the machine.
        stream.options = {"crf": "18", "preset": "ultrafast", "threads": "1"} if with_x264 else {"qscale": "3"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_wav(path: Path, samples: NDArray[np.float32], rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
