"""The manifest that makes a directory a checkpoint: sizes and hashes of all its files, written last.

A directory without a valid ``manifest.json`` is not a checkpoint, however complete it looks.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vfun_cli.devices import cpu_cores
from vfun_cli.disks.abilities import fsync, fsync_directory, naming
from vfun_cli.errors import CheckpointError
from vfun_cli.files import open_bounded, regular_status
from vfun_cli.typed_json import LARGEST_FILE, Check, file_inside, mapping, one_of, read_object, record, text, whole

MANIFEST = "manifest.json"
SCHEMA = 1
_NAME = re.compile(r"checkpoint-(\d{1,18})|\.checkpoint-(\d{1,18})\.replaced", re.ASCII)
"""The latter while another checkpoint of the same step takes its place."""

MANIFEST_FIELDS: Mapping[str, Check] = {
    "schema": one_of(SCHEMA),
    "files": mapping(record({"bytes": whole(), "sha256": text()}), file_inside),
}
"""What a manifest states; a file's name must stay inside the directory: a manifest can be edited."""


def describe(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Hash and fsync files of the directory: what the manifest will say of them, by name.

    To be done by the machine that wrote them: only there a flush reaches the disk, and reading costs nothing yet.
    """
    files = list(files)
    with ThreadPoolExecutor(_workers()) as pool:
        entries = list(pool.map(_flush_and_describe, files))
    return {str(file.relative_to(directory)): entry for file, entry in zip(files, entries, strict=True)}


def write_manifest(directory: Path, written: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> None:
    """List every file of the directory in ``manifest.json``, which is written through a temporary name.

    Args:
        written: what others have described already, by name; the rest is described here.

    Raises:
        CheckpointError: a file that others wrote is not here.
    """
    for name, entry in written.items():
        if _size(directory / name) != entry["bytes"]:
            raise CheckpointError(
                f"{name} was written by another process, but is not here as that left it: "
                "all machines must share one --output-dir."
            )
    own = describe(directory, (file for file in files_of(directory) if str(file.relative_to(directory)) not in written))
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        fsync_directory(folder)
    listed = dict(sorted({**written, **own}.items()))
    write_json(directory / MANIFEST, {"schema": SCHEMA, "files": listed})


def files_of(directory: Path) -> list[Path]:
    """Every file in the directory and below, but for the manifest."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def _size(file: Path) -> int | None:
    """In bytes, None if it is not there. It is opened, which makes a network's file system look at the server."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        return None


def fingerprint(directory: Path) -> str:
    """What tells a checkpoint from another of the same step: the digest of its manifest.

    Raises:
        CheckpointError: it has none.
    """
    try:
        with open_bounded(directory / MANIFEST, LARGEST_FILE) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{directory} has no manifest that can be read: {error.strerror or error}.") from None


def verify(directory: Path, *, deep: bool = True, passing_over: Callable[[Path], bool] = lambda path: False) -> None:
    """Check every file that the manifest lists: there, of the right size and, when ``deep``, of the right content.

    Args:
        passing_over: whose contents may be wrong.

    Raises:
        CheckpointError: with everything that is wrong.
    """
    listed = _read_manifest(directory)
    with ThreadPoolExecutor(_workers()) as pool:
        found = pool.map(
            lambda name: _problem(directory, name, listed[name], deep and not passing_over(directory / name)), listed
        )
        problems = [problem for problem in found if problem]
    if problems:
        raise CheckpointError(
            f"{directory} is damaged: {'; '.join(problems)}.",
            hint=f"Use an earlier checkpoint of {directory.parent}.",
        )


def is_complete(directory: Path) -> bool:
    """Whether the directory has a manifest and every listed file in its size (contents are not hashed)."""
    try:
        verify(directory, deep=False)
    except CheckpointError:
        return False
    return True


def step_of(directory: Path) -> int | None:
    """The step in a ``checkpoint-N`` name, None for other names."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1] or match[2]) if match else None


def numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """What has the name of a checkpoint, complete or not, by step.

    Where a save died between taking the old checkpoint of its step away and putting the new one in place, the old
    one, under its other name, stands for it.
    """
    if not output_dir.is_dir():
        return []
    named = [(step, path) for path in output_dir.iterdir() if (step := step_of(path)) is not None]
    in_place = {step for step, path in named if not path.name.startswith(".")}
    return sorted(
        (step, path)
        for step, path in named
        if not path.name.startswith(".") or (step not in in_place and is_complete(path))
    )


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of an output directory, oldest step first."""
    return [path for _, path in numbered(output_dir) if is_complete(path)]


def newest_checkpoint(output_dir: Path) -> Path:
    """The complete checkpoint with the highest step.

    Raises:
        CheckpointError: there is none.
    """
    found = checkpoints(output_dir)
    if found:
        return found[-1]
    started = [path.name for _, path in numbered(output_dir)]
    seen = f"; {', '.join(started)} has no valid {MANIFEST}" if started else ""
    raise CheckpointError(
        f"no complete checkpoint in {output_dir}{seen}.",
        hint="Name a run directory or a checkpoint.",
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a crash leaves the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def _workers() -> int:
    # hashing is bound by the processor (sha256 lets go of the interpreter lock) until about the disk's speed
    return min(8, cpu_cores())


def _flush_and_describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}


def _digest(file: Any) -> str:
    # file_digest reads through a buffer of 256 KB
    return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST
    hint = f"Use an earlier checkpoint of {directory.parent}."
    if not path.exists():
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: it has no {MANIFEST}, which is written last.", hint=hint
        )
    files: dict[str, dict[str, Any]] = read_object(path, MANIFEST_FIELDS, hint=hint)["files"]
    if not files:
        raise CheckpointError(f"{path} is damaged: it lists no files.", hint=hint)
    return files


def _problem(directory: Path, name: str, entry: dict[str, Any], deep: bool) -> str | None:
    path = directory / name
    try:
        size = regular_status(path).st_size
        with path.open("rb") as file:  # it must be readable, too
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if deep and _digest(file) != entry["sha256"]:
                return f"{name} has other contents than when it was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def iter_files(directory: Path) -> Iterator[str]:
    """Names of the files that the manifest lists."""
    yield from _read_manifest(directory)
