"""Decoded pixels: bytes as far as the device, numbers there.

A decoded clip is uint8 [F, 3, H, W], a quarter of what it takes as float32 in the loader's queues, in /dev/shm and on
the bus. What is put together from several (black, grey, a history) stays in pieces until the device has them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfun_cli.modeling.transfer import upload


@dataclass(frozen=True)
class Pieces:
    """A clip in consecutive parts [f, 3, H, W]: uint8, or float32 of one repeated value (see ``constant``)."""

    parts: tuple[Tensor, ...]


LoadedClip = Tensor | Pieces
"""uint8 [F, 3, H, W], or float32 in [-1, 1], or pieces of both."""


def constant(value: float, frames: int, height: int, width: int) -> Tensor:
    """float32 [frames, 3, height, width] of one value, which takes the memory of one."""
    return torch.full((1, 1, 1, 1), value).expand(frames, 3, height, width)


def joined(clips: "list[LoadedClip]") -> Pieces:
    """Clips one after another."""
    return Pieces(tuple(part for clip in clips for part in (clip.parts if isinstance(clip, Pieces) else (clip,))))


def clip_shape(clip: LoadedClip) -> tuple[int, ...]:
    """[F, 3, H, W]"""
    parts = clip.parts if isinstance(clip, Pieces) else (clip,)
    return (sum(len(part) for part in parts), *parts[0].shape[1:])


def float_pixels(clip: LoadedClip, device: torch.device | str = "cpu") -> Tensor:
    """float32 [F, 3, H, W] in [-1, 1] on ``device``: byte b is b / 127.5 - 1."""
    parts = clip.parts if isinstance(clip, Pieces) else (clip,)
    moved = [_scaled(part, torch.device(device)) for part in parts]
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def readable(value: Any) -> Any:
    """A decoded clip as floats on the host; any other input of an encoder as it is."""
    decoded = isinstance(value, Pieces) or (isinstance(value, Tensor) and value.dtype == torch.uint8)
    return float_pixels(value) if decoded else value


def _scaled(part: Tensor, device: torch.device) -> Tensor:
    if part.dtype == torch.uint8:
        return upload(part, device).to(torch.float32).div_(127.5).sub_(1.0)
    if part.stride() == (0, 0, 0, 0):
        return torch.full(part.shape, part[0, 0, 0, 0].item(), device=device)
    return upload(part, device)
