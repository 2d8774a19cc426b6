"""Rotary tables over (frames, height, width) for models that stretch every clip onto one base grid.

CogVideoX 1.0 and EasyAnimate were trained with end-point-exclusive positions, ``start + i * (stop - start) / n``. The
helper of diffusers 0.42 ends at ``stop * (n - 1) / n`` instead, which is another grid whenever the crop does not start
at zero: every aspect but 3:2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0


class Region(NamedTuple):
    """Part of the base grid, in tokens; ``bottom`` and ``right`` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int


def crop_region(height: int, width: int, base_height: int, base_width: int) -> Region:
    """Where a grid of ``height x width`` tokens lies when it is scaled to fit the base grid and centred in it.

    Half tokens round to even, as the released models were trained: 32 x 32 in 30 x 45 is columns 8 to 38.
    """
    if height / width > base_height / base_width:
        fitted_height, fitted_width = base_height, round(base_height / height * width)
    else:
        fitted_height, fitted_width = round(base_width / width * height), base_width
    top = round((base_height - fitted_height) / 2)
    left = round((base_width - fitted_width) / 2)
    return Region(top, left, top + fitted_height, left + fitted_width)


def positions(start: float, stop: float, count: int, device: torch.device | None = None) -> Tensor:
    """``count`` positions from ``start`` towards ``stop``, the end point left out; float32 [count]."""
    return start + torch.arange(count, dtype=torch.float32, device=device) * ((stop - start) / count)


def rotary_table(
    head_dim: int,
    frames: int,
    height: int,
    width: int,
    *,
    base: tuple[int, int],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [frames * height * width, head_dim], frames slowest, every value twice in a row.

    A quarter of the channels turns with time, three eighths each with height and width. ``base`` is the (height,
    width) in tokens of the grid the model was trained on.
    """
    region = crop_region(height, width, *base)
    time_dim, side_dim = head_dim // 4, head_dim // 8 * 3
    angles = [
        _angles(positions(0, frames, frames, device), time_dim)[:, None, None].expand(-1, height, width, -1),
        _angles(positions(region.top, region.bottom, height, device), side_dim)[None, :, None].expand(
            frames, -1, width, -1
        ),
        _angles(positions(region.left, region.right, width, device), side_dim)[None, None].expand(
            frames, height, -1, -1
        ),
    ]
    table = torch.cat(angles, dim=-1).flatten(0, 2).repeat_interleave(2, dim=-1)
    return table.cos(), table.sin()


def _angles(position: Tensor, dim: int) -> Tensor:
    """[n] positions to [n, dim / 2] angles."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    return torch.outer(position, 1.0 / THETA**exponents)
