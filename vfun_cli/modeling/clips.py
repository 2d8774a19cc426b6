"""Which source frames a clip consists of."""

from fractions import Fraction

from vfun_cli.metadata.clip_needs import WHOLE, Span, source_frames, usable_frames
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.inputs import AudioSegment, ClipInput, ImageFrame, MediaFile, VideoFrames
from vfun_cli.modeling.randomness import SampleKey

SAMPLE_RATE = 16000
"""Of the sound that speech encoders read."""
FIRST_FRAME = 0.4
"""Probability of frame 0 as a random reference image; the other frames share the rest."""


def frame_indices(request: SampleRequest, usable_span: Span = WHOLE) -> list[int]:
    """Source frame of each clip frame: ``stride`` apart from a start drawn uniformly, by the sample's key.

    ``usable_span`` is the family's.

    Raises:
        ValueError: the source is too short: the plan must have dropped such a clip.
    """
    span = source_frames(request.frames, request.stride)
    first, end = usable_frames(request.total_frames, usable_span)
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


def clip_of(request: SampleRequest, field: str = "file_path", usable_span: Span = WHOLE) -> ClipInput:
    """The pixels of one video or image of a request, [F, 3, H, W]; an image is a clip of one frame."""
    media, size = MediaFile(request.record[field]), (request.height, request.width)
    if request.kind == "image":
        return ImageFrame(media, size)
    return VideoFrames(media, tuple(frame_indices(request, usable_span)), size)


def clip_sound(request: SampleRequest, field: str, start: int) -> AudioSegment:
    """The clip's sound [samples] at 16 kHz, exactly ``frames * stride / fps`` seconds from source frame ``start``.

    The last clip frame lasts a stride, so the sound may end up to ``stride - 1`` source frames behind the file's last
    one; that part is silence.
    """
    fps = Fraction(*request.fps)
    wanted = request.frames * request.stride
    there = min(wanted, request.total_frames - start)
    samples = round(wanted / fps * SAMPLE_RATE)
    return AudioSegment(MediaFile(request.record[field]), start / fps, there / fps, SAMPLE_RATE, samples)
