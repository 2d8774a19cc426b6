"""Skeletons of people on black, body, hands and face in OpenPose's colours, by rtmlib and two ONNX models."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.foreign import made_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vfun_cli.control.kinds import Settings

DETECTOR, KEYPOINTS = "yolox*.onnx", ("dw-*.onnx", "rtm*.onnx")
"""What the files are called: DWPose's own, and those of rtmlib's list."""
CERTAIN = 0.43
"""Keypoints that are less sure are not drawn; the value of rtmlib's example for whole bodies."""
WITHOUT_CLASSES = 5
"""Columns of the answer of a detector that knows people alone: a box and how sure it is."""
PERSON = 0
"""Among the classes of one that knows more."""


def pose(settings: "Settings") -> "Callable[[NDArray[np.uint8]], NDArray[np.uint8]]":
    """What draws the skeletons of a frame; one without people is black.

    Raises:
        CheckpointError: the folder lacks a model, or one is none.
    """
    import cv2
    import rtmlib

    cv2.setNumThreads(1)
    folder = Path(str(settings.model))
    detector, keypoints = _file(folder, DETECTOR), _file(folder, *KEYPOINTS)
    with made_of(f"the pose models of {folder}", folder):
        # rtmlib downloads what it is not given: it is given both.
        settled = {"backend": "onnxruntime", "device": settings.device}
        (height, width), columns = _sizes(detector)
        classes = columns > WITHOUT_CLASSES
        mode = "multiclass" if classes else "human"
        find_people = rtmlib.YOLOX(str(detector), (height, width), det_mode=mode, **settled)
        (height, width), _ = _sizes(keypoints)
        find_keypoints = rtmlib.RTMPose(str(keypoints), (width, height), to_openpose=True, **settled)

    def draw(frame: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        bgr = np.ascontiguousarray(frame[..., ::-1])
        boxes = find_people(bgr)
        if classes:
            boxes, which = boxes
            boxes = boxes[which == PERSON]
        canvas = np.zeros_like(bgr)
        if len(boxes):  # without one, rtmlib takes the whole picture for a person
            points, scores = find_keypoints(bgr, bboxes=boxes)
            canvas = rtmlib.draw_skeleton(canvas, points, scores, openpose_skeleton=True, kpt_thr=CERTAIN)
        return np.ascontiguousarray(canvas[..., ::-1], np.uint8)

    return draw


def _file(folder: Path, *patterns: str) -> Path:
    """The one file of these names.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if len(files) != 1:
        raise CheckpointError(
            f"{folder} has {len(files) or 'no'} file{'s' * (len(files) != 1)} {' or '.join(patterns)}; one is needed.",
            hint="Put DWPose's yolox_l.onnx and dw-ll_ucoco_384.onnx there, or a pair of rtmlib's under such names.",
            at=folder,
        )
    return files[0]


def _sizes(model: Path) -> tuple[tuple[int, int], int]:
    """(height, width) of the picture that an ONNX model reads, and the columns of its first answer."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    height, width = session.get_inputs()[0].shape[-2:]
    columns = session.get_outputs()[0].shape[-1]
    return (int(height), int(width)), columns if isinstance(columns, int) else WITHOUT_CLASSES
