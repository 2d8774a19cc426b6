"""The header of a picture, read with Pillow."""

import os
from fractions import Fraction
from pathlib import Path

from vfun_cli.metadata.facts import ProbeError, VisualFacts

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def probe_picture(path: str | Path) -> VisualFacts:
    """Size of a picture as it is shown; raises ProbeError for what Pillow cannot read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "TIFF"):
                raise ProbeError("unreadable-media", "an animation")
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5..8 swap the sides
            width, height = image.size[::-1] if turned else image.size
            if not _has_end_mark(path, image.format or ""):
                image.load()  # no end mark may be harmless; decoding tells
            codec = (image.format or "").lower()
    except ProbeError:
        raise
    except UnidentifiedImageError:
        raise ProbeError("unreadable-media", "not a picture that Pillow knows") from None
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken files
        code = "truncated-media" if "truncated" in str(error) else "unreadable-media"
        raise ProbeError(code, f"the picture cannot be read: {error}") from None
    return VisualFacts(
        kind="image", width=width, height=height, frames=1, fps=Fraction(0), variable=False,
        duration=Fraction(0), square=True, truncated=False, codec=codec,
    )  # fmt: skip


_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def _has_end_mark(path: str | Path, picture: str) -> bool:
    mark = _END_MARKS.get(picture)
    if mark is None:
        return True
    with Path(path).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        return mark in file.read()
