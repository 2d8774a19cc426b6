"""Edges, white on black: Canny's, of the grey picture, by OpenCV."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vfun_cli.control.kinds import Settings


def canny(settings: "Settings") -> "Callable[[NDArray[np.uint8]], NDArray[np.uint8]]":
    """What draws the edges of a frame. Thresholds of 100 and 200 are those of VideoX-Fun's own preprocessor."""
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores

    def draw(frame: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        grey: Any = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if settings.blur:
            grey = cv2.GaussianBlur(grey, (0, 0), settings.blur)
        edges: Any = cv2.Canny(grey, settings.low, settings.high)
        return np.repeat(np.asarray(edges, np.uint8)[..., None], 3, axis=2)

    return draw
