"""A cache's folder: where its entries lie, whether one is whole, and what may be deleted. Training and commands use it.

DIR/entries/3f/3fa9….safetensors   one output of an encoder, under the name of what it was made from
DIR/files/….json                   digests of files that were read once, by path, size and times
DIR/fill/…                         the run directories of ``vfun cache``
"""

import errno
import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli.errors import CheckpointError, EnvironmentFault

SUFFIX = ".safetensors"
DIGEST, NAME = "content", "name"
"""Keys of the digest and of the entry's own name in its header."""
ABANDONED = 3600
"""Seconds after which a file that is being written is not."""
DTYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "I16": "torch.int16",
    "I8": "torch.int8",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}
"""safetensors' names and torch's."""


class DamagedEntry(Exception):
    """A file of the cache that does not hold what was written."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A tensor of an entry, from memory or from a file."""

    dtype: str
    """As torch names it."""
    shape: Sequence[int]
    data: Iterable[Any]
    """Its bytes in order, in one or more buffers."""


def content_digest(tensors: Mapping[str, Content]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        for buffer in tensor.data:
            found.update(buffer)
    return found.hexdigest()


def verify_entry(path: Path) -> None:
    """Read all of an entry.

    Raises:
        DamagedEntry: it has other bytes than were written.
        OSError: it cannot be read.
    """
    from vfun_cli.checkpoints import safetensors  # with numpy: not where there is no entry

    path.open("rb").close()  # what cannot be read is not damaged
    try:
        tensors = safetensors.read_file(path)
        stated = safetensors.read_metadata(path)
        found = content_digest(
            {
                name: Content(dtype=DTYPES[tensor.dtype], shape=tensor.shape, data=tensor.chunks())
                for name, tensor in tensors.items()
            }
        )
    except CheckpointError as error:
        raise DamagedEntry(f"{path} is damaged ({error.message})") from None
    ends = [part.offset + tensor.nbytes for tensor in tensors.values() for part in tensor.segments]
    require_entry(path, stated, found)
    if ends and max(ends) != path.stat().st_size:
        raise DamagedEntry(f"{path} is damaged: there is more in it than was written")


def unreadable(path: Path, error: OSError) -> EnvironmentFault:
    """The error of an entry that cannot be read, which is no reason to delete it: it may be another user's."""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "Let all who share the cache read it (chmod -R a+rX), or name another folder with --cache."
    else:
        hint = "Delete that file, and it is made again; or name another folder with --cache."
    return EnvironmentFault(f"cannot read {path}: {error.strerror or error}.", hint=hint)


def require_entry(path: Path, stated: Mapping[str, str], found: str) -> None:
    """Compare what an entry's header states with the digest of its content, and with where it lies.

    Raises:
        DamagedEntry: it holds something else, or what was written under another name.
    """
    if stated.get(DIGEST) != found:
        raise DamagedEntry(f"{path} is damaged: its content is not what was written")
    if stated.get(NAME, path.stem) != path.stem:  # earlier versions state no name
        raise DamagedEntry(f"{path} is damaged: it was written as {stated[NAME]}")


def entry(root: Path, key: str) -> Path:
    """Where the entry of a name lies."""
    return root / "entries" / key[:2] / f"{key}{SUFFIX}"


def is_cache(root: Path) -> bool:
    """Whether a run or ``vfun cache`` has written here."""
    return (root / "entries").is_dir()


def entries(root: Path) -> Iterator[Path]:
    """All entries of a cache."""
    yield from (root / "entries").glob(f"??/*{SUFFIX}")


def total_bytes(root: Path) -> int:
    """Size of all entries; others may write and prune meanwhile."""
    size = 0
    for path in entries(root):
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def partials(root: Path) -> Iterator[Path]:
    """What processes that were killed left behind, and what live ones are writing."""
    yield from (root / "entries").glob("??/.*")


def fill_dir(root: Path) -> Path:
    """A run directory for a command that fills the cache; several may at once, so each has its own."""
    return root / "fill" / f"{time.time_ns()}-{os.getpid()}"


def prune(root: Path, wanted: Collection[str]) -> None:
    """Delete all entries but these, and what killed processes left behind an hour or more ago."""
    for path in entries(root):
        if path.name.removesuffix(SUFFIX) not in wanted:
            path.unlink(missing_ok=True)
    for path in partials(root):
        with suppress(FileNotFoundError):  # written meanwhile
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
