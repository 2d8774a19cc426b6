"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

Read and written by hand, because the library that does it needs torch or whole tensors in memory.
Format: https://huggingface.co/docs/safetensors (the "Format" section).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.tensors import STORAGE, FileReader, TensorSource, at
from vfun_cli.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format."""


def read_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of one file in the order of their bytes. Raises CheckpointError when the file is damaged."""
    with FileReader(path) as file:
        size = file.size
        length = int.from_bytes(file.read(0, 8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a whole safetensors file (header of {length} bytes in {size})")
        try:
            header = json.loads(file.read(8, length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
            tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: its safetensors header is damaged ({error})") from error
    return tensors


def read_files(paths: list[Path]) -> dict[str, TensorSource]:
    """The tensors of several files together; a name in two of them is an error."""
    tensors: dict[str, TensorSource] = {}
    for path in paths:
        found = read_file(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)} is also in another file of the directory")
        tensors |= found
    return tensors


def _tensor(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> TensorSource:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in STORAGE:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; known are {', '.join(STORAGE)}")
    if end - start != math.prod(shape) * STORAGE[dtype].itemsize or start < 0:
        raise CheckpointError(f"{path}: {name} has {end - start} bytes, which its shape {shape} does not need")
    if data + end > size:
        raise CheckpointError(f"{path}: truncated, {name} ends {data + end - size} bytes after the end of the file")
    return at(path, data + start, shape=shape, dtype=dtype)
