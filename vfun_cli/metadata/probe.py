"""What a media file says about itself: headers, read in parallel and remembered.

Nothing is decoded here but the first audible sample of sound files and, of videos that are no plain mp4, the first
picture. ``deep`` decodes everything.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vfun_cli import lfs
from vfun_cli.devices import cpu_cores
from vfun_cli.files import NotRegular, regular_status
from vfun_cli.metadata.facts import AudioFacts, Facts, Failure, ProbeError, VisualFacts, decode_facts, encode_facts
from vfun_cli.metadata.mp4 import PictureTrack, picture_track
from vfun_cli.metadata.opening import open_media
from vfun_cli.metadata.pictures import PICTURES, probe_picture
from vfun_cli.metadata.remembered import OnProgress, remembered
from vfun_cli.metadata.sounds import probe_sound, probe_wav
from vfun_cli.metadata.videos import probe_video

if TYPE_CHECKING:
    import av

OPEN_TIMEOUT = 20.0
"""Seconds after which FFmpeg gives up opening or reading one file: it may search the whole of it for what it knows."""
MP4_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".m4a", ".3gp"})
"""Files that are tried as mp4 first. Such a header has its own end: no search, and no clock, which takes Python's lock
at each of FFmpeg's reads (four threads: 144 us a file with it, 120 without, 105 without the search for the format)."""

FILES_AT_ONCE = 16
"""Files that a thread takes at once."""

MediaKind = Literal["visual", "audio"]


def probe_visual(path: str | Path) -> VisualFacts:
    """Size, length and frame rate of a video or a picture.

    Raises:
        ProbeError: with the code of what is wrong.
    """
    path = str(path)
    if (suffix := _suffix(path)) in MP4_SUFFIXES:
        facts: VisualFacts = _guarded(partial(probe_video, track=_track_of(path)), path)
        return facts
    _require_file(path)
    if suffix in PICTURES:
        try:
            return probe_picture(path)
        except ProbeError as error:
            if error.code in ("truncated-media", "unsupported-picture"):
                raise
            # an animation is a video, and a video with a picture's suffix still worth its right name: video-as-image
    facts = _guarded(probe_video, path)
    return probe_picture(path) if facts.kind == "image" else facts  # FFmpeg knows more pictures than training reads


def probe_audio(path: str | Path) -> AudioFacts:
    """Rate, length and start of the first audio stream.

    Raises:
        ProbeError: with the code of what is wrong.
    """
    _require_file(path)
    if (facts := probe_wav(path)) is not None:
        return facts
    return _guarded(probe_sound, path)


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
    return remembered(
        keys, _probe, to_text=encode_facts, from_text=decode_facts, cache=cache, threads=threads or 2 * cpu_cores(),
        at_once=FILES_AT_ONCE, progress=progress,
    )  # fmt: skip


def _probe(key: tuple[str, str]) -> Facts:
    path, kind = key
    try:
        return probe_visual(path) if kind == "visual" else probe_audio(path)
    except ProbeError as error:
        return Failure(code=error.code, message=error.message)
    except OSError as error:  # of the disk, in the midst of reading
        return Failure(code="unreadable-file", message=error.strerror or str(error))


def _require_file(path: str | Path) -> None:
    """A regular, readable file with something in it: opening a pipe would wait for ever."""
    try:
        status = regular_status(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ProbeError("missing-file", f"no such file{_twin(str(path))}") from None
    except NotRegular as error:
        raise ProbeError("not-a-file", str(error.strerror)) from None
    except OSError as error:
        raise ProbeError("unreadable-file", error.strerror or str(error)) from None
    if not status.st_size:
        raise ProbeError("empty-file", "the file has no bytes")
    if status.st_size <= lfs.LONGEST and lfs.is_lfs_pointer(path):
        raise ProbeError("lfs-pointer", lfs.WHAT)


def _twin(path: str) -> str:
    """Says that the same path is there with slashes for backslashes, or in another Unicode form; else nothing.

    macOS writes names decomposed, most others composed: both look alike. Every part of the path is tried for itself.
    """
    if path.isascii() and "\\" not in path:
        return ""
    found = Path()
    for part in Path(path.replace("\\", "/")).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        # Other than Path.exists, it raises nothing, for names that are too long, say.
        there = next((place for form in forms if os.path.exists(place := found / form)), None)  # noqa: PTH110
        if there is None:
            return ""
        found = there
    form = "NFC" if unicodedata.is_normalized("NFC", str(found)) else "NFD"
    how = "with / instead of \\" if "\\" in path else f"in Unicode form {form}, which looks the same"
    return f"; there is {found} ({how})"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - pathlib is slower, once for every file


def _track_of(path: str) -> PictureTrack | None:
    """What the header of an mp4 says, read first: where there is one, the file itself is good."""
    try:
        track = picture_track(path)
    except (OSError, ValueError):
        track = None
    if track is None:
        _require_file(path)
    return track


def _guarded(probe: "Callable[[av.container.InputContainer, str], Any]", path: str | Path) -> Any:
    """Open with PyAV and probe; what FFmpeg says becomes a ProbeError."""
    try:
        with _opened(str(path)) as container:
            return probe(container, str(path))
    except ProbeError:
        raise
    except PermissionError:
        raise ProbeError("unreadable-file", "permission denied") from None
    except Exception as error:  # PyAV raises its own kinds, and plain ones on absurd header values
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ProbeError("unreadable-media", f"FFmpeg cannot open it: {why}") from None


def _opened(path: str) -> "av.container.InputContainer":
    import av

    if _suffix(path) in MP4_SUFFIXES:
        try:
            return open_media(path, kind="mov")
        except av.InvalidDataError:
            pass  # another kind of file with this suffix
    return open_media(path, timeout=OPEN_TIMEOUT)
