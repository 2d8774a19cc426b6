"""Which source frames a clip consists of."""

from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.inputs import ClipInput, ImageFrame, MediaFile, VideoFrames
from vfun_cli.modeling.randomness import SampleKey

WHOLE = (0.0, 1.0)
FIRST_FRAME = 0.4
"""Probability of frame 0 as a random reference image; the other frames share the rest."""


def frame_indices(request: SampleRequest, usable_span: tuple[float, float] = WHOLE) -> list[int]:
    """Source frame of each clip frame: ``stride`` apart from a start drawn uniformly, by the sample's key.

    ``usable_span`` is the family's; its start counts from 0 to its end, as in the original: (0.1, 0.9) of 200 frames
    is 18 to 180.

    Raises:
        ValueError: the source is too short: the plan must have dropped such a clip.
    """
    span = (request.frames - 1) * request.stride + 1
    end = int(usable_span[1] * request.total_frames)
    first = int(usable_span[0] * end)
    room = end - first - span
    if room < 0:
        raise ValueError(
            f"{request.frames} frames at stride {request.stride} span {span} source frames, "
            f"the clip has {request.total_frames}, {first} to {end} of them usable"
        )
    start = first + int(request.key.content.numpy("start").integers(0, room + 1))
    return list(range(start, start + span, request.stride))


def reference_frame(key: SampleKey, frames: int, control_ref_image: str) -> int:
    """Clip frame that serves as the reference image, 0 unless it is ``random`` (docs/numerics.md, Which frames).

    The frame decides what the encoders see, so it is drawn by ``key.content``.
    """
    if control_ref_image != "random" or frames == 1:
        return 0
    draw = key.content.numpy("reference")
    return 0 if draw.random() < FIRST_FRAME else int(draw.integers(1, frames))


def clip_of(request: SampleRequest, field: str = "file_path", usable_span: tuple[float, float] = WHOLE) -> ClipInput:
    """The pixels of one video or image of a request, [F, 3, H, W]; an image is a clip of one frame."""
    media, size = MediaFile(request.record[field]), (request.height, request.width)
    if request.kind == "image":
        return ImageFrame(media, size)
    return VideoFrames(media, tuple(frame_indices(request, usable_span)), size)
