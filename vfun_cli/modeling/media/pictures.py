"""Pictures as clips of one frame."""

from pathlib import Path

import torch
from torch import Tensor

from vfun_cli.metadata.upright import upright_rgb
from vfun_cli.modeling.media.faults import undecodable
from vfun_cli.modeling.media.sizes import resize_and_crop


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """One image as a clip of one frame: uint8 [1, 3, height, width], as a viewer shows it.

    Raises:
        MetadataError: the picture cannot be read.
    """
    try:
        array = upright_rgb(path)  # [h, w, 3]
    except Exception as error:  # Pillow's plugins raise many kinds on broken files (OSError, SyntaxError, struct.error)
        raise undecodable(path, 0, error) from error
    return resize_and_crop(torch.from_numpy(array).permute(2, 0, 1)[None], height, width)
