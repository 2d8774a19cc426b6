"""From a request to a video: what the encoders read, the frames, and where the sound begins."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import outputs_of, prepared
from vfun_cli.modeling.adapter import ModelAdapter, VideoRequest
from vfun_cli.modeling.encoders.frozen import Output


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


def encoded(adapter: ModelAdapter, request: VideoRequest, cache: Cache | None = None) -> dict[str, Output]:
    """What the encoders make of a request; from the cache as far as that has it, into which the rest goes.

    Raises:
        MetadataError: media that cannot be decoded.
    """
    sample = prepared(adapter.inputs_to_sample(request, adapter.options), cache)
    return outputs_of(adapter.encoders, [sample], None if cache is None else cache.write)[0]


def film_of(adapter: ModelAdapter, request: VideoRequest, frames: list[Tensor]) -> Film:
    """The segments as one video, which ends where its sound does."""
    pixels, start = torch.cat(frames), adapter.heard_from(request)
    if request.audio is not None:
        pixels = pixels[: max(1, math.ceil((request.seconds - start) * request.fps))]
    return Film(pixels=pixels, fps=request.fps, heard_from=start)


def on_host(outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Encoders' outputs that wait for their turn without the device's memory."""
    return {name: {part: tensor.cpu() for part, tensor in output.items()} for name, output in outputs.items()}
