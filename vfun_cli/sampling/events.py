"""What happens while videos are made, as the process that makes them tells it."""

from dataclasses import dataclass

MADE = 0
SMALLER = "Fewer --frames, a smaller --height and --width, --low-vram and fewer --num-processes take less memory."
"""What to do where memory runs out."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something has begun, gone on or ended. Between processes it is a line of JSON."""

    video: str | None = None
    """Of which video, by its order's name; None: of all of them."""
    of_base: bool = False
    """It is the base that the video is compared with."""
    doing: str = ""
    """What is done for all of them."""
    done: int = 0
    total: int = 0
    """How much of it is done, of a video in denoising steps; 0 where nothing counts it."""
    exit_code: int | None = None
    """Of a video that has ended: ``MADE``, or that of the error on account of which it is not made."""
    message: str = ""
    """Of that error."""
    hint: str | None = None
