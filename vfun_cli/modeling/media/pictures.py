"""Pictures as clips of one frame."""

from pathlib import Path

import torch
from torch import Tensor

from vfun_cli.metadata.upright import upright_rgb
from vfun_cli.modeling.media.faults import undecodable
from vfun_cli.modeling.media.sizes import resize_and_crop


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """One image as a clip of one frame: float32 [1, 3, height, width] in [-1, 1], as a viewer shows it.

    Raises:
        MetadataError: the picture cannot be read.
    """
    try:
        array = upright_rgb(path)  # [h, w, 3]
    except Exception as error:  # Pillow's plugins raise many kinds on broken files (OSError, SyntaxError, struct.error)
        raise undecodable(path, 0, error) from error
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].to(torch.float32).div_(127.5).sub_(1.0)
    return resize_and_crop(pixels, height, width)
