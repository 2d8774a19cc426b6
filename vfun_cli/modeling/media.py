"""Pixels and samples in and out of media files, exact to the frame and to the audio sample.

Everything read comes back as float32: pixels in [-1, 1], [F, 3, H, W]; audio mono in [-1, 1], [samples].
A file that cannot be read is a MetadataError that names it; nothing is ever replaced by something else.
decord can hang on a broken file, so loaders call this where it can be killed.
"""

import wave
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import torch
from av.audio.frame import AudioFrame
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from vfun_cli.errors import MetadataError, first_line
from vfun_cli.metadata.probe import time_zero

DECODER_RESIZE_FROM = 2.5
"""Let decord shrink while decoding when the clip is at least this many times larger than the target."""
DECODER_RESIZE_TO = 2.0
"""… to this multiple of the target, before the exact resize. 720p to 448x256 (24 frames of coloured, hard-edged
waves, one core): 0.22 s instead of 0.77 s, mean difference 0.72/255, largest 20/255 on saturated edges; most of it is
there without the shortcut too, from another chroma interpolation. A multiple of 1.25 gave 2.0 and 169."""
AUDIO_TAIL_TOLERANCE = Fraction(20, 1000)
"""Seconds of audio that may be missing at the end of a clip (less than one video frame); filled with silence."""
AUDIO_WARM_UP = Fraction(1, 20)
"""Seconds decoded on both sides of the wanted audio, so that the resampling filter never sees an edge."""
TIMESTAMP_JITTER = Fraction(20, 1000)
"""Audio timestamps closer than this to the running sample count are rounding of the container's clock, not gaps."""


def cover_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers the target; integer arithmetic, fractions dropped."""
    if to_height * width > to_width * height:
        return to_height, width * to_height // height
    return height * to_width // width, to_width


def resize_and_crop(pixels: Tensor, height: int, width: int, cover: tuple[int, int] | None = None) -> Tensor:
    """[F, 3, h, w] float to [F, 3, height, width]: antialiased bilinear resize to ``cover``, then the centre.

    ``cover`` is given when the decoder has shrunk the frames already, so that rounding there cannot shift the crop.
    """
    size = cover or cover_size(pixels.shape[-2], pixels.shape[-1], height, width)
    if size != tuple(pixels.shape[-2:]):
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return pixels[..., top : top + height, left : left + width].contiguous()


def read_frames(path: str | Path, indices: Sequence[int], height: int, width: int) -> Tensor:
    """The frames of a video at ``indices``, in that order: float32 [F, 3, height, width] in [-1, 1].

    Raises:
        MetadataError: the file cannot be decoded, or is too short; it names file and frame.
    """
    reader, cover = _open_video(path, height, width)
    if bad := [index for index in indices if not 0 <= index < len(reader)]:
        raise MetadataError(
            f"{path}: frame {bad[0]} is needed, and the file has {len(reader)} frames.",
            hint="The file is shorter than its header says.",
        )
    try:  # [F, h, w, 3] uint8
        frames = _rotated_frames(path, indices) if _is_rotated(reader) else reader.get_batch(list(indices)).asnumpy()
    except Exception as error:  # decord raises whatever its C++ threw
        raise _undecodable(path, _first_bad_frame(reader, indices), error) from error
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
    return resize_and_crop(pixels, height, width, cover)


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """One image as a clip of one frame: float32 [1, 3, height, width] in [-1, 1], rotated as its EXIF data says."""
    try:
        with Image.open(path) as image:
            array = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # [h, w, 3]
    except Exception as error:  # Pillow's plugins raise many kinds on broken files (OSError, SyntaxError, struct.error)
        raise _undecodable(path, 0, error) from error
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].to(torch.float32).div_(127.5).sub_(1.0)
    return resize_and_crop(pixels, height, width)


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


def write_video(path: str | Path, pixels: Tensor, fps: Fraction) -> None:
    """[F, 3, H, W] in [-1, 1] to an H.264 mp4 (MPEG-4 where this build of PyAV has no x264)."""
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


def _open_video(path: str | Path, height: int, width: int) -> tuple["decord.VideoReader", tuple[int, int]]:
    """A decord reader, shrinking while it decodes when the clip is much larger than ``height`` x ``width``.

    Also the (height, width) that covers the target in the clip's own aspect.
    One thread a reader: the loader already runs a process per clip.
    """
    decord.logging.set_level(decord.logging.QUIET)  # the error says it; FFmpeg would say it again on stderr
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        full_height, full_width = reader[0].shape[:2]
        reader.seek(0)
        cover = cover_size(full_height, full_width, height, width)
        if full_height < cover[0] * DECODER_RESIZE_FROM or _is_rotated(reader):
            return reader, cover
        # Even sizes: swscale is slower and less exact on odd ones.
        small = [2 * round(side * DECODER_RESIZE_TO / 2) for side in cover]
        return decord.VideoReader(str(path), height=small[0], width=small[1], num_threads=1), cover
    except Exception as error:  # decord raises whatever its C++ threw
        raise _undecodable(path, 0, error) from error


def _is_rotated(reader: "decord.VideoReader") -> bool:
    """Whether the file is to be shown rotated: decord then returns four channels in false colours."""
    channels: int = reader[0].shape[2]
    reader.seek(0)
    return channels != 3


def _rotated_frames(path: str | Path, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Frames of a file recorded on its side (phones), upright, [F, h, w, 3]; decoded from the start with PyAV."""
    found: dict[int, NDArray[np.uint8]] = {}
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in indices:
                found[index] = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            if index >= max(indices):
                break
    return np.stack([found[index] for index in indices])


def _first_bad_frame(reader: "decord.VideoReader", indices: Sequence[int]) -> int:
    for index in sorted(indices):
        try:
            reader[index]
        except Exception:  # the one we are looking for
            return index
    return min(indices)


def _undecodable(path: str | Path, frame: int, error: Exception) -> MetadataError:
    why = str(error).strip().splitlines() or [type(error).__name__]
    exists = Path(path).is_file()
    return MetadataError(
        f"{path}: frame {frame} cannot be decoded ({why[-1][:200]})." if exists else f"{path}: there is no such file.",
        hint="Encode the file again, or leave its row out.",
    )


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
