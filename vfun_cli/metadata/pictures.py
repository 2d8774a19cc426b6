"""Which pictures are read, and what their headers say."""

import os
import re
import warnings
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli.files import NotRegular, regular_status
from vfun_cli.metadata.facts import ProbeError, VisualFacts

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""Pillow's names of what is read. Nothing else is tried: for PostScript, say, Pillow would start Ghostscript."""

PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".avif", ".heic", ".heif", ".hif",
})  # fmt: skip
"""Suffixes of files that are opened as pictures first. HEIC is not read, but FFmpeg must not take it for a film."""

COLOURS = {
    "1": "L", "L": "L", "LA": "L", "La": "L", "I;16": "L", "I;16B": "L",
    "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "PA": "RGB", "YCbCr": "RGB", "CMYK": "CMYK", "LAB": "LAB",
}  # fmt: skip
"""The modes that are read, each with the mode in which its colours are turned into sRGB.

Those of ``_UNREAD`` are not among them.
"""

_UNREAD = {
    "F": "floats, and nothing says which value is white",
    "I": "whole numbers of 32 bits or with a sign, and nothing says which value is white",
}

LARGEST_PICTURE = 2**28
"""Pixels: 16384 x 16384. Decoding takes 10 bytes a pixel, 2.7 GB for the largest."""

_FOREIGN = {
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL ",
    "JPEG 2000": rb"\0{3}\x0cjP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?R",
    "PNM": rb"P[1-7Ff]\s",
    "PostScript": rb"%!PS",
    "TIFF with such numbers as 16-bit floats": rb"II[*+]\0|MM\0[*+]",
}
"""How files begin that are pictures, and not read."""


def probe_picture(path: str | Path) -> VisualFacts:
    """Size of a picture as it is shown.

    Raises:
        ProbeError: training could not read it either. A GIF or PNG that moves is "an animation", and a video.
    """
    with open_picture(path) as image:
        try:
            if not _is_whole(image, path):
                image.load()  # only decoding tells
        except Exception as error:  # Pillow's plugins raise many kinds on broken files
            raise _broken(error) from None
        turned = image.format != "TIFF" and orientation(image) >= 5  # Pillow has turned the size of a TIFF already
        width, height = image.size[::-1] if turned else image.size
        return VisualFacts(
            kind="image", width=width, height=height, frames=1, fps=Fraction(0), variable=False,
            square=True, truncated=False, transparent=is_transparent(image), codec=(image.format or "").lower(),
        )  # fmt: skip


def open_picture(path: str | Path) -> "ImageFile":
    """A picture that can be read, with its header read; the first one of an MPO or a TIFF with several.

    Raises:
        ProbeError: it cannot be read, or not as a picture.
    """
    try:
        regular_status(path)
        image: ImageFile = _pillow().open(path, formats=FORMATS)
    except NotRegular as error:
        raise ProbeError("not-a-file", str(error.strerror)) from None
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken files
        raise _unopened(path, error) from None
    image.filename = ""  # read, never mapped: Pillow maps a TIFF of orientation 5 to 8 with its sides exchanged
    try:
        _require_still(image)
        _require_readable(image)
    except ProbeError:
        image.close()
        raise
    return image


def orientation(image: "Image") -> int:
    """How to turn the picture upright, 1 to 8 as EXIF counts; 1 (not at all) where its EXIF data is broken."""
    from PIL.Image import Image

    try:
        stated = Image.getexif(image).get(0x0112, 1)  # that of a PNG decodes it, to look behind the pixels
    except Exception:  # Pillow raises many kinds; viewers show such a picture as it is stored
        return 1
    return stated if stated in range(1, 9) else 1


def is_transparent(image: "Image") -> bool:
    """Whether pixels may be transparent. The one transparent value that a 16-bit grey PNG can name is ignored."""
    return image.has_transparency_data and not image.mode.startswith("I;16")


@cache
def _pillow() -> Any:
    """Pillow's module, with the warnings off that it prints: what is wrong is said as a problem of the row."""
    from PIL import Image

    warnings.filterwarnings("ignore", module="PIL")
    Image.MAX_IMAGE_PIXELS = None  # LARGEST_PICTURE instead
    Image.preinit()  # the common formats; without it, all 44 are imported at the first picture
    return Image


def _require_still(image: "ImageFile") -> None:
    if image.format not in ("MPO", "TIFF") and getattr(image, "is_animated", False):
        if image.format in ("GIF", "PNG"):
            raise ProbeError("unreadable-media", "an animation")
        raise ProbeError("unsupported-picture", f"an animated {image.format}, which FFmpeg cannot read either")


def _require_readable(image: "ImageFile") -> None:
    if image.mode not in COLOURS:
        raise ProbeError("unsupported-picture", f"its pixels are {_UNREAD.get(image.mode, image.mode + ', not read')}")
    if image.width * image.height > LARGEST_PICTURE:
        size = f"{image.width}x{image.height}"
        raise ProbeError("unsupported-picture", f"{size} is more than {LARGEST_PICTURE / 1e6:.0f} million pixels")


def _unopened(path: str | Path, error: Exception) -> ProbeError:
    from PIL import UnidentifiedImageError

    try:
        with Path(path).open("rb") as file:
            begin, size = file.read(16), os.fstat(file.fileno()).st_size
    except OSError as unread:
        return ProbeError("unreadable-file", unread.strerror or str(unread))
    if _is_cut(begin, size):
        return ProbeError("truncated-media", "the picture ends before it is complete")
    for name, pattern in _FOREIGN.items():
        if re.match(pattern, begin, re.DOTALL):
            return ProbeError("unsupported-picture", f"a {name} is not read")
    if isinstance(error, UnidentifiedImageError):
        return ProbeError("unreadable-media", f"not one of the pictures that are read: {', '.join(FORMATS)}")
    return _broken(error)


def _is_cut(begin: bytes, size: int) -> bool:
    """Whether a file that cannot be opened is the beginning of a TIFF (before its directory), a WebP or an AVIF."""
    if begin[:4] in (b"II*\0", b"MM\0*"):
        return size <= int.from_bytes(begin[4:8], "little" if begin[:1] == b"I" else "big")
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return size < 8 + int.from_bytes(begin[4:8], "little")
    return begin[4:11] == b"ftypavi"


def _broken(error: Exception) -> ProbeError:
    code = "truncated-media" if "truncated" in str(error).lower() else "unreadable-media"
    return ProbeError(code, f"the picture cannot be read: {error}")


_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_PNG_EXIF = (b"eXIf", b"iTXtXML", b"tEXtRaw", b"zTXtRaw")
_TAIL = 1 << 16  # bytes: EXIF data, which a PNG may have at its end, is seldom longer
_TIFF_CODECS = frozenset({"raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"})
"""That every Pillow decodes, from nothing but the strips or tiles."""


def _is_whole(image: "ImageFile", path: str | Path) -> bool:
    """Whether it can be seen without decoding that nothing is missing."""
    if image.format == "WEBP":
        return True  # it would not have opened
    size = os.stat(path).st_size  # noqa: PTH116 - pathlib costs a tenth of the whole probe
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        starts, lengths = tags.get(273, tags.get(324, ())), tags.get(279, tags.get(325, ()))  # of strips, of tiles
        complete = 0 < len(starts) == len(lengths) and all(a + b <= size for a, b in zip(starts, lengths, strict=True))
        luminance = tags.get(262) == 6  # YCbCr without JPEG, which Pillow reads from version 13
        return complete and not luminance and image.info["compression"] in _TIFF_CODECS
    if image.format not in _END_MARKS:
        return False
    with Path(path).open("rb") as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    if image.format == "PNG" and any(sign in tail for sign in _PNG_EXIF):
        return False  # its orientation may stand behind its pixels, where Pillow finds it when it decodes
    return _END_MARKS[image.format] in tail[-64:]
