"""LoRA: adapters put into a transformer, filled from an existing LoRA, and collected into a checkpoint.

All that ``vfun lora`` does otherwise than ``vfun train`` is here.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vfun_cli.checkpoints.lora_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    peft_key,
    read_adapter,
)
from vfun_cli.checkpoints.naming import by_parameter
from vfun_cli.checkpoints.tensors import TensorSource
from vfun_cli.config.network import start_of
from vfun_cli.config.options import RunConfig
from vfun_cli.config.trainable import choose_layers
from vfun_cli.errors import CheckpointError
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights
from vfun_cli.modeling.tensor_files import save_tensors
from vfun_cli.modeling.weights import read_safetensors
from vfun_cli.training.state.formats import EMA_FILE, OPTIMIZER_FILE, CheckpointFormat, counted_in
from vfun_cli.training.state.gather import collect, collect_average, restore
from vfun_cli.training.state.live import TrainedState, trained_parameters


def add_adapters(
    transformer: nn.Module, config: RunConfig, spec: FamilySpec, dims: ModelDims, lazy: LazyWeights = NOT_LAZY
) -> list[str]:
    """Freeze the transformer and give the layers that ``target_name`` chooses an adapter, but those of
    ``lora_skip_name``; their names.

    A starts uniform (Kaiming, a = sqrt 5) from the run's seed, B zero. Everything is in the transformer's dtype.

    Raises:
        ConfigError: a target that matches no layer, or a part to skip that is in no layer's name.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    released = spec.export.names["same"]
    idle = spec.model.modules_without_gradient(dims)
    layers = choose_layers(linear, config.target_name, released, idle, config.lora_skip_name)
    alpha = int(config.network_alpha) if config.network_alpha.is_integer() else config.network_alpha
    transformer.requires_grad_(False)
    torch.manual_seed(config.seed)  # the same A whatever was drawn while the model was loaded
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # peft says int, a fraction works as well
        target_modules=layers,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        base_model_name_or_path=str(config.transformer_path or config.pretrained_model_name_or_path),
    )
    inject_adapter_in_model(peft_config, transformer, ADAPTER)
    adapted = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    other = sorted(adapted.keys() ^ set(layers))
    assert not other, f"peft and the chosen layers differ in {other[:5]}"
    if config.use_dora and lazy.stored:
        for module in adapted.values():
            _recompute_magnitudes(module, lazy)
    return layers


def _recompute_magnitudes(module: Any, lazy: LazyWeights) -> None:
    """DoRA's magnitudes again: peft took them from placeholders, before the weights were read."""
    with lazy.materialized(module.get_base_layer(), torch.device("cpu")):
        module.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[ADAPTER].weight,
            lora_B=module.lora_B[ADAPTER].weight,
            scaling=module.scaling[ADAPTER],
        )


def load_network(transformer: nn.Module, path: Path, config: RunConfig, spec: FamilySpec, dims: ModelDims) -> None:
    """Start the adapters from an existing LoRA of any style; layers it has none for start fresh.

    A file of another strength is scaled, in B, so that the model starts from the same predictions. A file of which
    nobody can tell the strength is taken to be of this run's, as the original scripts take it. Adapters of layers that
    never get a gradient have no effect, and are left out with a notice.

    Raises:
        CheckpointError: it does not fit the model.
        ConfigError: it holds adapters for layers that this run trains none in, or of another rank.
    """
    start = start_of(read_adapter(path), _every_linear(transformer), config, spec, dims)
    if start.idle:
        print(
            f"warning: {path} has adapters for {len(start.idle)} layers without any effect in this model, "
            f"e.g. {start.idle[0]}; they are left out",
            file=sys.stderr,
            flush=True,
        )
    for layer, pair in start.pairs.items():
        module: Any = transformer.get_submodule(layer)
        _set_weight(module.lora_A[ADAPTER].weight, pair.down)
        _set_weight(module.lora_B[ADAPTER].weight, pair.up, start.factors[layer])
        if pair.magnitude is not None:
            _set_weight(module.lora_magnitude_vector[ADAPTER].weight, pair.magnitude)


def _every_linear(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """All linear layers of the model as it was before the injection, [out, in]."""
    found = ((name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in found
        if ".lora_" not in name
    }


@torch.no_grad()
def _set_weight(parameter: nn.Parameter, source: TensorSource, factor: float = 1.0) -> None:
    parameter.copy_(torch.from_numpy(source.read()).float() * factor)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def save_adapter(state: TrainedState, folder: Path) -> None:
    """The gathered adapter as peft stores it, in float32, the moments and the average; the same files for every
    strategy.
    """
    weights, moments = collect(state)
    average = None if state.average is None else collect_average(state)
    if not state.accelerator.is_main_process:
        return
    setting = cast(Any, state.transformer).peft_config[ADAPTER].to_dict()
    save_tensors({peft_key(name): value.contiguous() for name, value in weights.items()}, folder / ADAPTER_FILE)
    save_tensors(moments, folder / OPTIMIZER_FILE)
    if average is not None:
        save_tensors(average, folder / EMA_FILE)
    content = {name: setting[name] for name in _KEPT_SETTINGS} | {"inference_mode": True}
    text = json.dumps(content, indent=2, default=sorted)  # peft keeps names in sets
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def load_adapter(state: TrainedState, folder: Path) -> None:
    """Put a saved adapter and its optimizer back, under whatever strategy.

    Raises:
        CheckpointError: the checkpoint has other adapters than this run.
    """
    stored, moments = (dict(read_safetensors([folder / file])) for file in (ADAPTER_FILE, OPTIMIZER_FILE))
    names = list(trained_parameters(state))
    _require_same({peft_key(name) for name in names}, stored, folder)
    weights = {name: stored[peft_key(name)] for name in names}
    restore(state, weights, by_parameter(moments, names), counted_in(moments))


_KEPT_SETTINGS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "target_modules",
)
"""What defines the adapter. Versions of peft stop at, or warn of, settings that they do not know."""

ADAPTER_FORMAT = CheckpointFormat(save_adapter, load_adapter)
"""How a LoRA run's checkpoints hold its state."""


def _require_same(expected: Collection[str], stored: dict[str, Tensor], folder: Path) -> None:
    other = sorted(set(expected) ^ stored.keys())
    if other:
        raise CheckpointError(
            f"{folder} does not hold the adapters this run trains: {len(other)} differ, e.g. {other[0]}.",
            hint="Resume with the --target-name, --use-dora and model of the run that wrote it.",
        )
