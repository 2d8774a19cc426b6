"""Which clips of a folder get a control clip, where it goes, and whether it is there already."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.files import PICTURE, VIDEO
from vfun_cli.metadata.facts import ProbeError
from vfun_cli.metadata.folder import TWIN_FOLDERS, read_folder
from vfun_cli.metadata.opening import absolute, open_media
from vfun_cli.metadata.pictures import open_picture
from vfun_cli.metadata.probe import probe_visual

FOLDER = "control"
"""Of the folder: what lies there at the place of a clip is its twin (docs/data.md)."""
COMMENT = "comment"
"""What a control clip says of itself: the tag of an mp4, the text of a PNG."""

State = Literal["new", "made", "theirs", "given"]
"""To be made; made already; there, but made by others; the clip has another one."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video or picture and its control clip."""

    name: str
    """Its path from the folder."""
    source: Path
    target: Path
    given: str | None = None
    """The control clip that it has, if it is another file."""

    def state(self, made_by: str) -> State:
        """Whether there is something to do.

        A clip is made if its file says that it was made so, of a file of this size, and is not older than that.

        Args:
            made_by: what the control clip would say of itself, without its source.
        """
        if self.given is not None:
            return "given"
        try:
            there, source = self.target.stat(), self.source.stat()
        except OSError:
            return "new"
        said = comment(self.target)
        if said is None:
            return "theirs"
        same = said == statement(made_by, source.st_size) and there.st_mtime_ns >= source.st_mtime_ns
        return "made" if same else "new"


def statement(made_by: str, size: int) -> str:
    """What a control clip says of itself."""
    return f"{made_by} of {size} bytes"


def comment(path: Path) -> str | None:
    """What a control clip says of itself; None of a file that ``make-control`` did not write."""
    said = None
    with suppress(Exception):  # damaged, of another kind: not ours
        if path.suffix == PICTURE:
            with open_picture(path) as image:
                said = getattr(image, "text", {}).get(COMMENT)
        else:
            with open_media(path) as container:
                said = container.metadata.get(COMMENT)
    return said if said is not None and said.startswith("vfun make-control ") else None


def clips_of(folder: Path, out: Path | None) -> tuple[list[Clip], list[str]]:
    """The clips of a folder in the order of their paths, and what is wrong with files that are none.

    Args:
        out: where the control clips go; None: to ``control/`` in the folder, where they are found as twins.

    Raises:
        ConfigError: there is no such folder, or its control clips would be read as clips of it.
        MetadataError: it holds no clip.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.", hint="Name a folder of videos and pictures.")
    if out is not None:
        _require_apart(folder, out)
    found = read_folder(folder)
    if not found.records:
        raise MetadataError(f"{found.problems[0].message}.", hint="Name a folder of videos and pictures.")
    place = folder / FOLDER if out is None else out
    clips = [_clip(folder, place, record.fields) for record in found.records]
    return clips, [problem.message for problem in found.problems if problem.row is not None]


def doubled(clips: list[Clip]) -> Iterator[tuple[Clip, Clip]]:
    """Clips whose control clip would be the same file as that of one before them, which comes second."""
    first: dict[Path, Clip] = {}
    for clip in clips:
        if (other := first.setdefault(clip.target, clip)) is not clip:
            yield clip, other


def _clip(folder: Path, place: Path, fields: Mapping[str, Any]) -> Clip:
    name, given = fields["file_path"], fields.get("control_file_path")
    source = folder / name
    target = (place / name).with_suffix(_suffix(source, fields.get("type")))
    is_other = given is not None and absolute(folder / given) != absolute(target)
    return Clip(name=name, source=source, target=target, given=given if is_other else None)


def _suffix(source: Path, kind: str | None) -> str:
    """A film stays one, a picture too; of GIFs only the file itself says which it is."""
    if kind is None:
        try:
            kind = probe_visual(source).kind
        except ProbeError:
            kind = "video"
    return PICTURE if kind == "image" else VIDEO


def _require_apart(folder: Path, out: Path) -> None:
    try:
        below = Path(absolute(out)).relative_to(absolute(folder)).parts
    except ValueError:
        return
    if not any(part.lower() in TWIN_FOLDERS and TWIN_FOLDERS[part.lower()][0] == "control_file_path" for part in below):
        raise ConfigError(
            f"{out} lies in {folder}, whose media are clips: the control clips would be read as clips too.",
            hint=f"Leave --out out, which is {folder / FOLDER}, or name a folder elsewhere.",
            option="--out",
        )
