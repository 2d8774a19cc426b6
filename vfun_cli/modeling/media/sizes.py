"""The one rule by which pictures are brought to a training size: cover it, then cut the centre."""

from torch import Tensor
from torch.nn import functional


def cover_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers the target; integer arithmetic, fractions dropped."""
    if to_height * width > to_width * height:
        return to_height, width * to_height // height
    return height * to_width // width, to_width


def resize_and_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """[F, 3, h, w] to [F, 3, height, width] of the same dtype: antialiased bilinear resize, then the centre.

    Of uint8 in channels-last order, torch takes 0.8 ms for a 720p picture to 448x256 on one core, a sixth of float32;
    both directions are rounded to bytes, which moves a value by at most one.
    """
    size = cover_size(pixels.shape[-2], pixels.shape[-1], height, width)
    if size != tuple(pixels.shape[-2:]):
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return pixels[..., top : top + height, left : left + width].contiguous()
