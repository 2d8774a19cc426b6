"""Writes safetensors files tensor by tensor, in parallel, with a few megabytes of memory per worker.

Every position is known before the first byte is written, so workers fill their tensors in any order and the bytes
of the files depend on the tensors alone.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vfun_cli.checkpoints.manifest import write_json
from vfun_cli.checkpoints.tensors import STORAGE, Array
from vfun_cli.disks.abilities import fsync, naming, reserve
from vfun_cli.errors import ConfigError

LONGEST_SIZE = 30
"""Characters of a size: no disk has more bytes than fit in."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file and what goes into it."""

    file: str
    entries: tuple[Entry, ...]


Produce = Callable[[Entry], Iterator[Array]]
"""Gives a tensor's elements as flat arrays; called in a worker thread."""


def parse_size(text: str) -> int:
    """Bytes of ``10GB`` (10^9), ``500MB`` or ``2GiB`` (2^30).

    Raises:
        ConfigError: anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > LONGEST_SIZE or float(match.group(1)) <= 0:
        raise ConfigError(f"{text!r} is not a size.", hint="Write a number with a unit, e.g. 10GB or 500MB.")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))


def plan_shards(entries: Sequence[Entry], stem: str, max_shard_size: int) -> list[Shard]:
    """Fill files up to the size in the given order; a tensor that is larger gets a file of its own.

    One file is ``<stem>.safetensors``, several are ``<stem>-00001-of-00003.safetensors`` and so on.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    if len(groups) == 1:
        return [Shard(file=f"{stem}.safetensors", entries=tuple(groups[0]))]
    return [
        Shard(file=f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", entries=tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_shards(
    directory: Path,
    stem: str,
    shards: Sequence[Shard],
    produce: Produce,
    *,
    workers: int,
    done: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write and fsync the files, and the index when there are several. Returns the sha256 of each tensor's bytes.

    ``done`` is called with the size of each finished tensor, from the worker threads. ``metadata`` stands in
    each header, beside the format.
    """
    digests: dict[str, str] = {}
    for shard in shards:
        header, starts = _header(shard, metadata or {})
        path = directory / shard.file
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:

            def write(entry: Entry, descriptor: int = descriptor, starts: dict[str, int] = starts) -> tuple[str, str]:
                digest = _write_tensor(descriptor, starts[entry.name], produce(entry))
                done(entry.nbytes)
                return entry.name, digest

            with naming(path):
                reserve(descriptor, len(header) + sum(entry.nbytes for entry in shard.entries))
                os.pwrite(descriptor, header, 0)
                with ThreadPoolExecutor(workers) as pool:
                    digests.update(pool.map(write, shard.entries))
                fsync(descriptor)
        finally:
            os.close(descriptor)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard.entries)},
            "weight_map": {entry.name: shard.file for shard in shards for entry in shard.entries},
        }
        write_json(directory / f"{stem}.safetensors.index.json", index)
    return digests


def content_hash(entries: Sequence[Entry], digests: dict[str, str]) -> str:
    """sha256 over name, dtype, shape and the bytes' sha256 of every tensor, by name: the same however it is sharded."""
    total = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: entry.name):
        line = json.dumps([entry.name, entry.dtype, list(entry.shape), digests[entry.name]])
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def _header(shard: Shard, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor starts in the file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets = {}
    position = 0
    for entry in shard.entries:
        offsets[entry.name] = position
        end = position + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _write_tensor(descriptor: int, offset: int, pieces: Iterator[Array]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        if not piece.size:
            continue
        view = piece.data.cast("B")
        digest.update(view)
        while len(view):
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
    return digest.hexdigest()
