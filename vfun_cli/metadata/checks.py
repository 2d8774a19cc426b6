"""Validation: every row against what its family needs and what its files hold, all problems at once."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vfun_cli.errors import MetadataError, did_you_mean
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.codes import CODES, Problem
from vfun_cli.metadata.deep import DeepFacts, decode_many
from vfun_cli.metadata.facts import AudioFacts, Facts, Failure, VisualFacts
from vfun_cli.metadata.fields import MetadataField, odd_sign, stated_media, texts_of
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.probe import probe_many
from vfun_cli.metadata.records import NUMBERS, Metadata, Record
from vfun_cli.metadata.remembered import OnProgress

if TYPE_CHECKING:
    from vfun_cli.metadata.table import ClipTable

MediaType = Literal["video", "image"]
MEDIA_TYPES: tuple[MediaType, ...] = ("video", "image")

_RATE = re.compile(r"[0-9]{0,40}(\.[0-9]{0,40}|/[0-9]{1,40})?")
LARGEST_NUMBER = 2**31 - 1
ASPECT_TOLERANCE = 0.02
"""Relative; encoders round sides to multiples of 2, 8 or 16."""
RATE_TOLERANCE = Fraction(1, 1000)
"""Relative; 29.97 for 30000/1001 is no difference, 30 is."""
AUDIO_TOLERANCE = Fraction(20, 1000)
"""Seconds of missing sound that are forgiven, as when training reads it."""
AUDIO_SURPLUS = 1
"""Seconds of sound after the video that need no remark."""
WIDEST_ASPECT = 4
USUAL_RATES = frozenset({16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How files are looked at."""

    cache: Path | None = None
    """SQLite file that remembers headers; None remembers nothing."""
    threads: int | None = None
    deep: bool = False
    """Decode everything."""
    deep_timeout: float = 60.0
    """Seconds a file."""
    trust_metadata: bool = False
    """Believe rows that state width, height, frames and fps, and do not touch their files."""
    progress: Callable[[str], OnProgress] | None = None
    """Called with the name of a stage; what it returns is called with (done, all)."""


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What is known of a row that can be trained."""

    row: int
    kind: MediaType
    width: int
    height: int
    frames: int
    fps: Fraction
    """0 for an image."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a validation."""

    metadata: Metadata
    media_types: tuple[MediaType, ...]
    """What the family trains on."""
    problems: tuple[Problem, ...]
    """In row order; problems of the whole file first."""
    clips: Mapping[int, RowFacts]
    """By row: what the files say (the row itself where it is trusted), for every row whose video could be read."""
    bad_rows: Collection[int] = field(default=frozenset())
    """Rows with an error."""

    @property
    def rows(self) -> int:
        """All rows, bad ones included."""
        return self.metadata.rows

    @property
    def ok(self) -> int:
        """Rows without an error."""
        return self.rows - len(self.bad_rows)

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep a row, or the file, out of training."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def plus(self, problems: Iterable[Problem]) -> "Report":
        """The report with further problems, such as those that only the plan knows of."""
        together = sorted([*self.problems, *problems], key=_by_row)
        return replace(self, problems=tuple(together), bad_rows=_bad_rows(together))

    def table(self) -> "ClipTable":
        """The rows without errors, for the plan."""
        return _table([clip for row, clip in sorted(self.clips.items()) if row not in self.bad_rows], self.metadata)

    def require_ok(self) -> None:
        """Refuse a report with errors: training starts on good rows only.

        Raises:
            MetadataError: with the first errors.
        """
        errors = self.errors
        if not errors:
            return
        lines = [f"  {describe(problem)}" for problem in errors[:10]]
        if len(errors) > 10:
            lines.append(f"  … and {len(errors) - 10} more")
        where = f"{len(self.bad_rows)} of {self.rows} rows" if self.bad_rows else f"the {self.metadata.whole}"
        way_out = "--fix OUT writes a corrected copy without bad rows." if self.bad_rows else CODES[errors[0].code].fix
        raise MetadataError(
            f"{self.metadata.path}: {where} cannot be trained on{' (counted from 0)' * bool(self.bad_rows)}:\n"
            + "\n".join(lines),
            hint=f"{way_out} All that is wrong: vfun validate-meta",
        )


def describe(problem: Problem) -> str:
    """``row 3, audio_path: missing-file: no such file (…/3.wav)``, printable whatever the file held."""
    place = ", ".join(
        part for part in (f"row {problem.row}" if problem.row is not None else "", problem.field or "") if part
    )
    text = f"{place}: " if place else ""
    text += f"{problem.code}: {problem.message}"
    if problem.path and problem.path not in problem.message:
        text += f" ({problem.path})"
    return printable(text)


def printable(text: str) -> str:
    """The text with what no terminal or UTF-8 file can hold written as escapes."""
    kept = (c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else repr(c)[1:-1] for c in text)
    return "".join(kept)


def validate(
    metadata: Metadata,
    fields: Sequence[MetadataField],
    media_types: Sequence[MediaType],
    root: str | Path | None,
    *,
    needs: ClipNeeds | None = None,
    settings: Settings | None = None,
) -> Report:
    """Check all rows and report everything that is wrong with them; raises nothing for what the data holds.

    ``fields`` and ``media_types`` are the family's; ``root`` is the folder that paths start from (None: the working
    directory); ``needs`` is what the settings ask of a clip (None: nothing).
    """
    settings = settings or Settings()
    rows = [_Row(record, fields, Path(root or ".")) for record in metadata.records]
    if metadata.format == "folder":
        for row in rows:  # nobody counted them
            row.known_by = row.field_of("visual")
    for row in rows:
        for check in _STATED_CHECKS:
            row.problems.extend(check(row, media_types))
    looked_at = [row for row in rows if not (settings.trust_metadata and row.states_everything)]
    wanted = [key for row in looked_at for key in row.files.values()]
    stage = settings.progress or (lambda name: lambda done, total: None)
    facts: Mapping[tuple[str, str], Facts] = probe_many(
        wanted, cache=settings.cache, threads=settings.threads, progress=stage("reading headers")
    )
    for row in looked_at:
        row.facts = {name: facts[key] for name, key in row.files.items()}
        for media_check in _MEDIA_CHECKS:
            row.problems.extend(media_check(row, needs or ClipNeeds()))
    if settings.deep:
        readable = [key for row in looked_at for n, key in row.files.items() if not isinstance(row.facts[n], Failure)]
        decoded = decode_many(
            readable, timeout=settings.deep_timeout, threads=settings.threads, cache=settings.cache,
            progress=stage("decoding"),
        )  # fmt: skip
        for row in looked_at:
            row.problems.extend(_check_decoded(row, decoded))
    _check_duplicates(rows)
    of_the_set = [*metadata.problems, *_check_captions(rows)]
    problems = sorted([*of_the_set, *(problem for row in rows for problem in row.problems)], key=_by_row)
    clips = {row.record.row: clip for row in rows if (clip := row.clip()) is not None}
    return Report(
        metadata=metadata, media_types=tuple(media_types), problems=tuple(problems), clips=clips,
        bad_rows=_bad_rows(problems),
    )  # fmt: skip


def _by_row(problem: Problem) -> int:
    return -1 if problem.row is None else problem.row


def _bad_rows(problems: Iterable[Problem]) -> frozenset[int]:
    return frozenset(problem.row for problem in problems if problem.row is not None and problem.severity == "error")


def table_without_files(metadata: Metadata) -> "ClipTable | None":
    """The clip table of rows that all state width, height, frames and fps (images: width and height); opens no file.

    None if the metadata has problems or a row leaves something out.
    """
    clips = [_stated_clip(record) for record in metadata.records]
    stated = [clip for clip in clips if clip is not None]
    return None if metadata.problems or len(stated) < len(clips) else _table(stated, metadata)


def exact_rate(value: Any) -> Fraction | None:
    """A frame rate as people write it (25, 29.97, "30000/1001") as a fraction; None for what is no rate.

    Rates within a thousandth of n * 1000 / 1001 are that: nothing films at 29.97 exactly.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _RATE.fullmatch(value.strip()):  # of "1e999999999" Fraction makes all digits
        return None
    try:
        rate = Fraction(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    if not Fraction(1, 1000) <= rate <= 10**6:
        return None
    if rate.denominator == 1:
        return rate
    film = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
    return film if abs(film - rate) * 1000 < 1 and film else rate.limit_denominator(100000)


# One row while it is being checked


class _Row:
    """A record with its absolute paths, what its files hold, and what was found."""

    def __init__(self, record: Record, fields: Sequence[MetadataField], root: Path) -> None:
        self.record = record
        self.fields = fields
        self.root = root
        self.names: dict[str, str] = {item.media: item.name for item in fields}
        self.problems: list[Problem] = []
        self.known_by: str | None = None
        """The field whose file says which row it is, where a problem names none."""
        self.paths: dict[str, str] = {}
        """Absolute media paths by field."""
        self.borrowed = {item.name for item in fields if item.key(record.fields) != item.name}
        """Fields that are left to another field's file."""
        self.facts: dict[str, Facts] = {}
        for name, value in stated_media(record.fields, fields).items():
            if isinstance(value, str) and path_fault(value) is None:
                self.paths[name] = absolute(root / value)

    @property
    def files(self) -> dict[str, tuple[str, Literal["visual", "audio"]]]:
        """(path, how to probe it) by field."""
        media = {item.name: item.media for item in self.fields}
        return {name: (path, "audio" if media[name] == "audio" else "visual") for name, path in self.paths.items()}

    @property
    def stated_type(self) -> MediaType | None:
        value = self.record.fields.get("type")
        return value if isinstance(value, str) and value in MEDIA_TYPES else None

    @property
    def states_everything(self) -> bool:
        return _stated_clip(self.record) is not None

    def field_of(self, media: str) -> str | None:
        """The name of the family's visual, control or audio field."""
        return self.names.get(media)

    def of(self, media: str) -> Facts | None:
        """The facts of that field's file."""
        return self.facts.get(self.field_of(media) or "")

    def problem(self, code: str, message: str, name: str | None = None) -> Problem:
        path = self.paths.get(name or "") or self.paths.get(self.known_by or "")
        return Problem(row=self.record.row, code=code, message=message, field=name, path=path)

    def clip(self) -> RowFacts | None:
        """What the file says; where it was not opened, what the row states."""
        facts = self.of("visual")
        if isinstance(facts, VisualFacts):
            return RowFacts(
                row=self.record.row, kind=facts.kind, width=facts.width, height=facts.height, frames=facts.frames,
                fps=facts.fps,
            )  # fmt: skip
        return None if self.facts else _stated_clip(self.record)


def _stated_clip(record: Record) -> RowFacts | None:
    stated = record.fields
    kind = stated.get("type", "video")
    if kind not in MEDIA_TYPES or not (_is_count(stated.get("width")) and _is_count(stated.get("height"))):
        return None
    width, height = int(stated["width"]), int(stated["height"])
    if kind == "image":
        return RowFacts(row=record.row, kind="image", width=width, height=height, frames=1, fps=Fraction(0))
    rate = exact_rate(stated.get("fps"))
    if rate is None or not _is_count(stated.get("frames")):
        return None
    return RowFacts(row=record.row, kind="video", width=width, height=height, frames=int(stated["frames"]), fps=rate)


def _is_count(value: Any) -> bool:
    """A whole number from 1 to LARGEST_NUMBER, 640.0 included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 1 <= value <= LARGEST_NUMBER and value == int(value)


def path_fault(value: str) -> str | None:
    """Why a text cannot name a file; None if it can."""
    if not value.strip():
        return "the path is empty"
    if "\0" in value:
        return "the path holds a null character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "the path holds half a character (a lone surrogate)"
    return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# Checks of what a row states. Each takes the row and the family's media types.


def _check_fields(row: _Row, media_types: Sequence[MediaType]) -> Iterator[Problem]:
    stated = row.record.fields
    for item in row.fields:
        value = stated.get(item.name)
        if value is None and item.required:
            near = did_you_mean(item.name, [key for key in stated if key not in {f.name for f in row.fields}])
            if near or item.name not in row.borrowed:
                yield row.problem("missing-field", f"{item.name} is missing.{near}", item.name)
        elif value is None:
            if item.media == "control":
                yield row.problem("missing-control", "no control clip: trains with zeros in its place", item.name)
        elif not isinstance(value, str):
            yield row.problem("wrong-type", f"a path is a text, not {_show(value)}", item.name)
        elif fault := path_fault(value):
            yield row.problem("invalid-path", fault, item.name)


def _check_text(row: _Row, media_types: Sequence[MediaType]) -> Iterator[Problem]:
    if "text" not in row.record.fields:
        if near := _like_text(tuple(row.record.fields)):
            yield row.problem("missing-field", f"text is missing.{near}", "text")
        return
    stated = row.record.fields["text"]
    if not isinstance(stated, list):
        yield from _check_caption(row, stated, "the caption")
    elif not stated:
        yield row.problem("wrong-type", "a list of captions is empty: leave text out", "text")
    else:
        for number, text in enumerate(stated):
            yield from _check_caption(row, text, f"caption {number} of the list")


def _check_caption(row: _Row, text: Any, which: str) -> Iterator[Problem]:
    if not isinstance(text, str):
        yield row.problem("wrong-type", f"{which} is no text, but {_show(text)}", "text")
    elif not text.strip():
        yield row.problem("empty-caption", f"{which} is empty", "text")
    elif odd := odd_sign(text):
        yield row.problem("garbled-caption", f"{which} holds {odd!a}", "text")


@lru_cache  # the rows of a file have few different sets of keys
def _like_text(keys: tuple[str, ...]) -> str:
    """Names a key that may be a misspelt text: such a row is not meant to have none."""
    return did_you_mean("text", [key for key in keys if key not in NUMBERS])


def _check_type(row: _Row, media_types: Sequence[MediaType]) -> Iterator[Problem]:
    if "type" not in row.record.fields:
        yield row.problem("missing-type", "neither video nor image is stated", "type")
        return
    value = row.record.fields["type"]
    if not isinstance(value, str):
        yield row.problem("wrong-type", f"type is a text, not {_show(value)}", "type")
    elif value not in MEDIA_TYPES:
        near = did_you_mean(value.lower(), MEDIA_TYPES)
        yield row.problem("unknown-type", f"{_show(value)} is neither video nor image.{near}", "type")
    elif value not in media_types:
        yield row.problem("unsupported-type", f"the family trains on {' and '.join(media_types)} only", "type")


def _check_numbers(row: _Row, media_types: Sequence[MediaType]) -> Iterator[Problem]:
    for name in NUMBERS:
        value = row.record.fields.get(name)
        if name in row.record.fields and not (exact_rate(value) if name == "fps" else _is_count(value)):
            yield row.problem("wrong-type", f"a positive number is needed, not {_show(value)}", name)
        elif name != "fps" and isinstance(value, str):
            yield row.problem("wrong-type", f"a number is needed, not {_show(value)}", name)


def _check_paths(row: _Row, media_types: Sequence[MediaType]) -> Iterator[Problem]:
    base = absolute(row.root)
    for name, path in row.paths.items():
        if name not in row.borrowed and os.path.commonpath([base, path]) != base:
            yield row.problem("path-outside-root", f"outside the data root {base}", name)
    control, visual = row.field_of("control"), row.field_of("visual")
    if control in row.paths and visual in row.paths and row.paths[control] == row.paths[visual]:
        yield row.problem("control-is-video", "the control clip is the video itself", control)


# Checks of what the files hold. Each takes the row, with its facts, and what the settings need.


def _check_readable(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    visual = row.of("visual")
    for name, facts in row.facts.items():
        if name in row.borrowed and (isinstance(visual, Failure) or (visual and visual.truncated)):
            continue  # said of the video itself
        if name in row.borrowed and isinstance(facts, Failure) and facts.code == "no-audio-stream":
            message = (
                f"{name} is missing, and the video has no sound: name a file with sound, or use a video with sound"
            )
            yield row.problem("missing-field", message, name)
        elif isinstance(facts, Failure):
            yield row.problem(facts.code, facts.message, name)
        elif facts.truncated:
            yield row.problem("truncated-media", "the header promises more bytes than the file has", name)


def _check_visual(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    for media in ("visual", "control"):
        name, facts = row.field_of(media), row.of(media)
        if not isinstance(facts, VisualFacts):
            continue
        if facts.kind == "video":
            if not facts.frames:
                yield row.problem("no-frames", "the video has no frames", name)
            elif exact_rate(str(facts.fps)) is None:
                yield row.problem("unknown-frame-rate", "the video states no usable frame rate", name)
            elif facts.variable:
                yield row.problem(
                    "variable-frame-rate", f"frames are unevenly spaced; read by time at {_rate(facts.fps)}", name
                )
        if not facts.width or not facts.height:
            yield row.problem("no-frames", "the picture has no size", name)
        elif not facts.square:
            yield row.problem("non-square-pixels", "the pixels are not square", name)
        if facts.transparent:
            yield row.problem("transparent-picture", "what is transparent in it trains as white", name)


def _check_kind(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    facts, name = row.of("visual"), row.field_of("visual")
    if not isinstance(facts, VisualFacts) or row.stated_type in (None, facts.kind):
        return
    code = "image-as-video" if facts.kind == "image" else "video-as-image"
    yield row.problem(code, f"the row says {row.stated_type}, the file is a {facts.codec} {facts.kind}", name)


def _check_stated(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    facts, stated = row.of("visual"), row.record.fields
    if not isinstance(facts, VisualFacts):
        return
    codes = {"width": "wrong-size", "height": "wrong-size", "frames": "wrong-frames"}
    for name, code in codes.items():
        if name == "frames" and facts.kind == "image":
            continue
        if _is_count(stated.get(name)) and int(stated[name]) != getattr(facts, name):
            yield row.problem(code, f"the row says {int(stated[name])}, the file has {getattr(facts, name)}", name)
    rate = exact_rate(stated.get("fps"))
    if facts.kind == "video" and rate is not None and facts.fps and _differ(rate, facts.fps):
        yield row.problem("wrong-fps", f"the row says {_rate(rate)}, the file has {_rate(facts.fps)}", "fps")


def _check_length(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    facts, name = row.of("visual"), row.field_of("visual")
    if not isinstance(facts, VisualFacts) or not facts.frames or facts.truncated:
        return
    if facts.width and facts.height and max(facts.width, facts.height) > WIDEST_ASPECT * min(facts.width, facts.height):
        yield row.problem("extreme-aspect", f"{facts.width}x{facts.height} is longer than 4:1", name)
    stride = needs.stride_at(facts.fps.numerator, facts.fps.denominator)
    if facts.kind == "video" and needs.clip_frames(facts.frames, stride) < needs.min_frames:
        needed = needs.shortest_video(stride)
        yield row.problem("clip-too-short", f"{facts.frames} frames, the settings need {needed}", name)


def _check_control(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    facts, control, name = row.of("visual"), row.of("control"), row.field_of("control")
    if not isinstance(facts, VisualFacts) or not isinstance(control, VisualFacts):
        return
    if facts.kind != control.kind:
        yield row.problem("control-type", f"a {control.kind} as the control of a {facts.kind}", name)
        return
    if 0 < control.frames < facts.frames and not control.truncated:
        yield row.problem("control-too-short", f"{control.frames} frames, the video has {facts.frames}", name)
    ours, theirs = facts.width * control.height, control.width * facts.height
    if ours and theirs and abs(ours - theirs) > ASPECT_TOLERANCE * max(ours, theirs):
        sizes = f"{control.width}x{control.height}, the video {facts.width}x{facts.height}"
        yield row.problem("control-aspect", sizes, name)
    if control.fps and facts.fps and _differ(control.fps, facts.fps):
        yield row.problem("control-frame-rate", f"{_rate(control.fps)}, the video {_rate(facts.fps)}", name)


def _check_audio(row: _Row, needs: ClipNeeds) -> Iterator[Problem]:
    audio, facts, name = row.of("audio"), row.of("visual"), row.field_of("audio")
    if not isinstance(audio, AudioFacts):
        return
    if audio.silent:
        yield row.problem("silent-audio", "nothing is louder than -60 dB", name)
    if audio.rate not in USUAL_RATES:
        yield row.problem("odd-sample-rate", f"{audio.rate} Hz", name)
    if audio.channels > 2:
        yield row.problem("many-channels", f"{audio.channels} channels", name)
    if audio.offset > AUDIO_TOLERANCE:
        yield row.problem("audio-offset", f"the sound starts {float(audio.offset):.3f} s late", name)
    if not isinstance(facts, VisualFacts) or not facts.duration:
        return
    lengths = f"the sound ends at {float(audio.end):.3f} s, the video at {float(facts.duration):.3f} s"
    if facts.duration - audio.end > AUDIO_TOLERANCE and not audio.truncated:
        yield row.problem("audio-too-short", lengths, name)
    elif audio.end - facts.duration > AUDIO_SURPLUS:
        yield row.problem("audio-longer", lengths, name)


def _check_decoded(row: _Row, decoded: Mapping[tuple[str, str], DeepFacts | Failure]) -> Iterator[Problem]:
    for name, key in row.files.items():
        found, header = decoded.get(key), row.facts.get(name)
        if isinstance(header, VisualFacts | AudioFacts) and header.truncated:
            continue  # that is why
        if isinstance(found, Failure):
            yield row.problem(found.code, found.message, name)
        elif found and isinstance(header, VisualFacts) and header.kind == "video" and found.frames < header.frames:
            yield row.problem("fewer-frames", f"header {header.frames}, decoded {found.frames}", name)


def _check_duplicates(rows: Sequence[_Row]) -> None:
    """Rows with the files of an earlier one and no other text, and rows with its video only."""
    texts: defaultdict[str, dict[tuple[Any, ...], int]] = defaultdict(dict)
    for row in rows:
        name, fields = row.field_of("visual"), row.record.fields
        path, stated = row.paths.get(name or ""), texts_of(fields) or (("",) if "text" not in fields else ())
        if path is None or not stated:
            continue
        seen, keys = texts[path], [(tuple(row.paths.items()), text) for text in stated]
        if all(key in seen for key in keys):
            row.problems.append(row.problem("duplicate-row", f"the same as row {seen[keys[0]]}", name))
        elif seen:
            first = min(seen.values())
            row.problems.append(row.problem("conflicting-row", f"the video of row {first} with another text", name))
        for key in keys:
            seen.setdefault(key, row.record.row)


def _check_captions(rows: Sequence[_Row]) -> Iterator[Problem]:
    """Rows without a text, told once: a whole set may be meant to have none."""
    keys = [tuple(row.record.fields) for row in rows]
    without = sum("text" not in each and not _like_text(each) for each in keys)
    if without:
        message = f"{without} of {len(rows)} rows have no text: they train with an empty caption"
        yield Problem(row=None, code="missing-caption", message=message, field="text")


def _differ(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) > RATE_TOLERANCE * max(one, other) * Fraction(9, 10)


def _rate(fps: Fraction) -> str:
    return f"{float(fps):.5g} fps"


def _table(clips: Sequence[RowFacts], metadata: Metadata) -> "ClipTable":
    import numpy as np

    from vfun_cli.metadata.table import ClipTable

    def column(values: Iterator[int]) -> Any:
        return np.fromiter(values, np.int64, len(clips))

    rates = [clip.fps.limit_denominator(LARGEST_NUMBER) for clip in clips]
    return ClipTable(
        row=column(clip.row for clip in clips),
        is_image=np.fromiter((clip.kind == "image" for clip in clips), np.bool_, len(clips)),
        width=column(clip.width for clip in clips),
        height=column(clip.height for clip in clips),
        frames=column(clip.frames for clip in clips),
        fps_num=column(rate.numerator for rate in rates),
        fps_den=column(rate.denominator for rate in rates),
        held_out=np.zeros(len(clips), np.bool_),
        set=column(metadata.set_of(clip.row) for clip in clips) if metadata.sets else np.zeros(len(clips), np.int64),
    )


_STATED_CHECKS = (_check_fields, _check_text, _check_type, _check_numbers, _check_paths)
_MEDIA_CHECKS = (
    _check_readable, _check_visual, _check_kind, _check_stated, _check_length, _check_control, _check_audio,
)  # fmt: skip
