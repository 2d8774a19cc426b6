"""What a media file says about itself: headers, read in parallel and remembered.

Nothing is decoded here but the first audible sample of sound files. ``deep`` decodes everything.
"""

import os
import sqlite3
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vfun_cli.devices import cpu_cores

if TYPE_CHECKING:
    import av
    from numpy.typing import NDArray

OPEN_TIMEOUT = 20.0
"""Seconds after which FFmpeg gives up opening or reading one file (network file systems stall)."""
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
CACHE_WAIT = 1.0
"""Seconds to wait for another process that writes the cache, before doing without it."""
SILENCE = 1e-3
"""-60 dB: nothing in the file is louder."""
FACTS_VERSION = 2
"""Raise it when a probe reports something new or writes it otherwise: old caches are then not believed."""

MediaKind = Literal["visual", "audio"]
OnProgress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


class ProbeError(Exception):
    """A file that cannot be used, with its problem code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class VisualFacts:
    """The header of a video or a picture."""

    kind: Literal["video", "image"]
    width: int
    """Pixels as displayed: turned where the file says so."""
    height: int
    frames: int
    """As the header or the index has it, otherwise counted; 1 for a picture."""
    fps: Fraction
    """0 where the file does not say, and for a picture."""
    variable: bool
    """Frames are not equally far apart."""
    duration: Fraction
    """Seconds: frames / fps."""
    square: bool
    """Pixels are square."""
    truncated: bool
    """The index points past the end of the file."""
    codec: str


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """The header of a file with sound."""

    rate: int
    channels: int
    duration: Fraction
    """Seconds of sound."""
    offset: Fraction
    """Seconds from the start of the picture (or file) to the first sample."""
    silent: bool
    truncated: bool
    codec: str

    @property
    def end(self) -> Fraction:
        """Seconds from the start of the picture to the last sample."""
        return self.offset + self.duration


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A probe that failed."""

    code: str
    message: str


Facts = VisualFacts | AudioFacts | Failure
_KINDS: dict[str, type[VisualFacts] | type[AudioFacts] | type[Failure]] = {
    kind.__name__: kind for kind in (VisualFacts, AudioFacts, Failure)
}


def probe_visual(path: str | Path) -> VisualFacts:
    """Size, length and frame rate of a video or a picture.

    Raises:
        ProbeError: with the code of what is wrong.
    """
    _require_file(path)
    if os.path.splitext(path)[1].lower() in PICTURES:  # noqa: PTH122
        try:
            return _probe_picture(path)
        except ProbeError as error:
            if error.code == "truncated-media":
                raise
            # a video with a picture's suffix is still worth its right name: video-as-image
    return _guarded(_probe_video, path)


def probe_audio(path: str | Path) -> AudioFacts:
    """Rate, length and start of the first audio stream.

    Raises:
        ProbeError: with the code of what is wrong.
    """
    _require_file(path)
    if (facts := _probe_wav(path)) is not None:
        return facts
    return _guarded(_probe_sound, path)


def probe_many(
    wanted: Iterable[tuple[str, MediaKind]],
    *,
    cache: Path | None = None,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> dict[tuple[str, str], Facts]:
    """Probe each (path, kind) once, in threads; what cannot be probed is a Failure."""
    keys = list(dict.fromkeys(wanted))
    # Threads beyond the CPUs hide the latency of disks and network file systems.
    answers = remembered(keys, _probe, cache=cache, threads=threads or 2 * cpu_cores(), progress=progress)
    return {key: _decode_facts(answer) for key, answer in answers.items()}


def remembered(
    keys: Sequence[tuple[str, str]],
    compute: Callable[[tuple[str, str]], str],
    *,
    cache: Path | None,
    threads: int,
    progress: OnProgress | None,
) -> dict[tuple[str, str], str]:
    """``compute`` each (path, kind) in threads, but take answers about unchanged files from the SQLite file ``cache``.

    A file counts as unchanged when its size and modification time are.
    """
    stamps = {path: _stamp(path) for path, _ in keys} if cache else {}
    known = _load(cache) if cache else {}
    found = {key: known[key][1] for key in keys if key in known and known[key][0] == stamps[key[0]]}
    missing = [key for key in keys if key not in found]
    report = progress or (lambda done, total: None)
    report(len(found), len(keys))
    pool = ThreadPoolExecutor(min(threads, len(missing)) or 1)
    try:
        for done, (key, answer) in enumerate(zip(missing, pool.map(compute, missing), strict=True), 1):
            found[key] = answer
            report(len(keys) - len(missing) + done, len(keys))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the queue
        if cache and missing:
            _save(cache, ((key, stamps[key[0]], found[key]) for key in missing if key in found))
    return found


def _probe(key: tuple[str, str]) -> str:
    path, kind = key
    try:
        return _encode_facts(probe_visual(path) if kind == "visual" else probe_audio(path))
    except ProbeError as error:
        return _encode_facts(Failure(code=error.code, message=error.message))


def _require_file(path: str | Path) -> None:
    """A regular, readable file with something in it: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)  # noqa: PTH116 - pathlib costs a tenth of the whole probe
    except (FileNotFoundError, NotADirectoryError):
        raise ProbeError("missing-file", "no such file") from None
    except (OSError, ValueError) as error:
        raise ProbeError("unreadable-file", str(getattr(error, "strerror", None) or error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise ProbeError("not-a-file", "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if not status.st_size:
        raise ProbeError("empty-file", "the file has no bytes")


def _guarded(probe: "Callable[[av.container.InputContainer, str], Any]", path: str | Path) -> Any:
    """Open with PyAV and probe; what FFmpeg says becomes a ProbeError."""
    import av

    try:
        with av.open(str(path), timeout=OPEN_TIMEOUT) as container:
            return probe(container, str(path))
    except ProbeError:
        raise
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    except Exception as error:  # PyAV raises its own kinds, and plain ones on absurd header values
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ProbeError("unreadable-media", f"FFmpeg cannot open it: {why}") from None


def _probe_picture(path: str | Path) -> VisualFacts:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "TIFF"):
                raise ProbeError("unreadable-media", "an animation")
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5..8 swap the sides
            width, height = image.size[::-1] if turned else image.size
            if not _has_end_mark(path, image.format or ""):
                image.load()  # no end mark may be harmless; decoding tells
            codec = (image.format or "").lower()
    except ProbeError:
        raise
    except UnidentifiedImageError:
        raise ProbeError("unreadable-media", "not a picture that Pillow knows") from None
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken files
        code = "truncated-media" if "truncated" in str(error) else "unreadable-media"
        raise ProbeError(code, f"the picture cannot be read: {error}") from None
    return VisualFacts(
        kind="image", width=width, height=height, frames=1, fps=Fraction(0), variable=False,
        duration=Fraction(0), square=True, truncated=False, codec=codec,
    )  # fmt: skip


_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def _has_end_mark(path: str | Path, picture: str) -> bool:
    mark = _END_MARKS.get(picture)
    if mark is None:
        return True
    with Path(path).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        return mark in file.read()


def _probe_video(container: "av.container.InputContainer", path: str) -> VisualFacts:
    if not container.streams.video:
        raise ProbeError("no-video-stream", "there is no picture in it")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        return _probe_picture(path)
    stream = container.streams.video[0]
    context = stream.codec_context
    rate, frames, variable, truncated = stream.average_rate or Fraction(0), stream.frames, False, False
    index = stream.index_entries
    if len(index):
        last = index[-1]
        truncated = container.size < last.pos + last.size
    if not frames or 0 < len(index) < frames:  # AVI counts frames that were never written
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        times = sorted(stamp for stamp in stamps if stamp is not None)
        frames, variable = len(stamps), _uneven(times)
        if stamps and not times:  # a raw stream: FFmpeg would make up 25 frames a second
            rate = Fraction(0)
        if variable and stream.time_base and times[-1] > times[0]:
            rate = Fraction(frames - 1) / ((times[-1] - times[0]) * stream.time_base)
    elif stream.average_rate != stream.base_rate:
        # Two different rates are a sign, no proof: the spacing in the index decides.
        variable = _uneven(sorted(entry.timestamp for entry in index)) if len(index) else True
    width, height = context.width, context.height
    if container.format.name.startswith("mov") and _mp4_is_rotated(path, container.size):
        width, height = height, width
    square = stream.sample_aspect_ratio in (None, 0, 1)
    return VisualFacts(
        kind="image" if frames == 1 and not rate else "video", width=width, height=height, frames=frames,
        fps=Fraction(rate), variable=variable, duration=frames / rate if rate else Fraction(0),
        square=square, truncated=truncated, codec=context.name,
    )  # fmt: skip


def _uneven(times: list[int]) -> bool:
    """Whether sorted timestamps differ by more than the rounding of the container's clock."""
    if len(times) < 3:
        return False
    steps = [later - earlier for earlier, later in pairwise(times)]
    # The last step is left out: encoders end a file as they like.
    body = steps[:-1] if len(steps) > 2 else steps
    return max(body) - min(body) > max(2, sum(steps) / len(steps) / 10)


def _mp4_is_rotated(path: str, size: int) -> bool:
    """Whether an mp4 of ``size`` bytes shows its first picture track turned by a quarter (``moov/trak/tkhd``).

    PyAV tells the rotation only after decoding a frame, which takes ten times as long as the header
    (ISO/IEC 14496-12, 8.3.2: a 3x3 matrix, then width and height).
    """
    moov, at = _box(path, b"moov", size), 0
    while (at := moov.find(b"tkhd", at)) >= 0:
        at += 4
        start = at + (52 if moov[at : at + 1] == b"\x01" else 40)  # version 1 has 64-bit times
        if start + 44 > len(moov):
            return False
        across, turn, _, _, down, *_, width, height = struct.unpack_from(">11i", moov, start)
        if width > 0 and height > 0:  # a track with a picture
            return across == 0 and down == 0 and turn != 0
    return False


def _box(path: str, name: bytes, size: int) -> bytes:
    """The payload of a top-level box, or nothing."""
    file = os.open(path, os.O_RDONLY)
    try:
        position = 0
        while position + 8 <= size:
            head, header = os.pread(file, 16, position), 8
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length, header = int.from_bytes(head[8:16], "big"), 16
            if length == 0:
                length = size - position
            if length < header:
                break
            if head[4:8] == name:
                return os.pread(file, min(length, size - position) - header, position + header)
            position += length
        return b""
    finally:
        os.close(file)


def _probe_sound(container: "av.container.InputContainer", path: str) -> AudioFacts:
    import av

    if not container.streams.audio:
        raise ProbeError("no-audio-stream", "there is no sound in it")
    stream = container.streams.audio[0]
    base = stream.time_base or Fraction(1, av.time_base)
    zero = time_zero(container)
    start = stream.start_time * base if stream.start_time is not None else zero
    if stream.duration is not None:
        duration = stream.duration * base
    else:  # Matroska: only the file has a length
        end = Fraction((container.duration or 0) + (container.start_time or 0), av.time_base)
        duration = max(Fraction(0), end - start)
    codec = stream.codec_context.name
    rate, channels = stream.rate, stream.channels
    silent = not _is_audible(container)
    if not rate or not duration:
        raise ProbeError("no-audio-stream", "the sound has no samples")
    return AudioFacts(
        rate=rate, channels=channels, duration=duration, offset=start - zero, silent=silent,
        truncated=False, codec=codec,
    )  # fmt: skip


def time_zero(container: "av.container.InputContainer") -> Fraction:
    """Second 0 of a file with sound: its first video frame (not a cover picture), otherwise its first sample."""
    from av.stream import Disposition

    shown = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]
    for stream in (*shown, *container.streams.audio):
        if stream.start_time is not None and stream.time_base is not None:
            return stream.start_time * stream.time_base
    return Fraction(0)


def _is_audible(container: "av.container.InputContainer") -> bool:
    """Decode until something is louder than SILENCE: one piece in most files, everything in a silent one."""
    return any(_is_loud(frame.to_ndarray()) for frame in container.decode(audio=0))


def _is_loud(samples: "NDArray[Any]") -> bool:
    """Whether one of the samples (u8, integer or float, any shape) is louder than SILENCE."""
    import numpy as np

    values = samples.astype(np.float64) - (128 if samples.dtype == np.uint8 else 0)
    full = 1 if samples.dtype.kind == "f" else 2 ** (8 * samples.dtype.itemsize - 1)
    return bool(np.abs(values).max(initial=0) > SILENCE * full)


def _probe_wav(path: str | Path) -> AudioFacts | None:
    """The same facts from the chunks of a plain RIFF file; None for anything else, which FFmpeg then reads.

    FFmpeg searches uncompressed sound for hidden surround formats: 23 ms for 3 s of stereo; this takes 0.1 ms.
    """
    import numpy as np

    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            layout, data = _wav_chunks(file, size)
            if layout is None or data is None:
                return None
            tag, channels, rate, bits = layout
            kind = {(1, 8): "u1", (1, 16): "<i2", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}.get((tag, bits))
            start, length = data
            if kind is None or not channels or not rate or length >= 0xFFFFFF00:  # streaming writers leave no length
                return None
            held = min(length, size - start)
            samples = held // (channels * bits // 8)
            if not samples:
                raise ProbeError("no-audio-stream", "the sound has no samples")
            file.seek(start)
            pieces = iter(lambda: file.read(1 << 16), b"")
            unit = bits // 8
            audible = any(_is_loud(np.frombuffer(piece[: len(piece) // unit * unit], kind)) for piece in pieces)
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    return AudioFacts(
        rate=rate, channels=channels, duration=Fraction(samples, rate), offset=Fraction(0), silent=not audible,
        truncated=start + length > size, codec=f"pcm_{kind.strip('<')}",
    )  # fmt: skip


def _wav_chunks(file: Any, size: int) -> tuple[tuple[int, int, int, int] | None, tuple[int, int] | None]:
    """(format tag, channels, rate, bits) and (start, length) of the samples; None for a chunk that is not there."""
    layout = None
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None, None
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            return layout, (position + 8, length)
        if name == b"fmt " and length >= 16 and position + 8 + length <= size:
            body = file.read(min(length, 40))
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == 0xFFFE and len(body) >= 26:  # extensible: the real tag opens the sub-format
                tag = int.from_bytes(body[24:26], "little")
            layout = tag, channels, rate, bits
        position += 8 + length + length % 2
    return layout, None


# The cache: one table, one row per file and kind of probe.
_PASSING = ("unreadable-file", "decode-timeout", "decode-crash")
"""Failures that may be the machine's and not the file's: tried again next time."""
_Stamp = tuple[int, int]
_TABLE = """CREATE TABLE IF NOT EXISTS facts (path TEXT, kind TEXT, version INTEGER, size INTEGER, mtime_ns INTEGER,
            facts TEXT, PRIMARY KEY (path, kind))"""


def _stamp(path: str) -> _Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _load(cache: Path) -> dict[tuple[str, str], tuple[_Stamp, str]]:
    """All remembered facts. A cache that is damaged or of another version counts as empty: it can be made again."""
    if not cache.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"{cache.absolute().as_uri()}?mode=ro", timeout=CACHE_WAIT, uri=True)) as database:
            rows = database.execute(
                "SELECT path, kind, size, mtime_ns, facts FROM facts WHERE version = ?", (FACTS_VERSION,)
            )
            return {(path, kind): ((size, mtime), facts) for path, kind, size, mtime, facts in rows}
    except sqlite3.Error:
        return {}


def _save(cache: Path, entries: Iterable[tuple[tuple[str, str], _Stamp | None, str]]) -> None:
    """Remember facts; a cache that cannot be written costs time next time, nothing else."""
    rows = [
        (*key, FACTS_VERSION, *stamp, answer)
        for key, stamp, answer in entries
        if stamp is not None and not any(code in answer for code in _PASSING)
    ]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(cache, rows)
        except sqlite3.OperationalError:  # in use, or no permission
            return
        except sqlite3.DatabaseError:  # not a database, or damaged
            cache.unlink(missing_ok=True)
            _write(cache, rows)
    except (OSError, sqlite3.Error):
        return


def _write(cache: Path, rows: list[tuple[Any, ...]]) -> None:
    with closing(sqlite3.connect(cache, timeout=CACHE_WAIT)) as database, database:
        database.execute(_TABLE)
        database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?)", rows)


_NAMES = {name: tuple(item.name for item in fields(kind)) for name, kind in _KINDS.items()}
_TYPES: dict[str, tuple[Any, ...]] = {name: tuple(item.type for item in fields(kind)) for name, kind in _KINDS.items()}


def _encode_facts(facts: Facts) -> str:
    """``VisualFacts|video|640|…``: values in field order. A text that may hold the separator comes last."""
    name = type(facts).__name__
    return "|".join([name, *map(str, map(facts.__dict__.__getitem__, _NAMES[name]))])


def _decode_facts(text: str) -> Facts:
    name, _, rest = text.partition("|")
    parts = rest.split("|", len(_NAMES[name]) - 1)
    values = (_READ[kind](part) if kind in _READ else part for kind, part in zip(_TYPES[name], parts, strict=True))
    kept: dict[str, Any] = dict(zip(_NAMES[name], values, strict=True))
    return _KINDS[name](**kept)


def _fraction(text: str) -> Fraction:
    """``30000/1001``; four times as fast as the parser of Fraction, which a large cached set feels."""
    over, _, under = text.partition("/")
    return Fraction(int(over), int(under or 1))


_READ: dict[Any, Callable[[str], Any]] = {int: int, bool: "True".__eq__, Fraction: _fraction}
