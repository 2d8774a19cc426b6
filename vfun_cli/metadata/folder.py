"""A folder of media read as metadata: which files are rows, which are their twins, and what lies beside them says.

    clips/1.mp4              a row
    clips/1.txt              its captions, one a line
    clips/1.json             further fields of it, which win
    clips/1_control.mp4      its control clip; also clips/control/1.mp4, control/clips/1.mp4, control/1.mp4
    clips/1.wav              its sound; also clips/audio/1.wav, audio/clips/1.wav, audio/1.wav

docs/data.md says the same to users.
"""

import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vfun_cli import lfs
from vfun_cli.files import open_bounded
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.pictures import PICTURES
from vfun_cli.metadata.records import DEEPEST, Metadata, Record, own_keys
from vfun_cli.metadata.sounds import SOUNDS
from vfun_cli.metadata.videos import VIDEOS
from vfun_cli.typed_json import is_deeper

Kind = Literal["video", "image", "sound", "caption", "sidecar"]
Role = Literal["audio_path", "control_file_path", "caption", "sidecar"]
"""What a file is to the clip that it belongs to: a field of the row, or where to read some."""

KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(PICTURES, "image"), **dict.fromkeys(VIDEOS, "video"), **dict.fromkeys(SOUNDS, "sound"),
    ".txt": "caption", ".json": "sidecar",
}  # fmt: skip
"""By suffix; all other files are none of ours."""
MAY_MOVE = (".gif", ".apng")
"""Pictures or films: only the file itself tells."""
BESIDE: Mapping[Kind, Role] = {"sound": "audio_path", "caption": "caption", "sidecar": "sidecar"}
"""What a file is to the clip of its own name."""
CONTROL_ENDING = "_control"
"""Of the name of a video or picture that is the control of the one without it."""
TWIN_FOLDERS: Mapping[str, tuple[Role, tuple[Kind, ...]]] = {
    "control": ("control_file_path", ("video", "image")),
    "audio": ("audio_path", ("sound", "video")),
    "wav": ("audio_path", ("sound", "video")),
}
"""Folders whose media are twins of clips elsewhere, never rows: of which kinds, and what they are to the clip."""
LARGEST_TEXT = 1 << 24
"""Bytes of a caption or sidecar."""
PLACES_NAMED = 3
"""Clips that a message names."""


@dataclass(frozen=True)
class _Name:
    """What makes files belong together: their folder and their name without its suffix, in one Unicode form."""

    folder: str
    stem: str


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of the folder."""

    path: str
    """From the folder, with slashes."""
    name: _Name
    kind: Kind


@dataclass(kw_only=True)
class _Tree:
    """The files of a folder by what they are."""

    clips: defaultdict[_Name, list[_File]] = field(default_factory=lambda: defaultdict(list))
    belongings: defaultdict[_Name, dict[Role, list[_File]]] = field(default_factory=lambda: defaultdict(dict))
    problems: list[Problem] = field(default_factory=list)

    def give(self, name: _Name, role: Role, file: _File) -> None:
        """A file to the clips of this name."""
        self.belongings[name].setdefault(role, []).append(file)


def read_folder(folder: Path) -> Metadata:
    """The media of a folder and of those in it as records, in the order of their paths; ``path`` is the folder.

    What cannot be used becomes a problem; nothing is raised for what the folder holds.
    """
    paths, problems = _files(folder)
    files = [file for path in sorted(paths, key=_in_order) if (file := _file(path)) is not None]
    tree = _sorted_out(files)
    rows = [clip for file in files for clip in tree.clips[file.name] if clip is file]
    found = [_row(folder, tree, place, clip) for place, clip in enumerate(rows)]
    if not found:
        problems.append(_nothing(folder, len(paths)))
    else:
        problems += [*tree.problems, *_left_over(folder, tree)]
    return Metadata(
        path=folder,
        format="folder",
        rows=len(found),
        records=tuple(item for item in found if isinstance(item, Record)),
        problems=(*problems, *(item for item in found if isinstance(item, Problem))),
    )


def _in_order(path: str) -> tuple[str, str]:
    """The same on every file system: some decompose what was composed."""
    return unicodedata.normalize("NFC", path), path


# Files ---------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> tuple[list[str], list[Problem]]:
    """All files below a folder, by paths from there, and folders that cannot be read. Hidden ones are left out."""
    paths: list[str] = []
    problems: list[Problem] = []
    waiting = [(str(folder), "", frozenset[str]())]
    while waiting:
        place, prefix, above = waiting.pop()
        real = os.path.realpath(place)
        if real in above:  # a link to a folder that holds it
            continue
        try:
            with os.scandir(place) as entries:
                seen = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            message = f"{place}: {error.strerror or error}"
            problems.append(Problem(row=None, code="unreadable-metadata", message=message, path=place))
            continue
        for entry in seen:
            if _is_folder(entry):
                waiting.append((entry.path, f"{prefix}{entry.name}/", above | {real}))
            else:
                paths.append(prefix + entry.name)
    return paths, problems


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where nothing may be looked at: told as a file that cannot be read
        return False


def _file(path: str) -> _File | None:
    """None for a file that means nothing here."""
    folder, _, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    kind = KINDS.get(f".{suffix.lower()}") if dot else None
    if kind is None:
        return None
    return _File(path=path, name=_Name(_composed(folder), _composed(stem)), kind=kind)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# Which file is what --------------------------------------------------------------------------------------------------


def _sorted_out(files: Iterable[_File]) -> _Tree:
    """Every file as a clip or as what belongs to one."""
    tree, in_twin_folders = _Tree(), []
    for file in files:
        parts = file.name.folder.split("/") if file.name.folder else []
        depth = next((depth for depth, part in enumerate(parts) if part.lower() in TWIN_FOLDERS), None)
        if depth is not None:
            in_twin_folders.append((file, parts, depth))
        elif file.kind not in ("video", "image"):
            tree.give(file.name, BESIDE[file.kind], file)
        elif file.name.stem.lower().endswith(CONTROL_ENDING):
            clip = _Name(file.name.folder, file.name.stem[: -len(CONTROL_ENDING)])
            tree.give(clip, "control_file_path", file)
        else:
            tree.clips[file.name].append(file)
    clips_beside = _beside(tree.clips, {"/".join(parts[:depth]) for _, parts, depth in in_twin_folders})
    for file, parts, depth in in_twin_folders:
        role, kinds = TWIN_FOLDERS[parts[depth].lower()]
        if file.kind in kinds:
            _give_to_clip(tree, clips_beside, file, role, "/".join(parts[:depth]), "/".join(parts[depth + 1 :]))
        elif file.kind in ("video", "image", "sound"):
            tree.problems.append(_orphan(file, f"{_a(file.kind)} in a folder {parts[depth]}/"))
    return tree


_Place = tuple[str, str, str]
"""The folder that holds a twin folder, the path below that, and a name without suffix."""


def _beside(clips: Iterable[_Name], holders: set[str]) -> Mapping[_Place, list[_Name]]:
    """The clips of any folder beside a twin folder, by where their twins would be: ``train/1`` for ``control/1``."""
    found: defaultdict[_Place, list[_Name]] = defaultdict(list)
    for name in clips if holders else ():
        parts = name.folder.split("/") if name.folder else []
        for depth in range(len(parts)):
            holder = "/".join(parts[:depth])
            if holder in holders:
                found[holder, "/".join(parts[depth + 1 :]), name.stem].append(name)
    return found


def _give_to_clip(
    tree: _Tree, beside: Mapping[_Place, list[_Name]], file: _File, role: Role, holder: str, below: str
) -> None:
    """A file of a twin folder to the clip at the same place outside of it or, if there is none, to the only one at
    that place in a folder beside."""
    same = _Name("/".join(filter(None, (holder, below))), file.name.stem)
    places = [same] if same in tree.clips else beside.get((holder, below, file.name.stem), [])
    if len(places) == 1:
        tree.give(places[0], role, file)
    elif places:
        named = " or ".join(tree.clips[place][0].path for place in places[:PLACES_NAMED])
        tree.problems.append(_orphan(file, f"it may belong to {named}: put it beside the one that is meant"))
    else:
        where = "/".join(filter(None, (same.folder, same.stem)))
        tree.problems.append(_orphan(file, f"there is no clip {where} that it belongs to"))


# Rows ----------------------------------------------------------------------------------------------------------------


def _row(folder: Path, tree: _Tree, row: int, clip: _File) -> Record | Problem:
    """What is known of a clip; a problem where a caption or sidecar cannot be read."""
    own = tree.belongings.get(clip.name, {})
    chosen = {role: file for role, files in own.items() if (file := _chosen(role, files, clip)) is not None}
    fields: dict[str, Any] = {"file_path": clip.path}
    fields |= {role: chosen[role].path for role in ("audio_path", "control_file_path") if role in chosen}
    stated: Mapping[str, Any] = {}
    for role, read in (("caption", _captions), ("sidecar", _object)):
        if role not in chosen:
            continue
        path = folder / chosen[role].path
        try:
            stated = {**stated, **read(_text(path))}
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            return Problem(row=row, code="malformed-row", message=f"{chosen[role].path}: {why}", path=str(path))
    if "text" in stated:  # in the order of published rows
        fields["text"] = stated["text"]
    if not clip.path.lower().endswith(MAY_MOVE):
        fields["type"] = clip.kind
    fields |= stated
    return Record(row=row, fields=fields, raw=fields)


def _chosen(role: Role, files: Sequence[_File], clip: _File) -> _File | None:
    """The one of several files that a clip takes: a picture has no sound, a control is of its clip's kind."""
    if role == "control_file_path":
        return next((file for file in files if file.kind == clip.kind), None)
    return None if role == "audio_path" and clip.kind == "image" else files[0]


def _text(path: Path) -> str:
    with open_bounded(path, LARGEST_TEXT) as file:
        data = file.read()
    if data.startswith(lfs.START):
        raise ValueError(lfs.WHAT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None


def _captions(text: str) -> Mapping[str, Any]:
    """One text, or a list of several."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {"text": lines if len(lines) > 1 else "".join(lines)}


def _object(text: str) -> Mapping[str, Any]:
    """The fields of a sidecar but the name of its clip, which is beside it."""
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(said, dict):
        raise ValueError("an object with fields of the row is needed")
    if is_deeper(said, DEEPEST):
        raise ValueError("nested too deeply")
    return {key: value for key, value in own_keys({**said, "file_path": ""}).items() if key != "file_path"}


# What is told of the folder ------------------------------------------------------------------------------------------


def _left_over(folder: Path, tree: _Tree) -> Iterator[Problem]:
    """Files that belong to no clip, or to one that has another of the kind, and clips that share what they have."""
    for name, own in tree.belongings.items():
        clips = tree.clips.get(name, [])
        if len(clips) > 1:
            shared = ", ".join(files[0].path for files in own.values())
            message = f"{' and '.join(clip.path for clip in clips)} have one name, and share {shared}"
            yield Problem(row=None, code="shared-name", message=message, path=str(folder / clips[0].path))
        for role, files in own.items():
            taken = {file.path for clip in clips if (file := _chosen(role, files, clip)) is not None}
            for file in files:
                if file.path not in taken:
                    yield _orphan(file, _why_left(file, name, clips, taken))


def _why_left(file: _File, name: _Name, clips: Sequence[_File], taken: Iterable[str]) -> str:
    if clips:
        has = next(iter(taken), None)
        return f"{clips[0].path} has {has} already" if has else f"{clips[0].path} is {_a(clips[0].kind)}"
    where = "/".join(filter(None, (name.folder, name.stem)))
    more = {
        "sidecar": "; if it is metadata, name this file instead of the folder",
        "video": f"; if it is a clip itself, give it a name that does not end in {CONTROL_ENDING}",
        "image": f"; if it is a picture itself, give it a name that does not end in {CONTROL_ENDING}",
    }
    return f"there is no clip {where} that it belongs to{more.get(file.kind, '')}"


def _orphan(file: _File, why: str) -> Problem:
    return Problem(row=None, code="orphan-file", message=f"{file.path}: {why}")


def _a(kind: Kind) -> str:
    return {"image": "a picture"}.get(kind, f"a {kind}")


def _nothing(folder: Path, files: int) -> Problem:
    looked = " ".join(sorted(VIDEOS | PICTURES))
    message = (
        f"{folder}: no video and no picture in this folder or below it, among {files} file{'s' * (files != 1)}. "
        f"Looked for {looked}. A folder holds clips such as 1.mp4, each with its caption beside it in 1.txt"
    )
    return Problem(row=None, code="empty-metadata", message=message, path=str(folder))
