"""Opens any checkpoint as tensors by name: safetensors, DCP (FSDP), ZeRO-2 and ZeRO-3, ours or the original scripts'.

Nothing is loaded until a tensor is read, and neither torch, accelerate, DeepSpeed nor a process group is needed.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.lora_files import ADAPTER_FILE, peft_key
from vfun_cli.checkpoints.naming import PARAMETER_GROUPS, by_parameter
from vfun_cli.checkpoints.pickles import Inert, StoredTensor, TorchArchive, load_pickle
from vfun_cli.checkpoints.state import STATE_FILE, read_state
from vfun_cli.checkpoints.tensors import STORAGE, Array, Segment, TensorSource
from vfun_cli.errors import CheckpointError, first_line
from vfun_cli.typed_json import shown

Layout = Literal["safetensors", "dcp", "zero1", "zero2", "zero3"]

_WRAPPERS = re.compile(r"^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
"""What wrappers leave in parameter names."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What an optimizer keeps of one parameter, by the optimizer's own names."""

    arrays: Mapping[str, TensorSource]
    numbers: Mapping[str, Array] = field(default_factory=dict)
    """Arrays of one number, as a count of steps."""

    @property
    def step(self) -> int:
        """Of an optimizer that counts its steps."""
        return int(self.numbers["step"])

    @classmethod
    def of(cls, found: Mapping[str, TensorSource]) -> "Moments":
        """What is stored under these names."""
        return cls(
            arrays={name: tensor for name, tensor in found.items() if tensor.shape},
            numbers={name: tensor.read() for name, tensor in found.items() if not tensor.shape},
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointReader:
    """A checkpoint as named tensors."""

    path: Path
    layout: Layout
    weights: Mapping[str, TensorSource]
    """The trained weights by parameter name; float32 masters wherever the layout has them."""
    ema: Mapping[str, TensorSource] = field(default_factory=dict)
    """Averaged weights, empty when the run kept none."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """``state.json``; empty for checkpoints of other programs."""
    load_moments: Callable[[], dict[str, Moments]]
    load_groups: Callable[[], dict[str, Array]]

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Optimizer moments by parameter name; empty when the checkpoint holds none."""
        return self.load_moments()

    @cached_property
    def groups(self) -> Mapping[str, Array]:
        """Numbers that the optimizer keeps for a group of parameters, as ``<group>.<name>``."""
        return self.load_groups()


def open_checkpoint(path: Path) -> CheckpointReader:
    """Find out the layout of a checkpoint directory and list its tensors.

    Takes a ``checkpoint-N`` of ours or of the original scripts, or a bare DCP, DeepSpeed or safetensors directory.

    Raises:
        CheckpointError: it is none of them, is damaged, or asks for code to be run.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.", hint="Name a checkpoint directory, e.g. checkpoint-500.")
    with _described_by(path):
        return _open(path)


def _open(path: Path) -> CheckpointReader:
    state = read_state(path) if (path / STATE_FILE).is_file() else {}
    for folder in (path / "model", path):
        if (folder / ".metadata").is_file():
            return _dcp(path, folder, folder, state)
        zero = _zero_folder(folder)
        if zero:
            return _zero(path, zero, state)
        if (folder / "model.safetensors").is_file():
            return _plain(path, folder, [folder / "model.safetensors"], state)
        if (folder / ADAPTER_FILE).is_file():
            return _plain(path, folder, [folder / ADAPTER_FILE], state, key=peft_key)
    if (path / "pytorch_model_fsdp_0" / ".metadata").is_file():
        return _dcp(path, path / "pytorch_model_fsdp_0", path / "optimizer_0", state)
    for folder in (path / "transformer", path):
        files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        if files:
            return _plain(path, folder, files, state)
    raise CheckpointError(
        f"{path} holds no checkpoint: neither model.safetensors, nor a DCP .metadata, nor DeepSpeed *_optim_states.pt.",
        hint="Name the checkpoint-N directory itself.",
    )


@contextmanager
def _described_by(what: Path) -> Iterator[None]:
    """Inside, values that a pickle holds are used: each may be of any type and size, and none is what it should be."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{what} is damaged: what it says of its tensors makes no sense "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error


def _clean(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _by_parameter(
    found: Mapping[str, TensorSource], weights: Collection[str], key: Callable[[str], str] = _clean
) -> dict[str, Moments]:
    """Entries ``<parameter>.<moment>``; ``key`` makes a weight's name of a parameter's."""
    names = {name for entry in found for name in _heads(entry) if key(name) in weights}
    return {key(name): Moments.of(parts) for name, parts in by_parameter(found, names).items() if parts}


def _heads(entry: str) -> Iterator[str]:
    """What may be the parameter's name in ``<parameter>.<moment>``."""
    words = entry.split(".")
    return (".".join(words[:count]) for count in range(1, len(words)))


# plain -------------------------------------------------------------------------------------------------------------


def _plain(
    path: Path, folder: Path, files: list[Path], state: dict[str, Any], key: Callable[[str], str] = _clean
) -> CheckpointReader:
    """``key`` makes the weights' names of those that the moments are stored under."""
    weights = {_clean(name): tensor for name, tensor in safetensors.read_files(files).items()}
    average = folder / "ema.safetensors"
    ema = safetensors.read_file(average) if average.is_file() else {}

    def kept() -> dict[str, TensorSource]:
        file = folder / "optimizer.safetensors"
        return safetensors.read_file(file) if file.is_file() else {}

    return CheckpointReader(
        path=path,
        layout="safetensors",
        weights=weights,
        ema=ema,
        state=state,
        load_moments=lambda: _by_parameter(kept(), weights, key),
        load_groups=lambda: {
            entry.removeprefix(PARAMETER_GROUPS): number.read()
            for entry, number in kept().items()
            if entry.startswith(PARAMETER_GROUPS)
        },
    )


# torch.distributed.checkpoint --------------------------------------------------------------------------------------


def _dcp(path: Path, folder: Path, optimizer: Path, state: dict[str, Any]) -> CheckpointReader:
    tensors = _dcp_tensors(folder)
    weights, ema = (
        {_clean(".".join(key[1:])): source for key, source in tensors.items() if key[0] == entry}
        for entry in ("model", "ema")
    )
    if not weights:
        raise CheckpointError(f"{folder} is a DCP directory without an entry 'model'.")

    def kept() -> Mapping[tuple[str, ...], TensorSource]:
        if optimizer == folder:
            return tensors
        return _dcp_tensors(optimizer) if (optimizer / ".metadata").is_file() else {}

    @_described_by(optimizer)
    def moments() -> dict[str, Moments]:
        # ("optimizer", "state", name, "exp_avg"), or flattened: ("optimizer", "state", "name.exp_avg")
        entries = {".".join(key[2:]): each for key, each in kept().items() if key[:2] == ("optimizer", "state")}
        return _by_parameter(entries, weights)

    return CheckpointReader(
        path=path,
        layout="dcp",
        weights=weights,
        ema=ema,
        state=state,
        load_moments=moments,
        load_groups=lambda: {
            key[2]: number.read() for key, number in kept().items() if key[:2] == ("optimizer", "groups")
        },
    )


def _dcp_tensors(folder: Path) -> dict[tuple[str, ...], TensorSource]:
    """The tensors of a DCP directory by their path in the saved state dict."""
    file = folder / ".metadata"
    metadata = load_pickle(file)
    with _described_by(file):
        paths = metadata.planner_data or {}
        pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for index, info in metadata.storage_data.items():
            offset = getattr(index, "offset", None)  # left out for entries that are not tensors
            if offset is not None:
                pieces.setdefault(index.fqn, []).append((offset, info))
        return {
            tuple(map(str, paths.get(name, name.split(".")))): _dcp_tensor(folder, name, entry, pieces.get(name, []))
            for name, entry in metadata.state_dict_metadata.items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }


def _dcp_tensor(folder: Path, name: str, entry: Inert, pieces: list[tuple[tuple[int, ...], Any]]) -> TensorSource:
    shape = tuple(entry.size)
    dtype = entry.properties.state[0]  # TensorProperties pickles itself as (dtype, layout, ...)
    if dtype not in STORAGE:
        raise CheckpointError(f"{folder}: {name} has dtype {dtype}, which is not supported.")
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}

    @_described_by(folder)
    def locate() -> tuple[Segment, ...]:
        runs: list[tuple[int, Segment]] = []
        for offset, info in pieces:
            box = sizes.get(tuple(offset))
            if box is None:
                raise CheckpointError(f"{folder}: a part of {name} at {offset} is not in the metadata.")
            if math.prod(box):
                runs.extend(_dcp_runs(folder, name, dtype, shape, tuple(offset), box, info))
        runs.sort(key=lambda run: run[0])
        position = 0
        for start, segment in runs:
            if start != position:
                raise CheckpointError(f"{folder}: {name} has a gap or an overlap at element {start}.")
            position += segment.count
        return tuple(segment for _, segment in runs)

    return TensorSource(shape=shape, dtype=dtype, locate=locate)


def _dcp_runs(
    folder: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    box: tuple[int, ...],
    info: Any,
) -> Iterator[tuple[int, Segment]]:
    """One stored box as (position in the full tensor, run of elements), in the box's own order."""
    if info.__dict__["state"].get("transform_descriptors"):
        raise CheckpointError(f"{folder}: {name} is stored compressed, which is not supported.")
    relative = Path(info.relative_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder}: the metadata points outside of the checkpoint: {relative}.")
    archive = TorchArchive(folder / relative, info.offset, info.length)
    stored = archive.value
    if not isinstance(stored, StoredTensor) or stored.shape != box or stored.storage.dtype != dtype:
        raise CheckpointError(f"{folder / relative}: the part of {name} is not the tensor that the metadata describes.")
    segment = archive.locate(stored)
    # an axis can be merged into the run when every later axis is complete
    axis = len(shape)
    while axis > 0 and (axis == len(shape) or box[axis] == shape[axis]):
        axis -= 1
    run = math.prod(box[axis:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    itemsize = STORAGE[dtype].itemsize
    for number in range(math.prod(box[:axis])):
        rest, start = number, sum(o * s for o, s in zip(offset, strides, strict=True))
        for i in reversed(range(axis)):
            rest, index = divmod(rest, box[i])
            start += index * strides[i]
        yield start, Segment(path=segment.path, offset=segment.offset + number * run * itemsize, count=run)


# DeepSpeed ---------------------------------------------------------------------------------------------------------

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_")
_OPTIMIZER, _EMA = "_optim_states.pt", "_ema.safetensors"
"""How the names of a rank's files end: DeepSpeed's own, and what vfun puts beside it."""


def _zero_folder(folder: Path) -> Path | None:
    """The directory with the ``*_optim_states.pt``: the folder, or the tag that ``latest`` or its only child names."""
    if not folder.is_dir():
        return None
    candidates = [folder]
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:255].decode("utf-8", "replace").strip()
        if tag and Path(tag).name == tag and tag.isprintable():
            candidates.append(folder / tag)
    candidates += [folder / "state", folder / "pytorch_model"]
    return next((found for found in candidates if any(found.glob("*_optim_states.pt"))), None)


def _zero(path: Path, folder: Path, state: dict[str, Any]) -> CheckpointReader:
    ranks = _zero_ranks(folder, _OPTIMIZER)
    archives = [TorchArchive(file) for file in ranks]
    states = [_field(archive.value, "optimizer_state_dict", archive.path) for archive in archives]
    stage = states[0].get("zero_stage", 0)
    stage = stage.args[0] if isinstance(stage, Inert) else stage
    count = states[0].get("partition_count", len(ranks))
    count = max(count) if isinstance(count, list) else count
    if count != len(ranks):
        raise CheckpointError(
            f"{folder} was written by {count} ranks, and holds {len(ranks)} *_optim_states.pt.",
            hint="Copy the files of every rank into one directory.",
        )
    shapes = _param_shapes(folder)
    if stage == 3:
        flats = [_flat_groups(a, s, "fp32_flat_groups") for a, s in zip(archives, states, strict=True)]
        places = _zero3_places(shapes, len(ranks))
    elif stage in (1, 2):
        flats = [_flat_groups(a, s, "single_partition_of_fp32_groups") for a, s in zip(archives, states, strict=True)]
        places = _zero2_places(shapes, states, flats, folder)
    else:
        raise CheckpointError(f"{folder} is of ZeRO stage {stage}; known are 1, 2 and 3.")

    def source(name: str, flat: list[list[TensorSource]]) -> TensorSource:
        shape, runs = places[name]
        locate = _described_by(folder)(lambda: _cut(flat, runs, name, folder))
        return TensorSource(shape=shape, dtype="F32", locate=locate)

    def bases() -> list[Any]:
        key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        return [_field(s, key, a.path) for a, s in zip(archives, states, strict=True)]

    @_described_by(folder)
    def groups() -> dict[str, Array]:
        first = bases()[0]
        return {
            f"{index}.{name}": np.array(value)
            for index, group in enumerate(first["param_groups"] if isinstance(first, dict) else ())
            for name, value in group.items()
            if isinstance(value, bool | int | float)
        }

    @_described_by(folder)
    def moments() -> dict[str, Moments]:
        base = bases()
        if not all(isinstance(one, dict) and one.get("state") for one in base):
            return {}
        arrays = {
            part: [_moment_groups(a, b, part) for a, b in zip(archives, base, strict=True)]
            for part in _array_names(base[0])
        }
        numbers = [_numbers(archives[0], base[0], group) for group in range(len(flats[0]))]
        return {
            name: Moments(
                arrays={part: source(name, flat) for part, flat in arrays.items()},
                numbers=numbers[_first_group(runs, flats[0], stage)],
            )
            for name, (_, runs) in places.items()
        }

    return CheckpointReader(
        path=path,
        layout=f"zero{stage}",  # type: ignore[arg-type]
        weights={_clean(name): source(name, flats) for name in places},
        ema=_zero_ema(folder, {name: shape for name, (shape, _) in places.items()}, len(ranks)),
        state=state,
        load_moments=lambda: {_clean(name): found for name, found in moments().items()},
        load_groups=groups,
    )


def _zero_ema(folder: Path, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, TensorSource]:
    """The average, whose flattened parts follow each other in the order of the ranks."""
    if not any(folder.glob(f"*{_EMA}")):
        return {}
    files = _zero_ranks(folder, _EMA)
    if len(files) != ranks:
        raise CheckpointError(f"{folder} was written by {ranks} ranks, and holds {len(files)} *{_EMA}.")
    parts: dict[str, list[TensorSource]] = {name: [] for name in shapes}
    for file in files:
        for name, part in safetensors.read_file(file).items():
            if name not in parts or part.dtype != "F32":
                raise CheckpointError(f"{file}: {shown(name)} is not of the float32 weights that are trained.")
            parts[name].append(part)

    def source(name: str) -> TensorSource:
        def locate() -> tuple[Segment, ...]:
            return tuple(segment for part in parts[name] for segment in part.segments)

        return TensorSource(shape=shapes[name], dtype="F32", locate=locate)

    return {_clean(name): source(name) for name in shapes}


def _zero_ranks(folder: Path, ending: str) -> list[Path]:
    """The files of all ranks in their order (by number: rank 10 comes after rank 9)."""
    matches = [(match, file) for file in folder.glob(f"*{ending}") if (match := _RANK.search(file.name))]
    if any(int(match.group(2)) for match, _ in matches):
        raise CheckpointError(f"{folder} was written with tensor parallelism, which is not supported.")
    ranked = sorted((int(match.group(1)), file) for match, file in matches)
    if [rank for rank, _ in ranked] != list(range(len(ranked))) or not ranked:
        raise CheckpointError(f"{folder}: the *{ending} of some ranks are missing.")
    return [file for _, file in ranked]


def _field(value: Any, key: str, path: Path) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise CheckpointError(f"{path} is not a DeepSpeed ZeRO file: {key!r} is missing.")
    return value[key]


def _param_shapes(folder: Path) -> list[dict[str, tuple[int, ...]]]:
    """Trainable parameters of each optimizer group, in DeepSpeed's order."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        file = folder / name
        if file.is_file():
            shapes = _field(TorchArchive(file).value, "param_shapes", file)
            groups = shapes if isinstance(shapes, list) else [shapes]
            return [{key: tuple(shape) for key, shape in group.items()} for group in groups]
    raise CheckpointError(f"{folder} has no *_model_states.pt, which names the parameters.")


def _flat_groups(archive: TorchArchive, state: dict[str, Any], key: str) -> list[TensorSource]:
    groups = _field(state, key, archive.path)
    return [_stored(archive, group, key) for group in groups]


def _array_names(base: dict[str, Any]) -> list[str]:
    """What the optimizer keeps of a flat group that is as long as that."""
    first = base["state"][min(base["state"])]
    return [name for name, value in first.items() if isinstance(value, StoredTensor) and value.shape]


def _moment_groups(archive: TorchArchive, base: dict[str, Any], part: str) -> list[TensorSource]:
    return [_stored(archive, _field(base["state"][group], part, archive.path), part) for group in sorted(base["state"])]


def _stored(archive: TorchArchive, value: Any, key: str) -> TensorSource:
    if not isinstance(value, StoredTensor) or len(value.shape) != 1:
        raise CheckpointError(f"{archive.path}: {key} does not hold flat tensors.")
    if value.storage.dtype != "F32":
        raise CheckpointError(f"{archive.path}: {key} is {value.storage.dtype}; float32 is expected.")
    return archive.source(value)


def _numbers(archive: TorchArchive, base: dict[str, Any], group: int) -> dict[str, Array]:
    """What the optimizer keeps of a flat group that is one number, as its count of steps."""
    kept = base["state"][group]
    found = {name: value for name, value in kept.items() if not (isinstance(value, StoredTensor) and value.shape)}
    if "step" not in found:  # fused optimizers count per parameter group
        for options in base["param_groups"]:
            if group in options["params"] and "step" in options:
                found["step"] = options["step"]
    return {
        name: archive.source(value).read() if isinstance(value, StoredTensor) else np.array(value, np.float32)
        for name, value in found.items()
    }


@dataclass(frozen=True)
class _Run:
    """Elements of one rank: of one of its flat groups, or (group None) of all of them one after another."""

    rank: int
    group: int | None
    start: int
    count: int


_Places = dict[str, tuple[tuple[int, ...], tuple[_Run, ...]]]


def _zero2_places(
    shapes: list[dict[str, tuple[int, ...]]],
    states: list[dict[str, Any]],
    flats: list[list[TensorSource]],
    folder: Path,
) -> _Places:
    """ZeRO-1 and -2: a group's parameters are laid end to end and the line is cut into equal parts, one a rank.

    ``param_slice_mappings`` says what each rank holds; files of old versions lack it, and then the parameters
    follow each other in the order of the names, with ``param_alignment_paddings`` between them.
    """
    places: _Places = {}
    for group, named in enumerate(shapes):
        mappings = [state.get("param_slice_mappings") for state in states]
        paddings = states[0].get("param_alignment_paddings") or [[0] * len(g) for g in shapes]
        position = 0
        for number, (name, shape) in enumerate(named.items()):
            count = math.prod(shape)
            if all(mappings):
                cuts = [(rank, mapping[group].get(name)) for rank, mapping in enumerate(mappings) if mapping]
                runs = [_Run(rank, group, cut.start, cut.numel) for rank, cut in cuts if cut is not None]
            else:
                runs = _cut_line(group, position, count, [flat[group].numel for flat in flats])
            position += count + paddings[group][number]
            held = sum(run.count for run in runs)
            if held != count:
                raise CheckpointError(f"{folder}: the ranks hold {held} elements of {name}, whose shape is {shape}.")
            places[name] = (shape, tuple(runs))
    return places


def _cut_line(group: int, start: int, count: int, lengths: list[int]) -> list[_Run]:
    runs = []
    for rank, length in enumerate(lengths):
        begin, end = max(start, 0), min(start + count, length)
        if begin < end:
            runs.append(_Run(rank, group, begin, end - begin))
        start -= length
    return runs


def _zero3_places(shapes: list[dict[str, tuple[int, ...]]], ranks: int) -> _Places:
    """ZeRO-3: each parameter is cut into ceil(numel / ranks) elements a rank, the last part padded.

    A rank lays its parts end to end through all its flat groups.
    """
    places: _Places = {}
    position = 0
    for named in shapes:
        for name, shape in named.items():
            count = math.prod(shape)
            part = math.ceil(count / ranks)
            held = [max(min(part, count - rank * part), 0) for rank in range(ranks)]
            places[name] = (shape, tuple(_Run(rank, None, position, n) for rank, n in enumerate(held) if n))
            position += part
    return places


def _first_group(runs: tuple[_Run, ...], groups: list[TensorSource], stage: int) -> int:
    if not runs:
        return 0
    if stage != 3:
        return runs[0].group or 0
    position = runs[0].start
    for number, group in enumerate(groups):
        if position < group.numel:
            return number
        position -= group.numel
    return 0


def _cut(flats: list[list[TensorSource]], runs: tuple[_Run, ...], name: str, folder: Path) -> tuple[Segment, ...]:
    """The byte ranges of a parameter's runs."""
    segments = []
    for run in runs:
        groups = flats[run.rank] if run.group is None else [flats[run.rank][run.group]]
        start, left = run.start, run.count
        for group in groups:
            take = min(left, group.numel - start)
            if take > 0:
                (flat,) = group.segments
                segments.append(Segment(path=flat.path, offset=flat.offset + 4 * start, count=take))
                left -= take
            start = max(start - group.numel, 0)
        if left:
            raise CheckpointError(f"{folder}: rank {run.rank} holds {left} elements of {name} too few.")
    return tuple(segments)
