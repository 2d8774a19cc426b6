"""When a player shows each picture of a video: the one answer that validation, plan and training share.

    with open_media(path) as container:
        timeline = read_timeline(container)
    timeline.picture(12)   # which picture frame 12 is, counted in the order in which they are shown

The times are those of the container, after its edit lists. An mp4 with even steps is read from its header alone;
everything else packet by packet, and has to show its first picture.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from vfun_cli.metadata.facts import ProbeError
from vfun_cli.metadata.mp4 import PictureTrack, picture_track
from vfun_cli.metadata.opening import open_media

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

IN_DECODING_ORDER = frozenset({"avi", "asf"})
"""Containers that keep one time a picture, in decoding order: where a codec reorders, it is not when it is shown."""
TRIED_CODECS = frozenset({"h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4", "prores", "mjpeg"})
"""Codecs for which the header of an mp4 is believed. Other files have to show a picture before they count as good."""
CONVERSION = "convert it with: ffmpeg -i IN -c:v libx264 -crf 12 -c:a copy OUT.mp4"
COVER = 0x400
"""FFmpeg's ``AV_DISPOSITION_ATTACHED_PIC``; the test by way of PyAV's enumeration takes 5 us a file."""
RATE_TOLERANCE = Fraction(1, 1000)
"""Between the rate that a file states and that of its times: a clock of 1 ms moves 48 frames by half of it."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The pictures that a player shows, in its order."""

    times: Sequence[int]
    """When each is shown, in ticks; strictly rising."""
    tick: Fraction
    """Seconds."""
    rate: Fraction
    """Pictures a second; 0 where the file has no clock."""
    variable: bool
    """They are not equally far apart."""
    keys: Sequence[int]
    """Times from which decoding can begin; behind an index of an open GOP, up to a few pictures early."""
    key_sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes of the packet behind each of ``keys``, where packets were read."""
    turned: bool = False
    """Shown turned by a quarter."""
    timed: bool = True
    """Packets say when their picture is shown. Otherwise pictures are counted from the first one."""
    complete: bool = True
    """Every packet was looked at; an index alone may hide an odd order of pictures."""

    def picture(self, frame: int) -> int:
        """Which picture is frame ``frame``, both from 0.

        The same, if pictures are equally far apart. Otherwise the one that is shown in the middle of the frame's time
        at the rate of the video, as FFmpeg's ``fps`` filter has it: speed and lips stay right, pictures repeat or are
        left out.
        """
        if not self.variable:
            return frame
        middle = self.times[0] + (frame + Fraction(1, 2)) / (self.rate * self.tick)
        return max(0, bisect_left(self.times, middle) - 1)


def shown_video(container: "av.container.InputContainer") -> "VideoStream | None":
    """The first video that is no cover picture."""
    return next((stream for stream in container.streams.video if not stream.disposition.value & COVER), None)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What validation and plan need of a timeline."""

    frames: int
    rate: Fraction
    variable: bool
    turned: bool


def read_overview(
    container: "av.container.InputContainer", stream: "VideoStream", track: PictureTrack | None
) -> Overview:
    """The overview of a file that was just opened; of an mp4 with ``track`` from its header, without its pictures.

    Raises:
        ProbeError: none of its pictures can be decoded.
    """
    if track is None or not _is_indexed(stream) or _leads(stream, track) or track.parts > 1:
        timeline = _from_packets(container, stream, track)
        return Overview(
            frames=len(timeline.times), rate=timeline.rate, variable=timeline.variable, turned=timeline.turned
        )
    if _is_even(stream, track):
        return Overview(frames=stream.frames, rate=_average_rate(stream), variable=False, turned=track.turned)
    entries = [(entry.timestamp, entry.is_discard) for entry in stream.index_entries]
    times = sorted(time for time, _ in entries)  # those that are hidden too: they may lie between others
    variable, frames = _uneven(times), sum(not hidden for _, hidden in entries)
    return Overview(frames=frames, rate=_rate(stream, times, variable=variable), variable=variable, turned=track.turned)


def read_timeline(container: "av.container.InputContainer", *, by_packets: bool = False) -> Timeline:
    """The timeline of a file that was just opened; afterwards the container stands anywhere.

    Raises:
        ProbeError: there is no video, nothing here decodes it, or none of its pictures can be decoded.
    """
    stream = video_stream(container)
    track = picture_track(container.name) if is_mp4(container) else None
    if track is not None and not by_packets and _is_indexed(stream) and _is_even(stream, track):
        first = next(container.demux(stream)).pts
        if first is not None:
            return _from_header(stream, first, cast(int, track.step))
        container.seek(0)
    return _from_packets(container, stream, track)


def is_mp4(container: "av.container.InputContainer") -> bool:
    """Whether it is an mp4, a mov or one of their kin."""
    return container.format.name.startswith("mov")


def video_stream(container: "av.container.InputContainer") -> "VideoStream":
    """The video of an open file.

    Raises:
        ProbeError: there is none, or nothing here decodes it.
    """
    stream = shown_video(container)
    if stream is None:
        raise ProbeError("no-video-stream", "there is no picture in it")
    if stream.codec_context is None:
        track = picture_track(container.name) if is_mp4(container) else None
        codec = f" {track.codec}" if track is not None and track.codec.isprintable() else ""
        raise ProbeError("unsupported-codec", f"no decoder for its{codec} video here: {CONVERSION}")
    return stream


def _is_indexed(stream: "VideoStream") -> bool:
    """Whether the header of an mp4 has an entry for every picture (fragments have none), and they will decode."""
    return stream.frames > 0 and len(stream.index_entries) > 0 and stream.codec_context.name in TRIED_CODECS


def _leads(stream: "VideoStream", track: PictureTrack) -> bool:
    """Whether pictures in front of a cut, which may not decode, are not hidden by an edit list."""
    return track.leads and not any(entry.is_discard for entry in stream.index_entries[1:2])


def _is_even(stream: "VideoStream", track: PictureTrack) -> bool:
    """Whether all pictures of an indexed file are shown, one step apart.

    One edit hides pictures at the start, or those in front of a cut, or at the end, which are then not in the index at
    all; more edits may hide any.
    """
    index = stream.index_entries
    return (
        track.step is not None
        and track.parts <= 1
        and not track.leads
        and track.pictures == stream.frames == len(index)
        and not index[0].is_discard
    )


def _from_header(stream: "VideoStream", first: int, step: int) -> Timeline:
    """The first picture is shown at ``first``; steps between decoding times are those between pictures, if even."""
    times = range(first, first + stream.frames * step, step)
    keys = [time for time, entry in zip(times, stream.index_entries, strict=True) if entry.is_keyframe]
    return Timeline(
        times=times, tick=_tick(stream), rate=_average_rate(stream), variable=False, keys=keys,
        complete=False,
    )  # fmt: skip


def _from_packets(
    container: "av.container.InputContainer", stream: "VideoStream", track: PictureTrack | None
) -> Timeline:
    codec = stream.codec_context.name
    found = [
        (p.pts, p.dts, p.size, p.is_keyframe, p.is_discard or (codec == "vp8" and not _is_shown_vp8(p)))
        for p in container.demux(stream)
        if p.size
    ]
    shown = [(pts, dts) for pts, dts, _, _, hidden in found if not hidden]
    if not shown:
        return Timeline(times=(), tick=_tick(stream), rate=Fraction(0), variable=False, keys=())
    # Where an edit list joins parts, what refers across the joint may not decode: then all is tried.
    joined = track is not None and track.parts > 1
    pictures = _decoded(container.name, every=joined)
    first, turned = pictures[0]
    decoded_at = [dts for _, dts in shown if dts is not None]
    raw = not decoded_at and all(pts is None for pts, _ in shown)
    if raw or any(later < earlier for earlier, later in pairwise(decoded_at)):
        # A raw stream, for which FFmpeg would make up 25 pictures a second; or recordings one after another, each with
        # a clock of its own.
        rate = Fraction(0) if raw else _average_rate(stream)
        return Timeline(
            times=range(len(shown)), tick=1 / rate if rate else _tick(stream), rate=rate, variable=False, keys=(),
            turned=turned, timed=False,
        )  # fmt: skip
    timed = all(pts is not None for pts, _ in shown) and (
        container.format.name not in IN_DECODING_ORDER or all(pts == dts for pts, dts in shown)
    )
    if joined:
        times = sorted({pts for pts, _ in pictures if pts is not None})
    elif timed:  # what is shown before the first picture that decodes refers to pictures that were cut off
        times = sorted({pts for pts, _ in shown if first is None or pts >= first})
    else:
        times = sorted(set(decoded_at))
    keys = {pts: size for pts, _, size, key, _ in found if key and pts is not None}
    variable = _uneven(times)
    return Timeline(
        times=times, tick=_tick(stream), rate=_rate(stream, times, variable=variable), variable=variable,
        keys=sorted(keys), key_sizes=keys, turned=turned, timed=timed,
    )  # fmt: skip


def _is_shown_vp8(packet: "av.Packet") -> bool:
    """Whether it is no picture that others alone refer to (RFC 6386, 9.1: the fifth bit of the frame's tag)."""
    return bool(memoryview(packet)[0] & 0b0001_0000)


def _decoded(path: str, *, every: bool) -> list[tuple[int | None, bool]]:
    """Of the first picture that decodes, or of every one: when it is shown, and whether it is turned by a quarter.

    Raises:
        ProbeError: there is none.
    """
    import av

    found: list[tuple[int | None, bool]] = []
    with open_media(path) as container:
        stream = video_stream(container)
        codec = stream.codec_context.name
        for packet in container.demux(stream):
            if found and not every:
                break
            with suppress(av.FFmpegError):
                found += [(frame.pts, frame.rotation % 180 == 90) for frame in packet.decode()]
    if not found:
        raise ProbeError("unsupported-codec", f"no picture of its {codec} video decodes: {CONVERSION}")
    return found


def _tick(stream: "VideoStream") -> Fraction:
    return stream.time_base or Fraction(1)


def _average_rate(stream: "VideoStream") -> Fraction:
    return Fraction(stream.average_rate or 0)


def _rate(stream: "VideoStream", times: Sequence[int], *, variable: bool) -> Fraction:
    """What the header of an mp4 says; of other files, what they state where their times agree, or what those say.

    The base rate is exact where the average is a rounded clock's (FLV: 989/33 for 30000/1001), and twice too high in
    MPEG-1, which counts fields.
    """
    average, base = _average_rate(stream), Fraction(stream.base_rate or 0)
    if len(times) < 2 or (average and stream.frames and is_mp4(stream.container)):
        return average
    measured = Fraction(len(times) - 1) / ((times[-1] - times[0]) * _tick(stream))
    stated = () if variable else (base, average)
    return next((rate for rate in stated if abs(rate - measured) <= RATE_TOLERANCE * measured), measured)


def _uneven(times: Sequence[int]) -> bool:
    """Whether sorted timestamps differ by more than the rounding of the container's clock."""
    if len(times) < 3:
        return False
    steps = [later - earlier for earlier, later in pairwise(times)]
    # The last step is left out: encoders end a file as they like.
    body = steps[:-1] if len(steps) > 2 else steps
    return max(body) - min(body) > max(2, sum(steps) / len(steps) / 10)
