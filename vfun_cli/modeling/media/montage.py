"""Clips and frames beside one another, to be compared by eye."""

import torch
from torch import Tensor


def beside(left: Tensor, right: Tensor) -> Tensor:
    """[F, 3, H, W + W'] of two clips [F, 3, H, W] and [F, 3, H, W'] of equally many frames of one height."""
    return torch.cat([left, right], dim=3)


def contact_sheet(pixels: Tensor, count: int) -> Tensor:
    """[3, H, count * W]: evenly spaced frames of a clip [F, 3, H, W], from the first to the last, from left to right.

    A clip of fewer frames is shown whole. Of one, it is the first.
    """
    shown = torch.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().long()
    return torch.cat(list(pixels[shown]), dim=2)
