"""The header of a video, read with PyAV."""

from fractions import Fraction
from typing import TYPE_CHECKING, cast

from vfun_cli.metadata.facts import VisualFacts
from vfun_cli.metadata.pictures import probe_picture
from vfun_cli.metadata.timeline import read_overview, shown_video, track_of

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream


def probe_video(container: "av.container.InputContainer", path: str) -> VisualFacts:
    """Size, length and rate of the first video of an open file; raises ProbeError if it has none."""
    form = container.format.name
    if form.endswith("_pipe") or form == "image2":
        return probe_picture(path)
    track = track_of(container)
    overview = read_overview(container, track)
    stream = cast("VideoStream", shown_video(container))
    context, frames, rate = stream.codec_context, overview.frames, overview.rate
    last = stream.index_entries[-1] if len(stream.index_entries) else None
    width, height = context.width, context.height
    if track is not None and track.turned:
        width, height = height, width
    return VisualFacts(
        kind="image" if frames == 1 and not rate else "video", width=width, height=height, frames=frames,
        fps=rate, variable=overview.variable, duration=frames / rate if rate else Fraction(0),
        square=stream.sample_aspect_ratio in (None, 0, 1),
        truncated=last is not None and container.size < last.pos + last.size, codec=context.name,
    )  # fmt: skip
