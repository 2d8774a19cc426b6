"""From a request to a video: what the encoders read, the frames, and where the sound begins."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfun_cli.disks.abilities import naming
from vfun_cli.encoding.encode import outputs_of, prepared
from vfun_cli.files import PICTURE, VIDEO, partial_of
from vfun_cli.modeling.adapter import ModelAdapter, VideoRequest
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.inputs import AudioSegment
from vfun_cli.modeling.media.sound import read_sound
from vfun_cli.modeling.media.writing import Sound, write_png, write_video
from vfun_cli.modeling.transfer import upload
from vfun_cli.run.rundir import write_atomically


@dataclass(frozen=True, kw_only=True)
class Film:
    """A video as it is shown."""

    pixels: Tensor
    """[F, 3, H, W] in [-1, 1], on the host."""
    fps: Fraction
    heard_from: Fraction
    """The second of the request's sound that is heard with the first frame."""

    @property
    def seconds(self) -> Fraction:
        """How long it is shown."""
        return len(self.pixels) / self.fps


def encoded(adapter: ModelAdapter, request: VideoRequest) -> dict[str, Output]:
    """What the encoders make of a request.

    Raises:
        MetadataError: media that cannot be decoded.
    """
    return outputs_of(adapter.encoders, [prepared(adapter.inputs_to_sample(request, adapter.options))])[0]


def film_of(adapter: ModelAdapter, request: VideoRequest, frames: list[Tensor]) -> Film:
    """The segments as one video, which ends where its sound does."""
    pixels, start = torch.cat(frames), adapter.heard_from(request)
    if request.audio is not None:
        pixels = pixels[: max(1, math.ceil((request.seconds - start) * request.fps))]
    return Film(pixels=pixels, fps=request.fps, heard_from=start)


def moved(outputs: Mapping[str, Output], device: torch.device) -> dict[str, Output]:
    """Encoders' outputs on a device; on the host they wait for their turn without its memory."""
    return {name: {part: upload(tensor, device) for part, tensor in output.items()} for name, output in outputs.items()}


def described(request: VideoRequest) -> dict[str, Any]:
    """What a video was made of, for the file beside it."""
    return {
        "schema": 1,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt if request.is_guided else "",
        "seed": request.key.seed,
        "row": request.key.row,
        "guidance": request.guidance,
        "frames": request.frames,
        "height": request.height,
        "width": request.width,
        "fps": str(request.fps),
    }


def write_film(film: Film, stem: Path, facts: Mapping[str, Any], sound: AudioSegment | None = None) -> Path:
    """A video or, of one frame, a picture, with ``stem``.json beside it, which comes last: what has one is whole.

    Args:
        sound: what is heard, as the request has it.

    Raises:
        MetadataError: the sound cannot be read.
        OSError: the disk cannot take it.
    """
    return write_shown(film, stem, facts, None if sound is None else heard(film, sound))


def write_shown(
    film: Film, stem: Path, facts: Mapping[str, Any], sound: Sound | None, pause: Callable[[], None] = lambda: None
) -> Path:
    """The same with a sound that was read: it begins with the film, and ends with it at the latest.

    ``pause`` is called before each picture; what it raises leaves no half a video.

    Raises:
        OSError: the disk cannot take it.
    """
    still = len(film.pixels) == 1
    path = stem.with_name(stem.name + (PICTURE if still else VIDEO))
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            if still:
                write_png(partial, film.pixels)
            else:
                write_video(partial, film.pixels, film.fps, sound, pause)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    write_facts(stem, facts)
    return path


def write_failure(stem: Path, facts: Mapping[str, Any], reason: str) -> None:
    """Where a video would be, why there is none; an earlier one goes.

    Raises:
        OSError: the disk cannot take it.
    """
    for kind in (PICTURE, VIDEO):
        stem.with_name(stem.name + kind).unlink(missing_ok=True)
    write_facts(stem, {**facts, "error": reason})


def heard(film: Film, sound: AudioSegment) -> Sound:
    """The sound of a film, which ends with it at the latest.

    Raises:
        MetadataError: it cannot be read.
    """
    seconds = min(film.seconds, sound.available - film.heard_from)
    return read_sound(sound.media.path, sound.start + film.heard_from, seconds)


def write_facts(stem: Path, facts: Mapping[str, Any]) -> None:
    """What is known of a video, beside it."""
    write_atomically(stem.with_name(stem.name + ".json"), json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
