"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

Read and written by hand, because the library that does it needs torch or whole tensors in memory.
Format: https://huggingface.co/docs/safetensors (the "Format" section).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.tensors import STORAGE, FileReader, TensorSource, tensor_at
from vfun_cli.errors import CheckpointError
from vfun_cli.typed_json import Check, check_fields, items, mapping, optional, parse_object, record, shown, text, whole

METADATA = "__metadata__"
"""Key of the header."""

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format."""

MOST_ELEMENTS = 1 << 60
"""Of a tensor, its empty axes counted as one: numpy can count no more."""

TENSOR: Mapping[str, Check] = {
    "dtype": text(),
    "shape": items(whole(0, MOST_ELEMENTS), most=32),
    "data_offsets": items(whole(), least=2, most=2),
}
"""What a header says of a tensor."""

TENSORS: Mapping[str, Check] = {"tensors": mapping(record(TENSOR))}
STATED: Mapping[str, Check] = {METADATA: optional(mapping(text(longest=MAX_HEADER)))}


def read_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of one file in the order of their bytes.

    Raises:
        CheckpointError: the file is damaged.
    """
    header, data, size = _read_header(path)
    header.pop(METADATA, None)
    check_fields({"tensors": header}, TENSORS, _where(path))
    entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    tensors, end = {}, data
    for name, entry in entries:
        tensors[name] = _tensor(path, name, entry, data, size)
        start, stop = (data + offset for offset in entry["data_offsets"])
        if start != end:
            what = "overlaps the tensor before it" if start < end else "does not follow the tensor before it"
            raise CheckpointError(f"{path}: its safetensors header is damaged ({shown(name)} {what}).")
        end = stop
    if end != size:
        raise CheckpointError(f"{path} is not a whole safetensors file: {size - end} bytes belong to no tensor.")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a file's header says besides its tensors.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _read_header(path)[0].get(METADATA) or {}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the bytes of tensors begin, and the file's size."""
    with FileReader(path) as file:
        length = int.from_bytes(file.read(0, 8), "little")
        if length > min(MAX_HEADER, file.size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file: a header of {length} bytes in {file.size}.")
        return parse_object(file.read(8, length), _where(path), STATED, unique=True), 8 + length, file.size


def _where(path: Path) -> str:
    return f"{path}: its safetensors header"


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
        raise CheckpointError(f"{path}: {shown(name)} has dtype {shown(dtype)}; known are {', '.join(STORAGE)}.")
    if (
        end - start != math.prod(shape) * STORAGE[dtype].itemsize
        or math.prod(max(length, 1) for length in shape) > MOST_ELEMENTS
    ):
        raise CheckpointError(
            f"{path}: {shown(name)} has {end - start} bytes, which its shape {shown(shape)} does not need."
        )
    if data + end > size:
        over = data + end - size
        raise CheckpointError(f"{path} is truncated: {shown(name)} ends {over} bytes after the end of the file.")
    return tensor_at(path, data + start, shape=shape, dtype=dtype)
