"""A LoRA checkpoint as files that other programs load at the strength it was trained with, or merged into its base.

| format | file | strength |
|---|---|---|
| peft | ``adapter_model.safetensors``, ``adapter_config.json`` | in the configuration |
| diffusers | ``pytorch_lora_weights.safetensors`` | multiplied into B: loaders that find no alpha take 1 |
| comfyui | ``<name>.safetensors``, keys ``diffusion_model.<layer>.lora_down.weight`` | ``alpha`` tensors |
| original | ``<name>.safetensors``, keys ``lora_unet__<layer>.lora_down.weight`` | ``alpha`` tensors |

``original`` calls the layers what the released model calls them, ``peft`` and ``diffusers`` what the module does.
``comfyui`` takes the released names too, or the family's own locations: where ComfyUI joins several layers into one,
their pairs become one of their ranks' sum, with the strength multiplied into B.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.export import (
    DTYPES,
    NAME_MODEL,
    ExportResult,
    Weights,
    check_output,
    read_base,
    replacing,
    verify_source,
    write_model,
)
from vfun_cli.checkpoints.joint import Locate, joined
from vfun_cli.checkpoints.lora_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COMFYUI_PREFIX,
    DIFFUSERS_PREFIX,
    PEFT_PREFIX,
    AdapterFile,
    Pair,
    pairs_of,
    read_adapter,
    released_layer,
)
from vfun_cli.checkpoints.naming import LayerLocation
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.checkpoints.tensors import CHUNK, STORAGE, Array, TensorSource, convert
from vfun_cli.checkpoints.writer import Entry, content_hash, plan_shards, write_shards
from vfun_cli.errors import CheckpointError, ConfigError, did_you_mean

FORMATS = ("peft", "diffusers", "comfyui", "original")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
WITHOUT_DORA = ("comfyui", "original")
"""Their loaders compute DoRA's norms otherwise, or stop at its key."""

Matrix = npt.NDArray[np.float32]


def export_adapter(
    checkpoint: Path,
    output: Path,
    *,
    format: str,
    released: Callable[[str], str] = lambda name: name,
    locate: Locate | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str = "bf16",
    weights: Weights = "trained",
    overwrite: bool = False,
) -> ExportResult:
    """Write the adapter alone into the directory ``output``.

    Args:
        released: from a parameter's name in the module to its released name.
        locate: from a layer's name in the module to its location in ComfyUI; by default its released name.
        metadata: what the header says of the file; the hash of its tensors comes to it.

    Raises:
        ConfigError: unknown format or type, an output that exists, DoRA in a format that cannot carry it, a layer
            without a location.
        CheckpointError: the checkpoint is damaged or holds no LoRA.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"--format is {format!r}; a LoRA comes as {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )
    check_output(output, dtype, overwrite=overwrite, sources=(checkpoint,))
    adapter = open_adapter(checkpoint, weights)
    if format in WITHOUT_DORA and any(pair.magnitude for pair in adapter.pairs.values()):
        raise ConfigError(
            f"LoRA files of the {format} style cannot carry DoRA's magnitudes.",
            hint="Use --merge, --format peft or --format diffusers.",
        )
    if format == "comfyui" and locate is not None:
        tensors = _joined(adapter, locate, DTYPES[dtype])
    else:
        tensors = _STYLES[format](adapter, released, DTYPES[dtype])
    names = {"peft": ADAPTER_FILE, "diffusers": DIFFUSERS_FILE}
    needed = sum(values.nbytes for _, values in tensors.values())
    with replacing(output, needed=needed, overwrite=overwrite) as partial:
        result = _write(partial, names.get(format, f"{checkpoint.name}.safetensors"), tensors, metadata or {})
        if format == "peft":
            (partial / ADAPTER_CONFIG).write_text(json.dumps(dict(adapter.config), indent=2), encoding="utf-8")
    return ExportResult(output=output.resolve(), **result)


def merge_adapter(
    checkpoint: Path,
    output: Path,
    *,
    base_dir: Path,
    given: Mapping[str, TensorSource] | None = None,
    released: Callable[[str], str] = lambda name: name,
    locate: Locate | None = None,
    max_shard_size: str = "10GB",
    dtype: str = "bf16",
    weights: Weights = "trained",
    overwrite: bool = False,
    workers: int | None = None,
) -> ExportResult:
    """Write the base with the adapter added to it, tensor by tensor: W + strength · B·A in float32, then rounded.

    Takes a checkpoint of ``vfun lora``; ``given`` as ``checkpoints.export.export``. Memory: a few rows of one layer at
    a time, and its two small matrices.

    Raises:
        ConfigError, CheckpointError, RunError: as ``checkpoints.export.export``; also for a layer the base lacks.
    """
    check_output(output, dtype, overwrite=overwrite, sources=(checkpoint, base_dir))
    adapter = open_adapter(checkpoint, weights)
    stem, sources = read_base(base_dir)
    sources |= given or {}
    merge_into(sources, adapter, {layer: released_layer(layer, released) for layer in adapter.pairs}, base_dir)
    if locate is not None:
        sources = joined(sources, locate, base_dir)
    return write_model(
        stem, sources, output, base_dir=base_dir, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite,
        workers=workers,
    )  # fmt: skip


def merge_into(
    sources: dict[str, TensorSource],
    adapter: AdapterFile,
    layers: Mapping[str, str],
    base_dir: Path,
    *,
    strength: float = 1.0,
) -> None:
    """Add an adapter to the weights of a base, still unread. In place.

    Args:
        sources: tensors of the base by name.
        layers: the base's layer for every layer of the adapter.
        strength: multiplies the adapter's own.

    Raises:
        CheckpointError: a layer that the base lacks or has of another shape, or an adapter of unknown strength.
    """
    for stored, pair in adapter.pairs.items():
        name = f"{layers[stored]}.weight"
        if name not in sources or sources[name].shape != (pair.up.shape[0], pair.down.shape[1]):
            found = f"its shape there is {sources[name].shape}" if name in sources else "it is not there"
            raise CheckpointError(
                f"{adapter.path}: {name} of {base_dir} cannot take its adapter: {found}.",
                hint=NAME_MODEL,
            )
        sources[name] = merged(sources[name], pair, strength * _scale(adapter, pair))


def open_adapter(checkpoint: Path, weights: Weights = "trained") -> AdapterFile:
    """The adapter of a LoRA checkpoint, or its moving average, once its bytes are those that were saved.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    reader = open_checkpoint(checkpoint)
    trained = read_adapter(checkpoint / "model")
    verify_source(checkpoint, (reader.ema if weights == "ema" else reader.weights).values())
    if weights == "trained":
        return trained
    if not reader.ema:
        raise CheckpointError(f"{checkpoint} holds no moving average of the weights.", hint="Leave out --ema.")
    return AdapterFile(path=trained.path, pairs=pairs_of(reader.ema, checkpoint), config=trained.config)


@dataclass(frozen=True, kw_only=True)
class MergedTensor(TensorSource):
    """W + scale · B·A, or its DoRA form, computed a few rows at a time while it is read."""

    base: TensorSource
    pair: Pair
    scale: float

    def chunks(self, buffer: Array | None = None) -> Iterator[Array]:
        """Float32 elements in order, in pieces of whole rows of at most CHUNK elements."""
        width = self.shape[1]
        rows = max(1, CHUNK // width)
        down, up = _float(self.pair.down), _float(self.pair.up)
        up *= self.scale
        magnitude = None if self.pair.magnitude is None else _float(self.pair.magnitude).reshape(-1, 1)
        read = np.empty(rows * width, STORAGE[self.base.dtype])
        wide = np.empty(rows * width, np.float32)
        start = 0
        for piece in self.base.chunks(read):
            count = len(piece) // width
            stored: Matrix = convert(piece, self.base.dtype, "F32", wide).view(np.float32).reshape(count, width)
            weight = stored + up[start : start + count] @ down
            if magnitude is not None:
                weight *= magnitude[start : start + count] / np.linalg.norm(weight, axis=1, keepdims=True)
            yield weight.reshape(-1)
            start += count


def merged(base: TensorSource, pair: Pair, scale: float) -> MergedTensor:
    """The base's weight with its adapter in it, still unread."""
    return MergedTensor(shape=base.shape, dtype="F32", locate=base.locate, base=base, pair=pair, scale=scale)


Tensors = dict[str, tuple[str, Array]]
"""Name to safetensors dtype and elements, ready to be written."""


def _peft(adapter: AdapterFile, released: Callable[[str], str], dtype: str) -> Tensors:
    return _plain(adapter, PEFT_PREFIX, dtype, folded=False)


def _diffusers(adapter: AdapterFile, released: Callable[[str], str], dtype: str) -> Tensors:
    return _plain(adapter, DIFFUSERS_PREFIX, dtype, folded=True)


def _plain(adapter: AdapterFile, prefix: str, dtype: str, *, folded: bool) -> Tensors:
    tensors: Tensors = {}
    for layer, pair in adapter.pairs.items():
        up = _float(pair.up) * (np.float32(_scale(adapter, pair)) if folded else 1)
        tensors[f"{prefix}{layer}.lora_A.weight"] = _stored(_float(pair.down), dtype)
        tensors[f"{prefix}{layer}.lora_B.weight"] = _stored(up, dtype)
        if pair.magnitude is not None:
            tensors[f"{prefix}{layer}.lora_magnitude_vector"] = _stored(_float(pair.magnitude), dtype)
    return tensors


def _comfyui(adapter: AdapterFile, released: Callable[[str], str], dtype: str) -> Tensors:
    return _kohya(adapter, lambda layer: f"{COMFYUI_PREFIX}{released_layer(layer, released)}", dtype)


def _original(adapter: AdapterFile, released: Callable[[str], str], dtype: str) -> Tensors:
    return _kohya(adapter, lambda layer: "lora_unet__" + released_layer(layer, released).replace(".", "_"), dtype)


def _joined(adapter: AdapterFile, locate: Locate, dtype: str) -> Tensors:
    """B of a joint layer has each part's rows in the columns of that part's rank, and zeros for what is not trained."""
    parts: dict[str, list[tuple[LayerLocation, Pair]]] = {}
    for layer, pair in adapter.pairs.items():
        found = locate(layer)
        if found is None:
            raise ConfigError(
                f"--format comfyui: ComfyUI loads no LoRA for {layer}.", hint="Use --format diffusers, or --merge."
            )
        parts.setdefault(found.name, []).append((found, pair))
    tensors: Tensors = {}
    for name, members in parts.items():
        members.sort(key=lambda member: member[0].first_row)
        ranks = sum(pair.rank for _, pair in members)
        up = np.zeros((members[0][0].rows or members[0][1].up.shape[0], ranks), np.float32)
        column = 0
        for where, pair in members:
            values = _float(pair.up) * np.float32(_scale(adapter, pair))
            for here, there, count in where.spans(len(values)):
                up[there : there + count, column : column + pair.rank] = values[here : here + count]
            column += pair.rank
        down = np.concatenate([_float(pair.down) for _, pair in members])
        tensors[f"{COMFYUI_PREFIX}{name}.alpha"] = ("F32", np.array(ranks, np.float32))
        tensors[f"{COMFYUI_PREFIX}{name}.lora_down.weight"] = _stored(down, dtype)
        tensors[f"{COMFYUI_PREFIX}{name}.lora_up.weight"] = _stored(up, dtype)
    return tensors


def _kohya(adapter: AdapterFile, key: Callable[[str], str], dtype: str) -> Tensors:
    tensors: Tensors = {}
    for layer, pair in adapter.pairs.items():
        name = key(layer)
        alpha = np.array(_scale(adapter, pair) * pair.rank, np.float32)
        tensors[f"{name}.alpha"] = ("F32", alpha)
        tensors[f"{name}.lora_down.weight"] = _stored(_float(pair.down), dtype)
        tensors[f"{name}.lora_up.weight"] = _stored(_float(pair.up), dtype)
    return tensors


_STYLES = {"peft": _peft, "diffusers": _diffusers, "comfyui": _comfyui, "original": _original}


def _scale(adapter: AdapterFile, pair: Pair) -> float:
    scale = adapter.scale(pair)
    if scale is None:
        raise CheckpointError(
            f"{adapter.path} has no {ADAPTER_CONFIG} beside it: its strength is unknown.",
            hint="Use a checkpoint of vfun lora.",
        )
    return scale


def _float(source: TensorSource) -> Matrix:
    return source.read().astype(np.float32)


def _stored(values: Matrix, dtype: str) -> tuple[str, Array]:
    flat = np.ascontiguousarray(values).reshape(-1)
    return dtype, convert(flat, "F32", dtype, np.empty(len(flat), np.float32)).reshape(values.shape)


def _write(folder: Path, file: str, tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, Any]:
    """One safetensors file, read back and compared by hash; the fields of an ExportResult."""
    entries = [Entry(name=name, dtype=dtype, shape=values.shape) for name, (dtype, values) in tensors.items()]
    stem = file.removesuffix(".safetensors")

    def elements(entry: Entry) -> Iterator[Array]:
        yield tensors[entry.name][1].reshape(-1)

    shards = plan_shards(entries, stem, 1 + sum(entry.nbytes for entry in entries))
    stated = {**metadata, **_hashes(tensors)} if metadata else {}
    digests = write_shards(folder, stem, shards, elements, workers=1, done=lambda count: None, metadata=stated)
    _compare(safetensors.read_file(folder / file), tensors, folder / file)
    return {
        "tensors": len(entries),
        "bytes": sum(math.prod(entry.shape) * STORAGE[entry.dtype].itemsize for entry in entries),
        "sha256": content_hash(entries, digests),
        "verified": True,
    }


def _hashes(tensors: Tensors) -> dict[str, str]:
    """sha256 of all that follows the header, as the specification of ``modelspec`` and kohya's tools count it."""
    digest = hashlib.sha256()
    for _, values in tensors.values():
        digest.update(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
    return {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}


def _compare(found: Mapping[str, TensorSource], written: Tensors, path: Path) -> None:
    for name, (_, values) in written.items():
        read = np.concatenate([chunk.copy() for chunk in found[name].chunks()]) if values.size else values.reshape(-1)
        if read.tobytes() != values.tobytes():
            raise CheckpointError(
                f"{path}: {name} reads back otherwise than written.", hint="Check the disk, then export again."
            )
