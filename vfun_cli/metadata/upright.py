"""The pixels of a picture as a viewer shows it: upright, opaque, in sRGB."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from vfun_cli.metadata.pictures import COLOURS, is_transparent, open_picture, orientation

TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
"""By EXIF orientation; 1 is upright."""


def upright_rgb(path: str | Path) -> NDArray[np.uint8]:
    """A picture as uint8 [h, w, 3]; its size is the one that ``probe_picture`` tells.

    Raises:
        ProbeError: a picture that is not read, with its code.
        Exception: of any kind, from Pillow, where the file is damaged.
    """
    with open_picture(path) as image:
        image.load()
        shown = _opaque_srgb(image)
        turn = TURNS.get(orientation(image))
        return np.array(shown if turn is None else shown.transpose(turn))


def _opaque_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        return _to_srgb(_grey_of_8_bits(image), profile)
    if image.mode == "La":  # premultiplied, and Pillow converts it to nothing else
        image = image.convert("LA")
    shown = _to_srgb(_in_mode(image, COLOURS[image.mode]), profile)
    if is_transparent(image):
        # White as pages, viewers and most trainers that look at alpha do; what hides below is often noise.
        shown = Image.composite(shown, Image.new("RGB", shown.size, "white"), image.convert("RGBA").getchannel("A"))
    return shown


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies, 0.8 GB of a phone's largest


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """16 bits a pixel (a TIFF may have 12 of them) by the whole range: 65535 is white, in some TIFFs 0 is."""
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(258) == (12,) else 65535
    grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray((255 - grey if tags.get(262) == 0 else grey).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """By the ICC profile, relative colorimetric with black point compensation; without one the pixels are sRGB.

    A profile that is broken, or for other pixels than these, is left aside.
    """
    if not profile:
        return _in_mode(image, "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), image.mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (OSError, ImageCms.PyCMSError):  # littlecms refuses it
        return _in_mode(image, "RGB")
    if image.mode == "RGB" and _changes_nothing(transform):
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is not in place
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether 125 colours stay as they are, but for rounding: most profiles are sRGB's, and cost more than decoding."""
    levels = np.linspace(0, 255, 5, dtype=np.uint8)
    chart = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(5, 25, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(chart), transform))
    return bool(np.abs(converted.astype(int) - chart).max() <= 1)
