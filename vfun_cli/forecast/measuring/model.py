"""A model without weights, made ready to be trained as a run makes it; and what weights it has."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.config.trainable import choose, choose_layers, inside
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.gpu import DEVICE
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter
from vfun_cli.modeling.lazy_weights import NOT_LAZY
from vfun_cli.training.blocks import find_layers
from vfun_cli.training.model import choose_weights, prepare_blocks
from vfun_cli.training.optim import slow_names
from vfun_cli.training.precision import compute_dtype, kept_dtype
from vfun_cli.training.quantised import quantise_layers
from vfun_cli.training.streaming import Moved, bytes_moved


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    block: str = ""
    """Name of the transformer block, or other unit of FSDP's, that it is in; none: it lies outside of them."""
    slow: bool = False
    """Whether it trains at a lower rate than others, which makes a parameter group of it and its like."""
    itemsize: int | None = None
    """Bytes of a number of a quantised weight, which every strategy keeps so; None: what the strategy decides."""

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def weights_of(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any], *, lora: bool) -> list[Weight]:
    """All weights of the model that ``stated`` (its ``config.json``) describes, adapters included.

    Raises:
        ConfigError: options that choose nothing.
        CheckpointError: no model can be made of the configuration.
    """
    transformer = _blank_adapter(spec, config, stated).transformer
    released, idle = spec.export.names["same"], spec.model.modules_without_gradient(spec.model.read_dims(stated))
    names = [name for name, _ in transformer.named_parameters()]
    classes = spec.model.gathered_classes
    blocks = [name for name, module in transformer.named_modules() if type(module).__name__ in classes]
    trained = set() if lora else set(choose(config.trained_modules, names, released, idle).names)
    slow = slow_names(config, trained, released)
    adapters = _adapters(config, transformer, released, idle) if lora else []
    transformer.requires_grad_(False)
    if config.base_precision != "bf16":
        quantise_layers(transformer, config.base_precision, DEVICE)
    quantised = {f"{name}." for name, module in transformer.named_modules() if hasattr(module, "codes")}
    own = [
        Weight(
            name=name, shape=tuple(weight.shape), trained=name in trained, slow=name in slow,
            itemsize=weight.itemsize if f"{name.rpartition('.')[0]}." in quantised and "bias" not in name else None,
        )
        for name, weight in transformer.named_parameters()
    ]  # fmt: skip
    return [
        replace(weight, block=next((block for block in blocks if weight.name.startswith(f"{block}.")), ""))
        for weight in own + adapters
    ]


def _adapters(config: RunConfig, transformer: nn.Module, released: Any, idle: Sequence[str]) -> list[Weight]:
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    found = []
    for name in choose_layers(list(linear), config.target_name, released, idle, config.lora_skip_name):
        rows, columns = linear[name].out_features, linear[name].in_features
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (config.rank, columns), "lora_B": (rows, config.rank)}
        if config.use_dora:
            shapes["lora_magnitude_vector"] = (rows,)
        found += [Weight(name=f"{name}.{part}", shape=shape, trained=True) for part, shape in shapes.items()]
    return found


def layers_alike(spec: FamilySpec, stated: Mapping[str, Any], weights: Sequence[Weight]) -> bool:
    """Whether of all layers of a list the same weights train, but for those that never get a gradient."""
    idle = set(
        inside([weight.name for weight in weights], spec.model.modules_without_gradient(spec.model.read_dims(stated)))
    )
    trained = defaultdict[str, set[bool]](set)
    for weight in weights:
        if weight.name not in idle:
            trained[re.sub(r"\.\d+\.", ".#.", weight.name)].add(weight.trained)
    return all(len(answers) == 1 for answers in trained.values())


def blank_model(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any], *, lora: bool) -> ModelAdapter:
    """The model that ``stated`` (its ``config.json``) describes, with what the options choose to train.

    Weights have the types in which the forward pass finds them on a rank that has gathered them.

    Raises:
        ConfigError: options that choose nothing.
        CheckpointError: no model can be made of the configuration.
    """
    adapter = _blank_adapter(spec, config, stated)
    transformer = adapter.transformer
    plan: Any = SimpleNamespace(spec=spec, dims=spec.model.read_dims(stated))
    with DEVICE:  # peft makes adapters on the processor, which draws 170 M numbers for Wan-S2V's of few layers
        choose_weights(config, plan, transformer, NOT_LAZY, lora=lora, fresh=False)
    prepare_blocks(config, plan, transformer)
    whole = STRATEGIES[config.strategy].whole_weights
    for weight in transformer.parameters():
        weight.data = weight.data.to(kept_dtype(config, trained=weight.requires_grad and whole))
    if config.base_precision != "bf16":
        quantise_layers(transformer, config.base_precision, DEVICE)
    transformer.train()
    return adapter


def moved_by_streaming(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any]) -> Moved:
    """What ``--stream-blocks`` keeps on the host; nothing without it."""
    if config.stream_blocks is None:
        return Moved(host=0, ring=0)
    transformer = _blank_adapter(spec, config, stated).transformer.requires_grad_(False)
    for weight in transformer.parameters():
        weight.data = weight.data.to(compute_dtype(config))
    blocks = find_layers(transformer, spec.model.block_classes)
    return bytes_moved(blocks, config.stream_blocks, config.base_precision, DEVICE)


def blank_options(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any]) -> AdapterOptions:
    """What an adapter on the made-up GPU is told, of no model directory."""
    return AdapterOptions(
        model_dir=Path(),
        compute_dtype=compute_dtype(config),
        device=DEVICE,
        train_mode=config.train_mode,
        control_ref_image=config.control_ref_image,
        vae_mini_batch=config.vae_mini_batch,
        model_settings={name: stated.get(name) for name in spec.model.input_settings},
    )


def _blank_adapter(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any]) -> ModelAdapter:
    adapter = adapter_of(spec).blank(stated, blank_options(spec, config, stated))
    adapter.transformer.to(DEVICE)
    return adapter
