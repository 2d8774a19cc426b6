"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

Read and written by hand, because the library that does it needs torch or whole tensors in memory.
Format: https://huggingface.co/docs/safetensors (the "Format" section).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.tensors import STORAGE, FileReader, TensorSource, tensor_at
from vfun_cli.errors import CheckpointError, first_line

METADATA = "__metadata__"
"""Key of the header."""

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format."""


def read_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of one file in the order of their bytes.

    Raises:
        CheckpointError: the file is damaged.
    """
    header, data, size = _read_header(path)
    header.pop(METADATA, None)
    try:
        entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        return {name: _tensor(path, name, entry, data, size) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged ({first_line(error)}).") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a file's header says besides its tensors.

    Raises:
        CheckpointError: the file is damaged.
    """
    stated = _read_header(path)[0].get(METADATA, {})
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: its safetensors header is damaged ({METADATA} is no object).")
    return stated


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the bytes of tensors begin, and the file's size."""
    with FileReader(path) as file:
        length = int.from_bytes(file.read(0, 8), "little")
        if length > min(MAX_HEADER, file.size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file: a header of {length} bytes in {file.size}.")
        try:
            header = json.loads(file.read(8, length))
        except ValueError as error:
            raise CheckpointError(f"{path}: its safetensors header is damaged ({first_line(error)}).") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: its safetensors header is damaged (it is no object).")
        return header, 8 + length, file.size


def read_files(paths: list[Path]) -> dict[str, TensorSource]:
    """The tensors of several files together; a name in two of them is an error."""
    tensors: dict[str, TensorSource] = {}
    for path in paths:
        found = read_file(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)} is also in another file of the directory.")
        tensors |= found
    return tensors


def _tensor(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> TensorSource:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in STORAGE:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; known are {', '.join(STORAGE)}.")
    if end - start != math.prod(shape) * STORAGE[dtype].itemsize or start < 0:
        raise CheckpointError(f"{path}: {name} has {end - start} bytes, which its shape {shape} does not need.")
    if data + end > size:
        raise CheckpointError(f"{path} is truncated: {name} ends {data + end - size} bytes after the end of the file.")
    return tensor_at(path, data + start, shape=shape, dtype=dtype)
