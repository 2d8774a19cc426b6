"""The header of a file with sound, and whether it can be heard: plain WAV from its chunks, all else with PyAV."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli.metadata.facts import AudioFacts, ProbeError
from vfun_cli.metadata.opening import open_media
from vfun_cli.metadata.timeline import shown_video
from vfun_cli.metadata.wav import read_wav, samples

if TYPE_CHECKING:
    import av
    from numpy.typing import NDArray

SOUNDS = frozenset({
    ".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".wma", ".aif", ".aiff", ".ac3", ".mka", ".au",
    ".caf", ".w64",
})  # fmt: skip
"""Suffixes of the files in a folder that count as sounds."""
SILENCE = 1e-3
"""-60 dB: nothing in the file is louder."""
TIMED = frozenset({"asf", "avi", "flac", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpeg", "mpegts", "ogg"})
"""Containers whose packets carry their time, so that the last ones tell how long the sound is. In the others (raw AAC,
MP3, AC3, AMR, …) time is counted from packet to packet: all are read, 1 ms for 6 s of MP3, and almost none decoded."""
TAIL = 1
"""Seconds before the stated end from which the packets of a timed container are read."""


def probe_sound(container: "av.container.InputContainer", path: str) -> AudioFacts:
    """Rate, length and start of the first sound of an open file; raises ProbeError if it has none.

    The length is what decoding yields: without the encoder's delay and padding where the file states them, and with
    them where it has no place for them (raw AAC, AC3, FLV). Only WMA yields a packet (20 to 50 ms) more: its decoder
    holds the last frame back.
    """
    if not container.streams.audio:
        raise ProbeError("no-audio-stream", "there is no sound in it")
    stream = container.streams.audio[0]
    zero = time_zero(container)
    start = _seconds(stream.start_time, stream) if stream.start_time is not None else zero
    frames = container.decode(stream)
    first = next(frames, None)
    duration = (stated_end(stream) or _end_of_packets(stream) or start) - start
    if first is None or duration <= 0:
        raise ProbeError("no-audio-stream", "the sound has no samples")
    # The first frame's rate: HE-AAC has twice the one that its container states.
    return AudioFacts(
        rate=first.sample_rate, channels=len(first.layout.channels), duration=duration, offset=start - zero,
        silent=not any(_is_loud(frame.to_ndarray()) for frame in chain((first,), frames)),
        truncated=any(entry.pos + entry.size > container.size for entry in stream.index_entries[-1:]),
        codec=stream.codec_context.name,
    )  # fmt: skip


def open_sound(path: str | Path) -> "av.container.InputContainer":
    """The file as PyAV opens it, but RF64 without a stated length is read too: FFmpeg alone would find no samples."""
    wav = read_wav(path)
    return open_media(path, options={"ignore_length": "1"} if wav is not None and wav.length is None else {})


def time_zero(container: "av.container.InputContainer") -> Fraction:
    """Second 0 of a file with sound: its first picture that is shown (not a cover), otherwise its first sample.

    That picture is the first key frame: what comes before one, in a piece cut out of a longer recording, cannot be
    decoded, and what refers across it (open GOPs) is not shown. Nor is a key frame before the start that the container
    states, which counts edit lists. AVI states the order of decoding only: its first frame is its first picture.
    """
    stream = shown_video(container)
    if stream is not None:
        with _again(stream) as again:
            key = next((packet for packet in again.container.demux(again) if packet.is_keyframe and packet.size), None)
        moment = key and (key.dts if container.format.name == "avi" or key.pts is None else key.pts)
        known = [time for time in (stream.start_time, moment) if time is not None]
        if known:
            return _seconds(max(known), stream)
    starts = (stream for stream in container.streams.audio if stream.start_time is not None)
    return next((_seconds(stream.start_time, stream) for stream in starts), Fraction(0))


def stated_end(stream: "av.audio.stream.AudioStream") -> Fraction | None:
    """The second at which an mp4's sound ends, by its edit list, which hides the padding of the last packet; None where
    it ends with its packets.
    """
    if not stream.container.format.name.startswith("mov") or stream.duration is None:
        return None
    return _seconds((stream.start_time or 0) + stream.duration, stream)


def _end_of_packets(stream: "av.audio.stream.AudioStream") -> Fraction | None:
    """The second at which the last packet ends; None without packets."""
    container, last = stream.container, None
    length = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
    if container.format.name in TIMED and length > TAIL:
        last = _last_end(stream, _seconds(stream.start_time or 0, stream) + length - TAIL)
    return last or _last_end(stream)  # a header that promises more than there is has no packets there


def _last_end(stream: "av.audio.stream.AudioStream", after: Fraction | None = None) -> Fraction | None:
    """The second at which the last packet ends, without the padding of the encoder; packets from ``after`` on are read.

    MP3 states whole packets and what to drop of the last one; Ogg and Matroska state what is left of it, and that too.
    Some Matroska files state no length: a packet is then as long as the one before.
    """
    timed, end, longest, before = stream.container.format.name in TIMED, None, Fraction(0), None
    latest: deque[Any] = deque(maxlen=3)
    with _again(stream) as again:
        if after is not None:
            again.container.seek(int(after / again.time_base), stream=again)
        for packet in again.container.demux(again):
            if packet.pts is None or not packet.size:
                continue
            length = _seconds(packet.duration or packet.pts - (packet.pts if before is None else before), stream)
            before = packet.pts
            longest = max(longest, length)
            if packet.has_sidedata("skip_samples"):
                dropped = int.from_bytes(bytes(packet.get_sidedata("skip_samples"))[4:8], "little")
                length = min(length, longest - Fraction(dropped, stream.rate))
            end = _seconds(packet.pts, stream) + length
            latest.append(packet)
        rates = set() if timed else {frame.sample_rate for packet in latest for frame in packet.decode()}
    return end if rates <= {stream.codec_context.sample_rate} else _end_of_frames(stream)


def _end_of_frames(stream: "av.audio.stream.AudioStream") -> Fraction:
    """The second at which the last frame ends: packets are counted wrongly once the sampling rate has changed."""
    with _again(stream) as again:
        return sum((Fraction(each.samples, each.sample_rate) for each in again.container.decode(again)), Fraction(0))


@contextmanager
def _again(stream: Any) -> Iterator[Any]:
    """The stream, in a file opened anew."""
    given = stream.container
    with open_media(given.name, timeout=(given.open_timeout, given.read_timeout)) as container:
        yield container.streams[stream.index]


def _seconds(ticks: int, stream: Any) -> Fraction:
    return ticks * stream.time_base


def _is_loud(values: "NDArray[Any]") -> bool:
    """Whether one of the samples (u8, integer or float, any shape) is louder than SILENCE."""
    import numpy as np

    centred = values.astype(np.float64) - (128 if values.dtype == np.uint8 else 0)
    full = 1 if values.dtype.kind == "f" else 2 ** (8 * values.dtype.itemsize - 1)
    return bool(np.abs(centred).max(initial=0) > SILENCE * full)


def probe_wav(path: str | Path) -> AudioFacts | None:
    """The same facts from the chunks of a WAV file; None for anything but plain samples, which FFmpeg then reads."""
    try:
        wav = read_wav(path)
        if wav is None or not wav.plain:
            return None
        count = wav.held // (wav.channels * wav.bits // 8)
        if not count:
            raise ProbeError("no-audio-stream", "the sound has no samples")
        silent = not any(map(_is_loud, samples(path, wav)))
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    return AudioFacts(
        rate=wav.rate, channels=wav.channels, duration=Fraction(count, wav.rate), offset=Fraction(0), silent=silent,
        truncated=wav.truncated, codec=f"pcm {wav.bits} bits",
    )  # fmt: skip
