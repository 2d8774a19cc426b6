"""From a source to the model that makes videos: the base's weights, what was trained in their places, LoRAs added.

Every weight goes from its file to the device before the next one is read, so that the host never holds the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.export import Weights, read_base, replace_tensors, trained_weights
from vfun_cli.checkpoints.lora_export import merge_into, open_adapter
from vfun_cli.checkpoints.lora_files import AdapterFile, read_adapter
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.checkpoints.tensors import TensorSource, read_float32
from vfun_cli.config.network import matched
from vfun_cli.errors import CheckpointError
from vfun_cli.families import adapter_of, detect
from vfun_cli.families.given import in_own_names, require_given, transformer_tensors
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter
from vfun_cli.modeling.encoders.placement import encoder_dtype, freeze
from vfun_cli.modeling.lazy_weights import LazyWeights, replace_parameter
from vfun_cli.modeling.weights import read_json
from vfun_cli.sampling.source import Full, Lora, Source


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where a model is used, and in which type."""

    device: torch.device
    compute_dtype: torch.dtype = torch.bfloat16
    """Of the transformer; encoders compute in it too, except on a CPU."""
    vae_mini_batch: int = 1
    low_vram: bool = False
    """Encoders are on the device only while they encode."""


def load_model(source: Source, options: LoadOptions) -> ModelAdapter:
    """The model with the source's weights: frozen, in eval mode, its transformer on the device.

    Raises:
        CheckpointError: weights that are damaged or do not fit the model; names them.
        ConfigError: the model is another family's, or of another train mode.
    """
    adapter, place = open_model(source, options)
    place()
    return adapter


def open_model(source: Source, options: LoadOptions) -> tuple[ModelAdapter, Callable[[], None]]:
    """The same with the transformer's weights still in their files, and what brings them to the device.

    Until then the encoders have the device to themselves.

    Raises:
        CheckpointError: as ``load_model``, of headers; what is found only when the weights are read comes later.
        ConfigError: as ``load_model``.
    """
    changed = changed_weights(source)  # first: it reads headers alone, and says what does not fit
    lazy = LazyWeights()
    with lazy.transformer():
        adapter = adapter_of(source.spec).from_pretrained(adapter_options(source, options))

    def place() -> None:
        _place(adapter.transformer, lazy, changed, options)
        freeze(adapter.transformer)

    return adapter, place


def adapter_options(source: Source, options: LoadOptions) -> AdapterOptions:
    """What the family's adapter needs to know.

    Raises:
        CheckpointError: the model's configuration cannot be read.
    """
    stated = read_json(source.model / source.spec.model.config_file)
    return AdapterOptions(
        model_dir=source.model,
        given=source.given,
        compute_dtype=encoder_dtype(options.compute_dtype, options.device),
        device=options.device,
        vae_mini_batch=options.vae_mini_batch,
        low_vram=options.low_vram,
        train_mode=source.train_mode,
        model_settings={name: stated.get(name) for name in source.spec.model.input_settings},
    )


def changed_weights(source: Source) -> dict[str, TensorSource]:
    """The weights that are not the model's own, by the transformer's names, still unread.

    Raises:
        CheckpointError: they do not fit the model, or a file is damaged.
    """
    spec, folder = source.spec, source.spec.model.transformer_dir(source.model)
    require_given(spec, source.model, source.given)
    if source.given.transformer is None:
        base = {spec.export.parameter(name): tensor for name, tensor in read_base(folder)[1].items()}
    else:
        base = transformer_tensors(spec, source.model, source.given.transformer)
    tensors, weights = dict(base), _WEIGHTS[source.ema]
    if source.full is not None:
        released = source.full.released
        own = {name: tensor.shape for name, tensor in base.items()}
        found = in_own_names(spec, source.model, _opened(source.full, weights), own)
        replace_tensors(tensors, found, lambda name: spec.export.parameter(released(name)), source.full.path, folder)
    linear = {name.removesuffix(".weight"): each.shape for name, each in tensors.items() if _is_linear(name, each)}
    for lora in source.loras:
        dims = detect.read_dims(spec, source.model)
        adapter, layers = matched(_opened_lora(lora, weights), linear, spec, dims)
        merge_into(tensors, adapter, layers, folder, strength=1.0 if lora.strength is None else lora.strength)
    return {name: tensor for name, tensor in tensors.items() if tensor is not base[name]}


_WEIGHTS: Mapping[bool, Weights] = {False: "trained", True: "ema"}


def _is_linear(name: str, tensor: TensorSource) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2


def _opened(full: Full, weights: Weights) -> Mapping[str, TensorSource]:
    if full.is_checkpoint:
        return trained_weights(full.path, weights)
    return safetensors.read_file(full.path) if full.path.is_file() else read_base(full.path)[1]


def _opened_lora(lora: Lora, weights: Weights) -> AdapterFile:
    """A LoRA whose strength is known.

    Raises:
        CheckpointError: it is damaged or none, or it is unknown how strong it is.
    """
    if (lora.path / STATE_FILE).is_file():
        return open_adapter(lora.path, weights)
    adapter = read_adapter(lora.path)
    if lora.strength is None and None in adapter.scales:
        raise CheckpointError(
            f"{adapter.path} does not state its strength, neither by alphas nor by an adapter_config.json beside it.",
            hint="Say it with --lora-strength: alpha / rank of its training, 1 where the two were equal.",
        )
    known = 1.0 if adapter.layout.strength is None else adapter.layout.strength
    return replace(adapter, layout=replace(adapter.layout, strength=known))


def _place(
    transformer: nn.Module, lazy: LazyWeights, changed: Mapping[str, TensorSource], options: LoadOptions
) -> None:
    """Read each weight from where it lies to the device, in the compute dtype."""
    device, dtype = options.device, options.compute_dtype
    lazy.to_meta(transformer)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, tensor in changed.items():
        value = torch.from_numpy(read_float32(tensor)).to(device)
        replace_parameter(transformer, name, nn.Parameter(value.to(dtype), requires_grad=False))
    for _ in lazy.placed(transformer, device):
        pass
    transformer.to(device)  # the buffers
