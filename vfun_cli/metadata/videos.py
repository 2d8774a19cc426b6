"""The header of a video, read with PyAV."""

from typing import TYPE_CHECKING

from vfun_cli.metadata.facts import VisualFacts
from vfun_cli.metadata.mp4 import PictureTrack, picture_track
from vfun_cli.metadata.pictures import probe_picture
from vfun_cli.metadata.timeline import is_mp4, read_overview, video_stream

if TYPE_CHECKING:
    import av

VIDEOS = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv", ".mpg", ".mpeg", ".m2v", ".vob", ".ts",
    ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".mxf", ".nut",
})  # fmt: skip
"""Suffixes of the files in a folder that count as videos; a row of a metadata file may name any other."""


def probe_video(container: "av.container.InputContainer", path: str, track: PictureTrack | None = None) -> VisualFacts:
    """Size, length and rate of the first video of an open file; raises ProbeError if it has none.

    ``track`` is what is known already of an mp4.
    """
    form = container.format.name
    if form.endswith("_pipe") or form == "image2":
        return probe_picture(path)
    if track is None and is_mp4(container):
        track = picture_track(path)
    stream = video_stream(container)
    overview = read_overview(container, stream, track)
    context, frames, rate = stream.codec_context, overview.frames, overview.rate
    index = stream.index_entries
    last = index[-1] if len(index) else None
    width, height = context.width, context.height
    if overview.turned:
        width, height = height, width
    return VisualFacts(
        kind="image" if frames == 1 and not rate else "video", width=width, height=height, frames=frames,
        fps=rate, variable=overview.variable, square=stream.sample_aspect_ratio in (None, 0, 1),
        truncated=last is not None and container.size < last.pos + last.size, codec=context.name,
    )  # fmt: skip
