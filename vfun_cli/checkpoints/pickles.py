"""Reads the pickles inside checkpoints without running anything that they ask for.

torch and DeepSpeed checkpoints are pickles, and a pickle can name any function to be called. This unpickler knows a
fixed list of names. Tensors become ``StoredTensor`` (where the bytes are, nothing loaded), a few plain types become
themselves, and the listed configuration classes become inert records. Any other name is an error.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.tensors import STORAGE, FileReader, Segment, TensorSource
from vfun_cli.errors import CheckpointError, first_line

MAX_PICKLE = 1 << 29
"""Bytes: the description of a checkpoint is kilobytes to a few megabytes, the tensors lie outside of it."""


@dataclass(frozen=True)
class StorageType:
    """``torch.FloatStorage`` and its like."""

    dtype: str


@dataclass(frozen=True)
class StorageRef:
    """A storage of a torch file: its type and the name of its zip member."""

    dtype: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a torch file before its bytes are looked up; offset and stride in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """An instance of a class that we do not have or do not want: what it was made from, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        # slotted and plain classes: (None, {...}) or {...}
        self.state = state[1] if isinstance(state, tuple) and len(state) == 2 and state[0] is None else state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(f"{type(self).__name__} in the pickle has no field {name!r}")

    def __hash__(self) -> int:
        return hash(_key(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and _key(self) == _key(other)


def _key(record: Inert) -> tuple[Any, ...]:
    # repr, since a state may hold lists; used for MetadataIndex, a dictionary key in DCP metadata
    state = record.__dict__.get("state") or {}
    return (type(record).__name__, repr(record.__dict__.get("args")), repr(state))


def _rebuild_tensor(storage: StorageRef, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, StorageRef):
        raise pickle.UnpicklingError("a tensor without a storage")
    return StoredTensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    return data


def _rebuild_from_type(
    build: Callable[..., StoredTensor], _kind: Any, args: tuple[Any, ...], _state: Any
) -> StoredTensor:
    if build not in (_rebuild_tensor, _rebuild_parameter):
        raise pickle.UnpicklingError("a tensor made by an unknown function")
    return build(*args)


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(map(int, values))


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}

TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

_INERT = {
    "torch": ("Tensor", "device", "Generator"),
    "torch.nn.parameter": ("Parameter",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint._fsspec_filesystem": ("_StorageInfo",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler", "LossScaleConfig"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum", "DeepSpeedZeroConfig"),
    "deepspeed.runtime.zero.offload_config": (
        "OffloadDeviceEnum",
        "OffloadStateTypeEnum",
        "DeepSpeedZeroOffloadParamConfig",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
}

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _latin1,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
    **{(module, name): type(name, (Inert,), {}) for module, names in _INERT.items() for name in names},
}
"""Every name a checkpoint may mention, and what it turns into here."""


class _Refused(pickle.UnpicklingError):
    """A name that is not on the list."""


class _Unpickler(pickle.Unpickler):
    """Looks names up in the list above and nowhere else."""

    def find_class(self, module: str, name: str, /) -> Any:
        """What a listed name turns into."""
        try:
            return _KNOWN[module.replace("__builtin__", "builtins"), name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any, /) -> StorageRef:
        """A storage reference: ("storage", type, key, device, elements)."""
        kind, storage, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(storage, StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown persistent object")
        return StorageRef(storage.dtype, key)


class Listed(pickle.Unpickler):
    """Knows the same names, each as what it is: for a library that needs the real objects."""

    def find_class(self, module: str, name: str, /) -> Any:
        """What has a listed name."""
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def loads(data: bytes, path: Path, reader: type[pickle.Unpickler] = _Unpickler) -> Any:
    """Unpickle with the list; ``path`` is for messages.

    Raises:
        CheckpointError: the pickle is damaged, or asks for a name that is not on the list; nothing of it is run.
    """
    try:
        return reader(io.BytesIO(data)).load()
    except _Refused as refused:
        raise CheckpointError(
            f"{path} is refused: its pickle asks for {refused}, which no checkpoint needs; nothing was run.",
            hint="Do not open this file with torch.load; take the checkpoint from a source that you trust.",
        ) from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{path} is damaged: its pickle does not load ({first_line(error)}).") from error


def load_pickle(path: Path, reader: type[pickle.Unpickler] = _Unpickler) -> Any:
    """A file that is one bare pickle, as DCP's ``.metadata``.

    Raises:
        CheckpointError: as of ``loads``.
    """
    with FileReader(path) as file:
        _check_size(file.size, path)
        return loads(file.read(0, file.size), path, reader)


def listed_classes(package: str) -> list[tuple[str, str]]:
    """Modules and names of what a checkpoint may mention of a library."""
    return [(module, name) for module, name in _KNOWN if module.startswith(f"{package}.")]


def _check_size(size: int, path: Path) -> None:
    if size > MAX_PICKLE:
        raise CheckpointError(
            f"{path} is refused: its pickle has {size} bytes, and no checkpoint's description is that large."
        )


class TorchArchive:
    """A ``torch.save`` file, or a part of a larger file that is one: the object, and where each tensor's bytes are."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        with FileReader(path) as file:
            length = file.size - offset if length is None else length
            try:
                with zipfile.ZipFile(_Window(file, offset, length)) as archive:
                    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                    self._check_members(members)
                    self.value = loads(archive.read(members["data.pkl"]), path)
                    self._order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
            except (zipfile.BadZipFile, KeyError, EOFError, struct.error, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a whole torch file: it is truncated, or no checkpoint."
                ) from error
        if self._order != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported.")
        self._base = offset
        self._members = members

    def _check_members(self, members: Mapping[str, zipfile.ZipInfo]) -> None:
        _check_size(members["data.pkl"].file_size, self.path)
        packed = [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(f"{self.path}: member {packed[0]} is compressed; torch.save never does that.")

    def locate(self, tensor: StoredTensor) -> Segment:
        """Where the tensor's elements are.

        Raises:
            CheckpointError: they are not one row-major run.
        """
        if not _is_row_major(tensor.shape, tensor.stride):
            raise CheckpointError(f"{self.path}: a tensor of shape {tensor.shape} is stored with gaps or transposed.")
        info = self._members.get(f"data/{tensor.storage.key}")
        count = math.prod(tensor.shape)
        itemsize = STORAGE[tensor.storage.dtype].itemsize
        if info is None or tensor.offset < 0 or (tensor.offset + count) * itemsize > info.file_size:
            raise CheckpointError(f"{self.path}: a tensor of shape {tensor.shape} has no complete storage.")
        start = self._base + info.header_offset
        with FileReader(self.path) as file:
            # the local header's extra field holds torch's alignment padding and differs from the directory's copy
            name, extra = struct.unpack("<HH", file.read(start + 26, 4))
        return Segment(path=self.path, offset=start + 30 + name + extra + tensor.offset * itemsize, count=count)

    def source(self, tensor: StoredTensor) -> TensorSource:
        """The tensor, to be read later."""
        return TensorSource(shape=tensor.shape, dtype=tensor.storage.dtype, locate=lambda: (self.locate(tensor),))


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements are one run; the stride of an axis of length one means nothing."""
    if 0 in shape:
        return True
    rows = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return all(length == 1 or step == row for length, step, row in zip(shape, stride, rows, strict=True))


class _Window(io.RawIOBase):
    """A range of a file, as a file: DCP puts many torch archives into one."""

    def __init__(self, file: FileReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the range."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Position within the range."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes."""
        left = max(self._length - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = self._file.read(self._start + self._position, count)
        self._position += count
        return data
