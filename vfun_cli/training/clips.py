"""Which source frames a clip consists of, and its pixels."""

from torch import Tensor

from vfun_cli.training.adapter import SampleRequest
from vfun_cli.training.media import read_frames, read_image

WHOLE = (0.0, 1.0)


def frame_indices(request: SampleRequest, usable_span: tuple[float, float] = WHOLE) -> list[int]:
    """Source frame of each clip frame: ``stride`` apart from a start drawn uniformly, by the sample's key.

    ``usable_span`` is the family's; its start counts from 0 to its end, as in the original: (0.1, 0.9) of 200 frames
    is 18 to 180.
    Raises ValueError if the source is too short: the plan must have dropped such a clip.
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
    start = first + int(request.key.numpy("start").integers(0, room + 1))
    return list(range(start, start + span, request.stride))


def read_clip(request: SampleRequest, field: str = "file_path", usable_span: tuple[float, float] = WHOLE) -> Tensor:
    """Pixels of one video or image, float32 [F, 3, H, W] in [-1, 1]; an image is a clip of one frame.

    Raises MetadataError if the file cannot be decoded.
    """
    path = request.record[field]
    if request.kind == "image":
        return read_image(path, request.height, request.width)
    return read_frames(path, frame_indices(request, usable_span), request.height, request.width)
