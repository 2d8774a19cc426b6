"""LoRA files of every origin as pairs of matrices by layer: peft, diffusers, ComfyUI, kohya and the original scripts.

The styles differ in prefix, in the words for the two matrices, in dots or underscores between the parts of a layer's
name, and in where the strength is stated: an ``alpha`` tensor, ``adapter_config.json``, or nowhere.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.naming import LayerLocation
from vfun_cli.checkpoints.tensors import TensorSource, rows_of
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
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"
"""peft's name of the one adapter that a run trains."""
DIFFUSERS_PREFIX = "transformer."
COMFYUI_PREFIX = "diffusion_model."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, COMFYUI_PREFIX, "lora_unet__", "lora_unet_")
"""What the styles put before a layer's name; the longer of two that fit comes first."""

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Key of the safetensors header."""

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
    scaled: bool = False
    """The style says that the update is B·A as it stands (diffusers and ComfyUI without alphas)."""

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
        return 1.0 if self.scaled else None


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
    tensors = safetensors.read_file(file)
    beside = file.parent / ADAPTER_CONFIG
    if file.name != ADAPTER_FILE:
        config = _config_of_diffusers(file)
    else:
        config = read_object(beside, SETTINGS) if beside.is_file() else {}
    return AdapterFile(
        path=file,
        pairs=_with_own_alphas(pairs_of(tensors, file), config),
        config=config,
        scaled=any(name.startswith((DIFFUSERS_PREFIX, COMFYUI_PREFIX)) for name in tensors),
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
    known: dict[str, str] = {}
    for layer in layers:
        for name in (layer, released_layer(layer, released)):
            known.setdefault(name, layer)
            known.setdefault(name.replace(".", "_"), layer)
    lost = [name for name in stored if name not in known]
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} of {len(stored)} adapters are for layers that this model does not have, "
            f"e.g. {lost[0]}.",
            hint="The LoRA belongs to another model.",
        )
    return {name: known[name] for name in stored}


def taken_apart(adapter: AdapterFile, locations: Mapping[str, LayerLocation], rows: Mapping[str, int]) -> AdapterFile:
    """A LoRA of ComfyUI's names by the model's layers, each joint layer as those that it joins.

    Args:
        locations: of the model's layers in ComfyUI.
        rows: of the model's layers.

    Raises:
        CheckpointError: a joint layer of another height.
    """
    members: dict[str, list[str]] = {}
    for layer, location in locations.items():
        for name in (location.name, location.name.replace(".", "_")):
            members.setdefault(name, []).append(layer)
    pairs: dict[str, Pair] = {}
    for stored, pair in adapter.pairs.items():
        for layer in members.get(stored, ()):
            location = locations[layer]
            if location.rows not in (None, pair.up.shape[0]):
                raise CheckpointError(
                    f"{adapter.path}: {stored} has {pair.up.shape[0]} rows, in this model it has {location.rows}.",
                    hint="The LoRA belongs to another model.",
                )
            up = pair.up if location.rows is None else rows_of(pair.up, location.first_row, rows[layer])
            pairs[layer] = replace(pair, up=up)
        if stored not in members:
            pairs[stored] = pair
    return replace(adapter, pairs=pairs)


def released_layer(layer: str, released: Callable[[str], str]) -> str:
    """A layer's released name, from the family's function for parameter names."""
    return released(f"{layer}.weight").removesuffix(".weight")


def _without_prefix(layer: str) -> str:
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer


def _config_of_diffusers(file: Path) -> dict[str, Any]:
    """The part of the header in which diffusers keeps the adapter's configuration; without it, diffusers takes 1."""
    stated = safetensors.read_metadata(file).get(DIFFUSERS_METADATA)
    if stated is None:
        return {}
    where = f"{file}: its {DIFFUSERS_METADATA}"
    content = parse_object(stated, where)
    config = {
        name.removeprefix(DIFFUSERS_PREFIX): value
        for name, value in content.items()
        if name.startswith(DIFFUSERS_PREFIX)
    }
    if config:
        check_fields(config, SETTINGS, where)
    return config
