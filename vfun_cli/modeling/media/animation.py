"""A video as a picture that moves, for pages that show no other."""

from io import BytesIO
from pathlib import Path

from vfun_cli.metadata.opening import open_media
from vfun_cli.metadata.upright import upright_rgb

GIF_SIDE = 480
"""Pixels. A GIF of 81 frames of 1280x720 takes 40 MB, one of them a row and look; the mp4 beside it has them all."""


def animation(file: Path) -> tuple[int, int, bytes]:
    """Width, height and bytes: of a video as a GIF at its rate, no side longer than GIF_SIDE, of a picture as it is.

    Raises:
        ProbeError: it is no such file.
    """
    if file.suffix == ".png":
        height, width = upright_rgb(file).shape[:2]
        return width, height, file.read_bytes()
    with open_media(file) as container:
        stream = container.streams.video[0]
        frames = [frame.to_image() for frame in container.decode(stream)]
        milliseconds = 1000 / float(stream.average_rate or 1)
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    content = BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return frames[0].width, frames[0].height, content.getvalue()
