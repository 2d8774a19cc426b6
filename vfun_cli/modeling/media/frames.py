"""Frames of videos, read by the time at which a player shows them.

Decoding begins at the key frame before the first wanted picture, goes through each stretch once, and keeps one picture
at its own size: several resized at once take no less time. The time of each is compared with the time asked for.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vfun_cli.errors import MetadataError, first_line
from vfun_cli.metadata.opening import open_media
from vfun_cli.metadata.timeline import Timeline, read_timeline, video_stream
from vfun_cli.modeling.media.faults import undecodable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

Pictures: TypeAlias = "Iterator[tuple[int, VideoFrame]]"
"""Decoded, each with its number."""
VideoPacket: TypeAlias = "Packet[VideoStream]"

WORTH_A_SEEK = 12
"""Pictures between two wanted ones from which on a key frame in between is looked for."""
STEPS_BACK = (0.0, 1.0, 5.0, 20.0, 80.0)
"""Seconds before the wanted picture from which a key frame is looked for; then from the start of the file. MPEG-TS and
-PS seek to any packet, and their next key frame may be too late."""


class _NotShown(Exception):
    """A picture that did not come, or came at another time than the timeline has."""

    def __init__(self, picture: int, why: str) -> None:
        super().__init__(why)
        self.picture = picture


def read_frames(path: str | Path, indices: Sequence[int], height: int, width: int) -> "Tensor":
    """The frames of a video at ``indices``, in that order: uint8 [F, 3, height, width], upright.

    Frame i is picture i in the order in which a player shows them; where pictures are unevenly spaced, see
    :meth:`~vfun_cli.metadata.timeline.Timeline.picture`.

    Raises:
        MetadataError: the file cannot be decoded, or is too short; it names file and frame.
    """
    import torch

    from vfun_cli.modeling.media.sizes import resize_and_crop

    path = str(path)
    fault: _NotShown | None = None
    for by_packets in (False, True):  # an index alone may hide an odd order; packets say it
        try:
            with open_media(path) as container:
                timeline = read_timeline(container, by_packets=by_packets)
        except Exception as error:  # PyAV raises its own kinds, and plain ones on absurd values
            raise undecodable(path, min(indices), error) from error
        if bad := [index for index in indices if not 0 <= index < len(timeline.times)]:
            raise MetadataError(
                f"{path}: frame {bad[0]} is needed, and the file has {len(timeline.times)} frames.",
                hint="The file is shorter than its header says.",
            )
        pictures = [timeline.picture(index) for index in indices]
        try:
            found = {
                picture: resize_and_crop(torch.from_numpy(_upright(frame)).permute(2, 0, 1)[None], height, width)
                for picture, frame in _wanted_pictures(path, timeline, sorted(set(pictures)))
            }
            return torch.cat([found[picture] for picture in pictures])
        except _NotShown as error:
            fault = error
        except Exception as error:  # where no packet is to blame
            raise undecodable(path, min(indices), error) from error
        if timeline.complete:
            break
    assert fault is not None
    raise undecodable(path, indices[pictures.index(fault.picture)], fault)


def _wanted_pictures(path: str, timeline: Timeline, wanted: Sequence[int]) -> Pictures:
    """The wanted pictures, in order.

    Raises:
        _NotShown: one of them cannot be decoded, or a time is not what the timeline says.
    """
    for stretch in _stretches(timeline, wanted):
        yield from _timed(path, timeline, stretch) if timeline.timed else _counted(path, stretch)


def every_frame(path: str | Path, timeline: Timeline) -> "Iterator[NDArray[np.uint8]]":
    """All frames of a video at its own size, [h, w, 3], upright: frame i is what ``read_frames`` gives for index i.

    Free of torch, and of no more than one picture at a time.

    Args:
        timeline: of the file, by its packets.

    Raises:
        MetadataError: the file cannot be decoded; it names file and frame.
    """
    wanted = [timeline.picture(frame) for frame in range(len(timeline.times))]
    given = 0
    try:
        for picture, decoded in _wanted_pictures(str(path), timeline, sorted(set(wanted))):
            pixels = _upright(decoded)
            while given < len(wanted) and wanted[given] == picture:  # with uneven steps a picture may come again
                yield pixels
                given += 1
    except Exception as error:  # PyAV raises its own kinds, and plain ones on absurd values
        raise undecodable(path, given, error) from error


def _upright(frame: "VideoFrame") -> "NDArray[np.uint8]":
    """[h, w, 3], as it is to be shown."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _stretches(timeline: Timeline, wanted: Sequence[int]) -> list[list[int]]:
    """The wanted pictures, parted where beginning anew at a key frame spares decoding what lies between."""
    stretches = [[wanted[0]]]
    for before, picture in pairwise(wanted):
        far = timeline.timed and picture - before > WORTH_A_SEEK
        latest = bisect_right(timeline.keys, timeline.times[picture]) - 1
        if far and latest >= 0 and timeline.keys[latest] >= timeline.times[before + WORTH_A_SEEK]:
            stretches.append([picture])
        else:
            stretches[-1].append(picture)
    return stretches


def _counted(path: str, wanted: Sequence[int]) -> Pictures:
    """Pictures by their number from the start, for files that do not say when a picture is shown."""
    left = deque(wanted)
    with open_media(path) as container:
        for number, frame in enumerate(container.decode(_single_threaded(container))):
            if frame.is_corrupt:
                raise _NotShown(left[0], "it is damaged")
            if number == left[0]:
                yield left.popleft(), frame
                if not left:
                    return
    raise _NotShown(left[0], "the file ends before it")


def _timed(path: str, timeline: Timeline, wanted: Sequence[int]) -> Pictures:
    """Pictures by their times, from the nearest key frame from which the first of them comes out whole."""
    latest = timeline.times[wanted[0]]
    while True:
        with _packets_from_key(path, timeline, latest) as (packets, key):
            decoded = _matched(packets, timeline, wanted, key)
            try:
                first = next(decoded)
            except _NotShown:
                if key is None:
                    raise
                latest = key - 1
                continue
            yield first
            yield from decoded
            return


@contextmanager
def _packets_from_key(
    path: str, timeline: Timeline, latest: int
) -> "Iterator[tuple[Iterator[VideoPacket], int | None]]":
    """The packets from a key frame on that is shown at ``latest`` or before, and its time; if no seek finds one, all
    packets, and None.
    """
    with open_media(path) as container:
        sought = _sought(container, timeline, latest)
        if sought is not None:
            yield sought
            return
    with open_media(path) as container:
        yield container.demux(_single_threaded(container)), None


def _sought(container: "InputContainer", timeline: Timeline, latest: int) -> "tuple[Iterator[VideoPacket], int] | None":
    import av

    stream = _single_threaded(container)
    for seconds in STEPS_BACK:
        target = latest - round(seconds / timeline.tick)
        if not timeline.keys or target <= timeline.keys[0]:
            return None
        try:
            container.seek(target, stream=stream)
        except av.FFmpegError:  # this kind of file cannot seek
            return None
        packets = container.demux(stream)
        key = next((packet for packet in packets if packet.size and packet.is_keyframe), None)
        if key is None or key.pts is None or key.pts > latest:
            continue
        # Times behind a seek into MPEG-TS or -PS are worth what their key frame proves.
        if not timeline.key_sizes or timeline.key_sizes.get(key.pts) == key.size:
            return chain([key], packets), key.pts
    return None


def _matched(packets: "Iterator[VideoPacket]", timeline: Timeline, wanted: Sequence[int], key: int | None) -> Pictures:
    """The wanted pictures among those that the packets decode to, from the key frame of time ``key`` on, or all.

    What is shown before the key frame refers to pictures in front of it: it is never wanted, and its faults are none.
    """
    import av
    from av.video.frame import PictureType

    left, predicted = deque(wanted), (PictureType.P, PictureType.B)
    begin = timeline.times[0] if key is None else key
    unproven = key is not None and key > timeline.keys[0]
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if packet.pts is not None and packet.pts < begin:
                continue
            raise _NotShown(left[0], first_line(error)) from error
        for frame in frames:
            if frame.pts is None or frame.pts < begin:
                continue
            if frame.is_corrupt:
                raise _NotShown(left[0], "it is damaged")
            if unproven and (frame.pts != begin or frame.pict_type in predicted):
                # Intra refresh calls it a key frame where the picture begins to be renewed, column by column.
                raise _NotShown(left[0], "decoding cannot begin at its key frame")
            unproven = False
            due = timeline.times[left[0]]
            if frame.pts > due or (frame.pts < due and not _is_known(timeline, frame.pts)):
                seconds = (float(time * timeline.tick) for time in (due, frame.pts))
                raise _NotShown(left[0], "it is due at {:.4f} s, and a picture of {:.4f} s comes".format(*seconds))
            if frame.pts == due:
                yield left.popleft(), frame
                if not left:
                    return
    raise _NotShown(left[0], "the file ends before it")


def _is_known(timeline: Timeline, time: int) -> bool:
    place = bisect_left(timeline.times, time)
    # Before the first picture lies what an edit list hides.
    return time < timeline.times[0] or (place < len(timeline.times) and timeline.times[place] == time)


def _single_threaded(container: "InputContainer") -> "VideoStream":
    """The video to decode; the loader runs a process a clip already."""
    stream = video_stream(container)
    stream.codec_context.thread_count = 1
    return stream
