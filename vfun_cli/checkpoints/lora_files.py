"""LoRA files of every origin as pairs of matrices by layer: peft, diffusers, ComfyUI, kohya and the original scripts.

The styles differ in prefix, in the words for the two matrices, in dots or underscores between the parts of a layer's
name, and in where the strength is stated: an ``alpha`` tensor, ``adapter_config.json``, or nowhere.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.joint import taken
from vfun_cli.checkpoints.lora_layouts import ANY, DIFFUSERS_METADATA, FINETRAINERS_METADATA, Layout, layout_of
from vfun_cli.checkpoints.naming import LayerLocation
from vfun_cli.checkpoints.tensors import Joined, TensorSource, elements_of, held, read_float32, rows_of
from vfun_cli.errors import CheckpointError
from vfun_cli.typed_json import (
    Check,
    check_fields,
    flag,
    mapping,
    number,
    optional,
    parse_object,
    read_object,
    shown,
)

ADAPTER_FILE = "adapter_model.safetensors"
AVERAGE_FILE = "ema.safetensors"
"""Beside the adapter in a checkpoint: its moving average."""
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"
"""peft's name of the one adapter that a run trains."""
DIFFUSERS_PREFIX = "transformer."
COMFYUI_PREFIX = "diffusion_model."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, COMFYUI_PREFIX, "lora_unet__", "lora_unet_")
"""What the styles put before a layer's name; the longer of two that fit comes first."""

IN_HEADER = {DIFFUSERS_METADATA: DIFFUSERS_PREFIX, FINETRAINERS_METADATA: ""}
"""Where programs put a configuration of peft into the header, and what its settings begin with there."""

_ALPHA = number(-1e6, 1e6)


def _ending(name: str, value: Any) -> None:
    """peft takes regular expressions, with which a file of a few bytes can keep a reader busy for years."""
    if _PLAIN_ENDING.fullmatch(value) is None:
        raise ValueError(f"{name} is {shown(value)}, a regular expression; it takes names of layers and their endings")


_PLAIN_ENDING = re.compile(r"\^?(?P<name>(?:\w|-|\\?\.){1,1000})\$?")

SETTINGS: Mapping[str, Check] = {
    "lora_alpha": _ALPHA,
    "use_rslora": optional(flag),
    "alpha_pattern": optional(mapping(_ALPHA, _ending)),
}
"""What vfun reads of ``adapter_config.json``."""

TEXT_ENCODER = "lora_te"
"""Keys of adapters for a text encoder, which vfun does not train."""


def peft_key(name: str) -> str:
    """peft's key of a parameter: without the adapter's name, and DoRA's vector without ``.weight``."""
    key = PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector." in key else key


_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down)(?:\.default)?\.weight|"
    r"(?P<up>lora_B|lora_up)(?:\.default)?\.weight|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?|"
    r"(?P<alpha>alpha))"
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The adapter of one layer."""

    down: TensorSource
    """A, [rank, in]."""
    up: TensorSource
    """B, [out, rank]."""
    alpha: float | None = None
    """The layer's own ``alpha`` tensor."""
    magnitude: TensorSource | None = None
    """DoRA's length of each output row, [out]."""
    joint: bool = False
    """Of a file that joins several layers into one: A serves them all."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A LoRA as it lies on disk."""

    path: Path
    pairs: Mapping[str, Pair]
    """By layer name as stored, without the style's prefix; kohya's has ``_`` where the module has ``.``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """``adapter_config.json``, or what diffusers writes of it into the file's header; empty where there is neither."""
    stated_in: str = ADAPTER_CONFIG
    """Where that was."""
    layout: Layout = ANY

    @property
    def ranks(self) -> set[int]:
        """The ranks that occur."""
        return {pair.rank for pair in self.pairs.values()}

    def scale(self, pair: Pair) -> float | None:
        """What B·A is multiplied by; None if neither the file nor its configuration says so."""
        if pair.alpha is not None:
            return pair.alpha / pair.rank
        if self.config:
            return strength(float(self.config["lora_alpha"]), pair.rank, rslora=bool(self.config.get("use_rslora")))
        return self.layout.strength

    @property
    def scales(self) -> list[float | None]:
        """The factors that occur, in order; None last."""
        found = {self.scale(pair) for pair in self.pairs.values()}
        return sorted(found, key=lambda scale: math.inf if scale is None else scale)

    def told_strength(self) -> str:
        """Of which program the file seems to be, how strong it is then, and why, for people."""
        taken = " and ".join("not stated" if scale is None else f"{scale:g}" for scale in self.scales)
        if self.config:
            why = f", as {self.stated_in} states"
        elif any(pair.alpha is not None for pair in self.pairs.values()):
            why = ", as its alphas state"
        else:
            why = f", {self.layout.because}" if self.layout.because else ""
        return f"{self.path} is taken for a file of {self.layout.trainer}: strength {taken}{why}."


def strength(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor of B·A: alpha / rank, and alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def holds_adapter(path: Path) -> bool:
    """Whether a file or folder is a LoRA, by the names of its tensors.

    Raises:
        CheckpointError: the file is damaged.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    names = (name for file in files for name in safetensors.read_file(file))
    return any((found := _KEY.fullmatch(name)) and (found["down"] or found["up"]) for name in names)


def find_adapter(path: Path) -> Path:
    """The LoRA file that a path means: itself, or the one in a directory or checkpoint.

    Raises:
        CheckpointError: there is none, or several.
    """
    if path.is_file():
        return path
    for known in (path / "model" / ADAPTER_FILE, path / ADAPTER_FILE):
        if known.is_file():
            return known
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{path} is no LoRA: {f'it holds {len(found)} .safetensors files' if found else 'no .safetensors is there'}.",
        hint="Name the file, a checkpoint of vfun lora, or a directory with adapter_model.safetensors.",
    )


def read_adapter(path: Path) -> AdapterFile:
    """Open a LoRA of any style.

    Raises:
        CheckpointError: a damaged file, half a pair, or tensors that belong to no LoRA.
    """
    file = find_adapter(path)
    tensors, header = safetensors.read_file(file), safetensors.read_metadata(file)
    beside = file.parent / ADAPTER_CONFIG
    if file.name in (ADAPTER_FILE, AVERAGE_FILE) and beside.is_file():
        config, stated_in = read_object(beside, SETTINGS), ADAPTER_CONFIG
    else:
        config, stated_in = _config_in_header(file, header)
    return AdapterFile(
        path=file,
        pairs=_with_own_alphas(pairs_of(tensors, file), config),
        config=config,
        stated_in=stated_in,
        layout=layout_of(tensors, header),
    )


def _with_own_alphas(pairs: Mapping[str, Pair], config: Mapping[str, Any]) -> dict[str, Pair]:
    """peft's ``alpha_pattern``: layers, by the ending of their name, of another alpha than the rest."""
    own: dict[str, Pair] = {}
    stated: Mapping[str, float] = config.get("alpha_pattern") or {}
    for layer, pair in pairs.items():
        alpha = next((float(value) for ending, value in stated.items() if _ends_in(layer, ending)), None)
        if alpha is None or pair.alpha is not None:
            own[layer] = pair
        else:  # as the alpha of a pair counts: by its rank
            factor = strength(alpha, pair.rank, rslora=bool(config.get("use_rslora")))
            own[layer] = replace(pair, alpha=factor * pair.rank)
    return own


def _ends_in(layer: str, ending: str) -> bool:
    """Whether a layer is meant by a key of ``alpha_pattern``: whole parts at its end, or all of it behind a ``^``."""
    name = ending.strip("^$").replace("\\", "")
    return layer == name or (layer.endswith(f".{name}") and not ending.startswith("^"))


def pairs_of(tensors: Mapping[str, TensorSource], where: Path) -> dict[str, Pair]:
    """Tensors by key, of any style, as pairs by layer.

    Raises:
        CheckpointError: half a pair, or tensors that belong to no LoRA.
    """
    layers: dict[str, dict[str, Any]] = {}
    unknown = []
    for name, source in tensors.items():
        if name.startswith(TEXT_ENCODER):
            continue
        found = _KEY.fullmatch(name)
        if found is None:
            unknown.append(name)
            continue
        part = next(word for word in ("down", "up", "magnitude", "alpha") if found[word])
        layers.setdefault(_without_prefix(found["layer"]), {})[part] = (
            _alpha(source, name, where) if part == "alpha" else source
        )
    if unknown or not layers:
        raise CheckpointError(
            f"{where} is no LoRA that can be read: {len(unknown)} of {len(tensors)} tensors have other names"
            f"{', e.g. ' + unknown[0] if unknown else ''}.",
            hint="LoRA keys end in lora_A/lora_B.weight or lora_down/lora_up.weight.",
        )
    try:
        pairs = {layer: Pair(**parts) for layer, parts in layers.items()}
    except TypeError:
        half = next(layer for layer, parts in layers.items() if not {"down", "up"} <= parts.keys())
        raise CheckpointError(f"{where}: {half} has only one of its two matrices; the file is incomplete.") from None
    for layer, pair in pairs.items():
        if len(pair.down.shape) != 2 or len(pair.up.shape) != 2 or pair.up.shape[1] != pair.rank or not pair.rank:
            raise CheckpointError(
                f"{where}: {layer} has matrices of shapes {pair.down.shape} and {pair.up.shape}, which do not multiply."
            )
    return pairs


def _alpha(source: TensorSource, name: str, where: Path) -> float:
    if source.numel != 1:
        raise CheckpointError(f"{where}: {name} has the shape {list(source.shape)}; it takes one number.")
    value = float(source.read().item())
    check_fields({name: value}, {name: _ALPHA}, str(where))
    return value


def match_layers(
    stored: Collection[str], layers: Collection[str], released: Callable[[str], str], where: Path
) -> dict[str, str]:
    """The model's layer for every stored name, which may be the model's, the released one, or either with ``_``.

    Raises:
        CheckpointError: layers that the model does not have; it names one.
    """
    known = names_of(layers, released)
    lost = [name for name in stored if name not in known]
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} of {len(stored)} adapters are for layers that this model does not have, "
            f"e.g. {lost[0]}.",
            hint="The LoRA belongs to another model.",
        )
    return {name: known[name] for name in stored}


def names_of(layers: Collection[str], released: Callable[[str], str]) -> dict[str, str]:
    """The layer that each name means: the model's, the released one, or either with ``_``."""
    known: dict[str, str] = {}
    for layer in layers:
        for name in (layer, released_layer(layer, released)):
            known.setdefault(name, layer)
            known.setdefault(name.replace(".", "_"), layer)
    return known


def taken_apart(
    adapter: AdapterFile, locations: Iterable[tuple[str, LayerLocation]], rows: Mapping[str, int]
) -> AdapterFile:
    """A LoRA of ComfyUI's or the first release's names by the model's layers, each joint layer as those that it joins.

    The update of a part is its rows of B times the whole A, to the bit. A joint layer of another height than this
    model's stays whole, under the names of its parts, which it does not fit.

    Args:
        locations: of the model's layers there; a layer may have several.
        rows: of the model's layers.
    """
    members: dict[str, dict[str, LayerLocation]] = {}
    for layer, location in locations:
        for name in (location.name, location.name.replace(".", "_")):
            members.setdefault(name, {})[layer] = location
    pairs: dict[str, Pair] = {}
    for stored, pair in adapter.pairs.items():
        if stored not in members:
            pairs[stored] = pair
        for layer, location in members.get(stored, {}).items():
            pairs[layer] = _part(pair, location, rows[layer]) if location.rows == pair.up.shape[0] else pair
    return replace(adapter, pairs=pairs)


def _part(pair: Pair, location: LayerLocation, count: int) -> Pair:
    """The rows of one layer of a joint one."""
    spans = location.spans(count)
    length = None if pair.magnitude is None else [elements_of(pair.magnitude, there, rows) for _, there, rows in spans]
    return replace(
        pair,
        up=taken(pair.up, spans),
        magnitude=None if length is None else Joined.of(length, (count,)),
        joint=count != location.rows,
    )


def at_rank(pair: Pair, rank: int) -> Pair | None:
    """A part of a joint layer with the directions alone that it uses, where those are one block of ``rank``.

    So our own export joins layers: each part's B is zero outside the columns of its own A. Reads B.

    Returns:
        The part at that rank; one without an update has rank 0. None: it uses directions of several blocks.
    """
    if not pair.joint or pair.rank % rank:
        return None
    up = read_float32(pair.up)
    used = [first for first in range(0, pair.rank, rank) if up[:, first : first + rank].any()]
    if len(used) > 1:
        return None
    first, count = (used[0], rank) if used else (0, 0)
    columns = np.ascontiguousarray(up[:, first : first + count])
    return replace(pair, down=rows_of(pair.down, first, count), up=held(columns), joint=False)


def released_layer(layer: str, released: Callable[[str], str]) -> str:
    """A layer's released name, from the family's function for parameter names."""
    return released(f"{layer}.weight").removesuffix(".weight")


def _without_prefix(layer: str) -> str:
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer


def _config_in_header(file: Path, header: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The adapter's configuration, where a program put it into the header, and under which key; else nothing.

    Raises:
        CheckpointError: it is damaged.
    """
    for key, prefix in IN_HEADER.items():
        if key not in header:
            continue
        where = f"{file}: its {key}"
        content = parse_object(header[key], where)
        config = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        if config:
            check_fields(config, SETTINGS, where)
            return config, f"{key} in its header"
    return {}, ""
