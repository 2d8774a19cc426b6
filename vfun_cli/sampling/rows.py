"""Which videos are wanted: from rows of a file or from options to settings and media that are there and fit.

    wanted = Wanted(steps=20)
    found = videos_of_rows(Path("metadata.json"), None, spec, dims, wanted)
    found.require_ok()                   # every problem of every row at once
    request_of(found.videos[0])          # in sampling/requests.py, with torch

A row has a prompt (``prompt`` or ``text``; of a list the first) and what the family can be given: ``image``,
``end_image``, ``reference``, ``control``, ``edit``, ``edit_mask``, ``audio``, and its own settings under the names of
:class:`Wanted`. A row of a data set is one too: its control clip and its sound are given, and the first frame of its
clip is the image. What such a row states as frames, width, height and fps is of its clip; without ``file_path`` it is
of the video to be made.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError, MetadataError, as_flag
from vfun_cli.families.spec import FamilySpec, ModelDims, SamplingInput, steps_of_edit
from vfun_cli.metadata.checks import describe, exact_rate, path_fault
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.facts import AudioFacts, Facts, Failure, VisualFacts
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.probe import MediaKind, probe_many
from vfun_cli.metadata.records import Metadata, Record, cell_value, read_metadata, renames, root_of
from vfun_cli.plan.rows import header_cache, progress
from vfun_cli.plan.sizes import round_frames
from vfun_cli.sampling.settings import CHECKS, SEED, Wanted, check_setting, check_wanted, size_of, usual_frames
from vfun_cli.sampling.source import Source

INPUTS: tuple[SamplingInput, ...] = ("image", "end_image", "reference", "control", "edit", "edit_mask", "audio")
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("text",),
    "image": ("image_path",),
    "end_image": ("end_image_path",),
    "reference": ("reference_path",),
}
"""What rows may call these as well."""

NUMBERS = ("seed", "steps", "guidance", "strength", "frames", "height", "width", "row")
"""Settings that are text in a CSV."""
BOOLEANS = {"true": True, "false": False}
OF_THE_CLIP = ("frames", "height", "width", "fps")
"""What a row states of its clip, if it has one."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """A file that a video is made from."""

    path: str
    facts: VisualFacts | AudioFacts


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video to be made: all that decides it besides the weights."""

    row: int
    seed: int
    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    fps: Fraction
    media: Mapping[SamplingInput, Media] = field(default_factory=dict)
    strength: float = 1.0
    """How much of a clip is replaced that is edited."""
    start_from_ref: bool = False
    """Of a video in segments: it continues its image."""
    indices: tuple[int, ...] = ()
    """Frames of the clip that it follows or edits, one for each of its own."""

    @property
    def steps_made(self) -> int:
        """Of ``steps``: all, or of a clip that is edited the last ones."""
        return steps_of_edit(self.steps, self.strength) if "edit" in self.media else self.steps

    @property
    def seconds(self) -> Fraction:
        """Of the sound; 0 without one."""
        sound = self.media["audio"].facts if "audio" in self.media else None
        return sound.end if isinstance(sound, AudioFacts) else Fraction(0)


@dataclass(frozen=True, kw_only=True)
class Videos:
    """The videos of some rows or options, and what is wrong with those that cannot be made."""

    where: str
    rows: int
    videos: tuple[Video, ...]
    problems: tuple[Problem, ...]

    def require_ok(self) -> None:
        """Refuse to begin with rows that would fail later.

        Raises:
            MetadataError: with the first problems.
        """
        if not self.problems:
            return
        lines = [f"  {describe(problem)}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            lines.append(f"  … and {len(self.problems) - 10} more")
        bad = {problem.row for problem in self.problems} - {None}
        what = (
            f"{len(bad)} of {self.rows} videos cannot be made (counted from 0)"
            if bad
            else "the file is no list of rows"
        )
        raise MetadataError(
            f"{self.where}: {what}:\n" + "\n".join(lines),
            hint=f"What to do: vfun validate-meta --explain {self.problems[0].code}",
        )


def settings_json(video: Video, source: Source) -> dict[str, Any]:
    """What is written beside a video: a row that makes it again from the same weights."""
    return {
        "schema": 1,
        "prompt": video.prompt,
        "negative_prompt": video.negative_prompt,
        "seed": video.seed,
        "steps": video.steps,
        "guidance": video.guidance,
        **({"strength": video.strength} if "edit" in video.media else {}),
        **({"start_from_ref": True} if video.start_from_ref else {}),
        "frames": video.frames,
        "height": video.height,
        "width": video.width,
        "fps": str(video.fps),
        "row": video.row,
        **{name: media.path for name, media in video.media.items()},
        "family": source.spec.name,
        "source": absolute(source.path),
        "model": absolute(source.model),
        "weights": "ema" if source.ema else "trained",
        "lora": [{"path": absolute(lora.path), "strength": lora.strength} for lora in source.loras],
    }


def videos_of_rows(meta: Path, root: Path | None, spec: FamilySpec, dims: ModelDims, wanted: Wanted) -> Videos:
    """The videos that the rows of a metadata file or a folder ask for, or a file that lies beside a video.

    Args:
        root: the folder that paths start from; None: the file's own. Of a folder, it is always that.

    Raises:
        ConfigError: settings with which this model makes no video.
    """
    check_wanted(wanted, spec, dims)
    metadata = read_metadata(meta)
    start = root_of(meta, root)
    rows = [_Row(record.row, _stated(record, metadata.format == "csv"), start) for record in metadata.records]
    found = _videos(str(meta), rows, spec, dims, wanted)
    problems = sorted([*_of_the_file(metadata), *found.problems], key=_by_row)
    return replace(found, rows=metadata.rows, problems=tuple(problems))


def videos_of_options(
    prompts: Sequence[str],
    media: Mapping[SamplingInput, Sequence[Path]],
    spec: FamilySpec,
    dims: ModelDims,
    wanted: Wanted,
) -> Videos:
    """The videos of ``--prompt``, ``--image``, …, each given once for all of them or once for each.

    Raises:
        ConfigError: an input that the family does not take or lacks, or other numbers of them.
    """
    check_wanted(wanted, spec, dims)
    given: dict[str, Sequence[Any]] = {"prompt": prompts, **{name: paths for name, paths in media.items() if paths}}
    taken, unable = _taken(spec, dims), spec.sampling.without(dims)
    if wrong := [name for name in given if name != "prompt" and name not in taken]:
        why = unable.get(wrong[0])  # type: ignore[call-overload]
        raise ConfigError(
            f"{as_flag(wrong[0])}: {why or f'{spec.name} makes no video from it'}.", hint=f"{_takes(spec, taken)}."
        )
    if lacking := [name for name in ("prompt", *spec.sampling.required) if not given.get(name)]:
        raise ConfigError(f"no {as_flag(lacking[0])} is given.", hint=f"{_takes(spec, taken)}.")
    count = max(len(values) for values in given.values())
    if odd := [name for name, values in given.items() if len(values) not in (1, count)]:
        raise ConfigError(
            f"{as_flag(odd[0])} is given {len(given[odd[0]])} times, for {count} videos.",
            hint="Give each option once for all videos, or once for each.",
        )
    rows = [
        _Row(row, {name: str(values[row if len(values) > 1 else 0]) for name, values in given.items()}, Path())
        for row in range(count)
    ]
    return _videos("the options", rows, spec, dims, wanted)


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A video as it is asked for."""

    row: int
    stated: Mapping[str, Any]
    root: Path
    problems: list[Problem] = field(default_factory=list)

    def say(self, code: str, message: str, name: str | None = None, path: str | None = None) -> None:
        """Note a problem."""
        self.problems.append(Problem(row=self.row, code=code, message=message, field=name, path=path))

    @property
    def clip(self) -> str | None:
        """Absolute path of the clip, of a row of a data set."""
        value = self.stated.get("file_path")
        return absolute(self.root / value) if isinstance(value, str) and path_fault(value) is None else None

    def files(self, spec: FamilySpec, dims: ModelDims) -> dict[SamplingInput, str]:
        """Absolute paths of what the video is made from; notes what is not taken, and what is missing."""
        taken, unable = _taken(spec, dims), spec.sampling.without(dims)
        of_the_set = {item.media: self.stated.get(item.key(self.stated)) for item in spec.fields}
        implied = {"image": of_the_set.get("visual"), **{name: of_the_set.get(name) for name in ("control", "audio")}}
        found: dict[SamplingInput, str] = {}
        if "edit" in self.stated and "edit" in taken:
            del implied["image"]
            for name in ("image", "end_image"):
                if name in self.stated:
                    self.say("not-taken", "a video is made from pictures, or it is a changed clip: not both", name)
        elif "edit_mask" in self.stated and "edit_mask" in taken:
            self.say("missing-field", "there is a mask, and no clip that it is of", "edit")
        for name in INPUTS:
            value = self.stated.get(name)
            if value is not None and name not in taken:
                self.say("not-taken", unable.get(name) or f"{spec.name} makes no video from it", name)
                continue
            value = implied.get(name) if value is None else value
            if value is None or name not in taken:
                if name in spec.sampling.required:
                    self.say("missing-field", f"{spec.name} makes no video without {name}", name)
            elif not isinstance(value, str):
                self.say("wrong-type", f"a path is a text, not {value!r:.60}", name)
            elif fault := path_fault(value):
                self.say("invalid-path", fault, name)
            else:
                found[name] = absolute(self.root / value)
        return found

    def settings(self, wanted: Wanted, spec: FamilySpec, dims: ModelDims) -> dict[str, Any]:
        """What is stated by the options or the row; notes what is unusable."""
        found: dict[str, Any] = {}
        of_the_clip = OF_THE_CLIP if "file_path" in self.stated else ()
        own = {name: value for name, value in self.stated.items() if name not in of_the_clip}
        for name in CHECKS:
            value = getattr(wanted, name, None)
            if value is None and own.get(name) is not None:
                value = own[name]
                try:
                    check_setting(name, value, spec, dims)
                except ValueError as error:
                    self.say("unusable-setting", str(error), name)
                    continue
            if value is not None:
                found[name] = value
        rate = own.get("fps")
        if rate is not None:
            found["fps"] = exact_rate(rate)
            if found["fps"] is None:
                self.say("unusable-setting", f"fps is {rate!r:.60}; it takes a frame rate", "fps")
        return found


def _stated(record: Record, is_csv: bool) -> dict[str, Any]:
    """What a row says, under the names of this module."""
    there = {key: value for key, value in record.raw.items() if value is not None and not (is_csv and value == "")}
    for name, others in OTHER_NAMES.items():
        for other in others:
            if other in there:
                there.setdefault(name, there.pop(other))
    if isinstance(prompts := there.get("prompt"), list) and prompts:
        there["prompt"] = prompts[0]
    if is_csv:
        there |= {name: cell_value(there[name]) for name in NUMBERS if name in there}
        if (start := there.get("start_from_ref")) in BOOLEANS:
            there["start_from_ref"] = BOOLEANS[start]
    return there


def _of_the_file(metadata: Metadata) -> list[Problem]:
    """Problems of rows that are none; names that only here are the right ones are none."""
    own = {"prompt", "image", "image_path"}
    foreign = {key for record in metadata.records for key in renames(tuple(record.raw))}
    return [
        problem for problem in metadata.problems
        if problem.severity == "error" and not (problem.code == "foreign-layout" and problem.field and foreign <= own)
    ]  # fmt: skip


def _taken(spec: FamilySpec, dims: ModelDims) -> tuple[SamplingInput, ...]:
    """What the model can be given besides text."""
    unable = spec.sampling.without(dims)
    return tuple(
        name for name in INPUTS if name in (*spec.sampling.required, *spec.sampling.optional) and name not in unable
    )


def _takes(spec: FamilySpec, taken: Sequence[SamplingInput]) -> str:
    needed = ["--prompt", *(as_flag(name) for name in taken if name in spec.sampling.required)]
    others = [as_flag(name) for name in taken if name not in spec.sampling.required]
    return f"{spec.name} takes {', '.join(needed)}{' and, where wanted, ' * bool(others)}{', '.join(others)}"


# Videos --------------------------------------------------------------------------------------------------------------


def _videos(where: str, rows: Sequence[_Row], spec: FamilySpec, dims: ModelDims, wanted: Wanted) -> Videos:
    files = [row.files(spec, dims) for row in rows]
    keys = [(path, _kind(name)) for each in files for name, path in each.items()]
    clips: list[tuple[str, MediaKind]] = [(row.clip, "visual") for row in rows if row.clip is not None]
    with progress() as stage:
        facts = probe_many([*keys, *clips], cache=header_cache(), progress=stage("reading headers"))
    made = [_video(row, own, facts, spec, dims, wanted) for row, own in zip(rows, files, strict=True)]
    return Videos(
        where=where,
        rows=len(rows),
        videos=tuple(video for video in made if video is not None),
        problems=tuple(problem for row in rows for problem in row.problems),
    )


def _by_row(problem: Problem) -> int:
    return -1 if problem.row is None else problem.row


def _kind(name: str) -> MediaKind:
    return "audio" if name == "audio" else "visual"


def _video(
    row: _Row,
    files: Mapping[SamplingInput, str],
    facts: Mapping[tuple[str, str], Facts],
    spec: FamilySpec,
    dims: ModelDims,
    wanted: Wanted,
) -> Video | None:
    """The video of a row; None where the row has problems, which are noted."""
    shown = [] if row.clip is None or row.clip in files.values() else [("file_path", row.clip)]
    found = dict(_usable(row, [*files.items(), *shown], facts))
    stated = row.settings(wanted, spec, dims)
    if row.problems:
        return None
    clip = None if row.clip is None else facts[row.clip, "visual"]
    of_picture = isinstance(clip, VisualFacts) and clip.kind == "image" and "image" in spec.media_types
    like = next((each.facts for each in found.values() if isinstance(each.facts, VisualFacts)), None)
    height, width = size_of(stated, like, spec)
    frames = stated["frames"] if "frames" in stated else 1 if of_picture else usual_frames(spec, dims)
    given = set(files)
    if frames == 1 and "image" not in row.stated and "image" not in spec.sampling.required:
        given.discard("image")  # the first frame of the row's clip would be the whole picture
    video = Video(
        row=stated.get("row", row.row),
        seed=stated.get("seed", SEED),
        prompt=stated.get("prompt", ""),
        negative_prompt=stated.get("negative_prompt", spec.sampling.negative_prompt),
        steps=stated.get("steps", spec.sampling.steps),
        guidance=float(stated.get("guidance", spec.sampling.guidance)),
        strength=float(stated.get("strength", _usual_strength(files, spec))),
        start_from_ref=stated.get("start_from_ref", False),
        frames=frames,
        height=height,
        width=width,
        fps=stated.get("fps", Fraction(spec.sampling.fps)),
        media={name: found[name] for name in files if name in given},
    )
    return _with_clip(row, video, spec, dims)


def _usual_strength(files: Mapping[SamplingInput, str], spec: FamilySpec) -> float:
    """All of what a mask shows is made anew, as the released scripts advise; otherwise a part of the whole clip."""
    return 1.0 if spec.sampling.strength is None or "edit_mask" in files else spec.sampling.strength


def _usable(
    row: _Row, files: Iterable[tuple[str, str]], facts: Mapping[tuple[str, str], Facts]
) -> Iterator[tuple[str, Media]]:
    """The files that can be read; notes what is wrong with the others."""
    for name, path in files:
        found = facts[path, _kind(name)]
        if isinstance(found, Failure):
            row.say(found.code, found.message, name, path)
        elif found.truncated:
            row.say("truncated-media", "the header promises more bytes than the file has", name, path)
        elif isinstance(found, VisualFacts) and not (found.frames and found.width and found.height):
            row.say("no-frames", "there is no picture in it", name, path)
        elif isinstance(found, VisualFacts) and found.kind == "video" and exact_rate(str(found.fps)) is None:
            row.say("unknown-frame-rate", "the video states no usable frame rate", name, path)
        else:
            yield name, Media(path=path, facts=found)


def _with_clip(row: _Row, video: Video, spec: FamilySpec, dims: ModelDims) -> Video | None:
    """The video with the frames of the clip that it follows or edits: those shown when its own are.

    None where there are too few, or nothing would be edited.
    """
    name: SamplingInput | None = next((name for name in ("control", "edit") if name in video.media), None)
    if name is None:
        return video
    if name == "edit" and not _is_edited(row, video):
        return None
    clip = video.media[name]
    assert isinstance(clip.facts, VisualFacts)
    total = video.frames
    if spec.sampling.by_sound:
        total *= math.ceil(video.seconds * video.fps / video.frames)
    if clip.facts.kind == "image":
        if total > 1:
            row.say("control-type", f"a picture as the clip of {total} frames", name, clip.path)
            return None
        return replace(video, indices=(0,))
    step = clip.facts.fps / video.fps  # frames of the file for each of the video
    there = math.ceil(clip.facts.frames / step)
    if there < total and not spec.sampling.by_sound:
        longest = round_frames(there, spec, dims)
        row.say(
            "control-too-short",
            f"it lasts {float(clip.facts.duration):.2f} s, {total} frames at {video.fps} fps last "
            f"{float(total / video.fps):.2f} s; it is enough for {longest} frames",
            name,
            clip.path,
        )
        return None
    return replace(video, indices=tuple(int(frame * step) for frame in range(min(there, total))))


def _is_edited(row: _Row, video: Video) -> bool:
    """Whether anything changes; notes why not."""
    mask = video.media.get("edit_mask")
    if mask is not None and isinstance(mask.facts, VisualFacts) and mask.facts.kind != "image":
        row.say("wrong-type", "a mask is one picture, white where the clip changes in all its frames", "edit_mask")
    if not video.steps_made:
        row.say(
            "unusable-setting", f"{video.strength:g} of {video.steps} steps is none: the clip would stay", "strength"
        )
    return not row.problems
