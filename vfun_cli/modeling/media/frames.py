"""Frames of videos."""

from collections.abc import Sequence
from pathlib import Path

import av
import decord
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfun_cli.errors import MetadataError
from vfun_cli.modeling.media.faults import undecodable
from vfun_cli.modeling.media.sizes import cover_size, resize_and_crop

DECODER_RESIZE_FROM = 2.5
"""Let decord shrink while decoding when the clip is at least this many times larger than the target."""
DECODER_RESIZE_TO = 2.0
"""… to this multiple of the target, before the exact resize. 720p to 448x256 (24 frames of coloured, hard-edged
waves, one core): 0.22 s instead of 0.77 s, mean difference 0.72/255, largest 20/255 on saturated edges; most of it is
there without the shortcut too, from another chroma interpolation. A multiple of 1.25 gave 2.0 and 169."""


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
        raise undecodable(path, _first_bad_frame(reader, indices), error) from error
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
    return resize_and_crop(pixels, height, width, cover)


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
        raise undecodable(path, 0, error) from error


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
