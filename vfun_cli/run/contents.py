"""What a run reads, known by its contents: the rows and media of its data set, the files of its model.

Paths, sizes and times say nothing: a file may be exchanged under all of them, and what is moved stays what it was.
Small files are read whole, larger ones in samples at fixed places; what was read is remembered until a file changes
(``metadata/remembered.py``). docs/numerics.md says what that finds and what it costs.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.given import Given
from vfun_cli.devices import cpu_cores
from vfun_cli.errors import EnvironmentFault
from vfun_cli.metadata.fields import MetadataField, stated_media
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.records import NUMBERS, Metadata
from vfun_cli.metadata.remembered import OnProgress, remembered
from vfun_cli.run.rundir import write_atomically

SCHEME = "sampled-1"
"""How contents are sampled. Raise its number with any change below: digests of another scheme are not compared."""
WHOLE = 1 << 16
"""Bytes; files up to this size are read whole."""
BLOCK = 1 << 14
"""Bytes of a sample."""
FEWEST, MOST, EVERY = 3, 64, 1 << 24
"""Samples of a file: one in so many bytes, the first and the last included, and so many at least and at most."""
PAGE = 1 << 12
"""Bytes that are read of each tensor in a weight file."""
FILES_AT_ONCE = 16
"""As many files a thread takes; see ``remembered``."""
LISTED = 3
"""Changed pieces that a message names."""
SAID_OF_CLIPS = ("text", "type", *NUMBERS)
"""Fields of a row that are read beside its media."""

DATA, METADATA, MODEL = "train_data_dir", "train_data_meta", "pretrained_model_name_or_path"
"""Options that name what is known by its contents."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Of one thing that a run reads: the digest of each of its pieces."""

    pieces: Mapping[str, str]
    """By what a piece is called wherever the thing lies: a file's path inside the model, a row and its field."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The file of a piece, where its name does not tell."""

    @property
    def digest(self) -> str:
        """One for all pieces."""
        text = json.dumps(list(self.pieces.items()))
        return f"{SCHEME}:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def contents_of(
    metadata: Metadata,
    fields: Sequence[MetadataField],
    root: Path | None,
    model: Path,
    given: Given,
    *,
    cache: Path | None,
    progress: OnProgress | None,
) -> dict[str, Contents]:
    """Of the data set and the model of a run, by the options that name them.

    Args:
        metadata: rows without errors.
        fields: the media that the family reads.
        root: the folder that paths in the metadata start from, where a row has none; None is the working directory.
        given: weights that were named instead of the model's.
        cache: the SQLite file that remembers what was read.

    Raises:
        EnvironmentFault: a file cannot be read.
        CheckpointError: a weight file is damaged.
    """
    stated: dict[str, str] = {}
    media: dict[str, Path] = {}
    for record in metadata.records:
        for name, value in stated_media(record.fields, fields).items():
            if value is not None:
                stated[f"row {record.row}, {name}"] = str(value)
                media[f"row {record.row}, {name}"] = (record.root or root or Path()) / str(value)
    weights = {MODEL: model_files(model), **{option: given_files(place, option) for option, place in given.named()}}
    files = [path for pieces in weights.values() for path in pieces.values()]
    digests = file_digests([*media.values(), *files], cache=cache, progress=progress)
    rows = {f"row {record.row}": _digest_of_row(record.fields) for record in metadata.records}
    rows |= {f"data set {number}": f"{each.first} {each.said}" for number, each in enumerate(metadata.sets, 1)}
    return {
        METADATA: Contents(pieces=rows),
        DATA: Contents(pieces={piece: digests[path] for piece, path in media.items()}, files=stated),
        **{
            name: Contents(pieces={piece: digests[path] for piece, path in pieces.items()})
            for name, pieces in weights.items()
        },
    }


def write_contents(path: Path, contents: Mapping[str, Contents]) -> None:
    """Note the pieces, so that a later launch can say which of them changed."""
    write_atomically(path, json.dumps({name: dict(each.pieces) for name, each in contents.items()}))


def what_changed(path: Path, name: str, digest: str, now: Contents) -> str:
    """In words how the contents of one thing differ from those that had this digest.

    Args:
        path: what :func:`write_contents` wrote of them; without it the words are fewer.
    """
    try:
        before = Contents(pieces=json.loads(path.read_text(encoding="utf-8"))[name])
        if before.digest != digest:  # of another launch
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its contents are not those that the run began with"
    said = [
        f"{piece}{f' ({now.files[piece]})' if piece in now.files else ''} {words}"
        for piece in {**before.pieces, **now.pieces}
        if (words := _difference(before.pieces.get(piece), now.pieces.get(piece))) is not None
    ]
    more = f" and {len(said) - LISTED} more of {len(now.pieces)}" if len(said) > LISTED else ""
    return "; ".join(said[:LISTED]) + more


def differing_pieces(path: Path, other: Path) -> dict[str, list[str]]:
    """Which pieces differ between what :func:`write_contents` wrote here and there, by the options; none where one of
    the two cannot be read.
    """
    try:
        mine, theirs = (json.loads(each.read_text(encoding="utf-8")) for each in (path, other))
        return {
            name: [
                piece for piece in {**theirs[name], **mine[name]} if mine[name].get(piece) != theirs[name].get(piece)
            ]
            for name in mine
            if name in theirs and mine[name] != theirs[name]
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _difference(before: str | None, now: str | None) -> str | None:
    if before == now:
        return None
    return "is new" if before is None else "is gone" if now is None else "has other contents than when the run began"


def model_files(folder: Path) -> dict[str, Path]:
    """What a model is read from, by paths from its folder; links are followed, hidden files and folders are not."""
    from vfun_cli.checkpoints.released import MODEL_FILES  # with numpy

    files = (path for path in _walk(folder, frozenset()) if path.suffix in MODEL_FILES and path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in sorted(files)}


def given_files(place: Path, option: str) -> dict[str, Path]:
    """What weights are read from that an option names, by what they are called wherever they lie."""
    from vfun_cli.checkpoints.given_tensors import files_of  # with numpy

    files = files_of(place, option)
    return {"the file": place} if place.is_file() else {path.name: path for path in files}


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in above:  # a link to a folder that holds it
        return
    for path in folder.iterdir():
        if path.name.startswith("."):  # .git, .cache of downloads
            continue
        if path.is_dir():
            yield from _walk(path, above | {place})
        else:
            yield path


def file_digests(
    files: Iterable[Path], *, cache: Path | None = None, progress: OnProgress | None = None
) -> dict[Path, str]:
    """The digest of each file, read in threads and remembered in the SQLite file ``cache``.

    Raises:
        EnvironmentFault: a file cannot be read.
        CheckpointError: a weight file is damaged.
    """
    keys = {path: (absolute(path), SCHEME) for path in files}
    found = remembered(
        list(dict.fromkeys(keys.values())), lambda key: file_digest(Path(key[0])), to_text=str, from_text=str,
        cache=cache, threads=2 * cpu_cores(), at_once=FILES_AT_ONCE, progress=progress,
    )  # fmt: skip
    return {path: found[key] for path, key in keys.items()}


def file_digest(path: Path) -> str:
    """Of a file's size and samples; of weight files also of what they say of every tensor.

    Raises:
        EnvironmentFault: the file cannot be read.
        CheckpointError: a weight file is damaged.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            samples = _spread(size) if size > WHOLE else [(0, size)]
            if size > WHOLE and path.suffix in _TOLD:
                samples += _TOLD[path.suffix](path)
            found = hashlib.blake2b(f"{size} ".encode(), digest_size=8)
            for offset, length in samples:
                found.update(os.pread(file.fileno(), length, offset))
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be read: {error.strerror or error}.", hint="Mend the file's permissions or the disk."
        ) from None
    return found.hexdigest()


def _spread(size: int) -> list[tuple[int, int]]:
    """Samples from the first byte to the last, evenly."""
    count = min(max(size // EVERY, FEWEST), MOST)
    return [((size - BLOCK) * index // (count - 1), BLOCK) for index in range(count)]


def _of_tensors(path: Path) -> list[tuple[int, int]]:
    """The header of a safetensors file and the beginning of each tensor: a single one that was exchanged is noticed."""
    from vfun_cli.checkpoints import safetensors  # with numpy

    parts = [part for tensor in safetensors.read_file(path).values() for part in tensor.segments if part.count]
    header = min((part.offset for part in parts), default=0)
    return [(0, header), *((part.offset, PAGE) for part in parts)]


def _of_archive(path: Path) -> list[tuple[int, int]]:
    """The table of contents of a file of torch.save, which holds a checksum of each tensor."""
    if not zipfile.is_zipfile(path):  # from before torch 1.6
        return []
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    return [(start, path.stat().st_size - start)]


_TOLD: dict[str, Callable[[Path], list[tuple[int, int]]]] = {
    ".safetensors": _of_tensors,
    **dict.fromkeys((".pth", ".bin", ".pt", ".ckpt"), _of_archive),
}


def _digest_of_row(fields: Mapping[str, Any]) -> str:
    text = json.dumps({name: fields.get(name) for name in SAID_OF_CLIPS})
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
