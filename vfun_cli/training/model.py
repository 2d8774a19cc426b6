"""From a configuration to the model that is trained: loaded, made trainable, wrapped by the strategy."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn

from vfun_cli.config import optimizers
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter
from vfun_cli.modeling.encoders.placement import encoder_dtype
from vfun_cli.modeling.encoders.sharding import EncoderSharding, ranks_here
from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights, load_shards
from vfun_cli.modeling.weights import read_json
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.training.blocks import checkpoint_blocks, compile_blocks, find_blocks, find_layers
from vfun_cli.training.lora import add_adapters, load_network
from vfun_cli.training.optim import choose_trainable, make_optimizer, slow_names, trainable
from vfun_cli.training.precision import compute_dtype, kept_dtype, use_in
from vfun_cli.training.quantised import quantise_layers
from vfun_cli.training.state.ema import WeightAverage
from vfun_cli.training.state.live import TrainedState, master_weights
from vfun_cli.training.strategy import assert_accumulation, assert_shards, assert_strategy, prefetch_blocks
from vfun_cli.training.streaming import stream_blocks
from vfun_cli.training.waiting import wait_for_all


def adapter_options(config: RunConfig, spec: FamilySpec, device: torch.device) -> AdapterOptions:
    """The part of the configuration that the family's adapter sees, and the model's own settings that it asks for.

    Raises:
        CheckpointError: the model's configuration cannot be read.
    """
    assert config.pretrained_model_name_or_path is not None
    stated = read_json(config.pretrained_model_name_or_path / spec.model.config_file)
    return AdapterOptions(
        model_dir=config.pretrained_model_name_or_path,
        given=config.given_weights,
        compute_dtype=encoder_dtype(compute_dtype(config), device),
        device=device,
        vae_mini_batch=config.vae_mini_batch,
        low_vram=config.low_vram,
        train_mode=config.train_mode,
        control_ref_image=config.control_ref_image,
        caption_dropout=config.caption_dropout,
        guidance_scale=config.guidance_scale,
        model_settings={name: stated.get(name) for name in spec.model.input_settings},
    )


def load_adapter(spec: FamilySpec, options: AdapterOptions) -> tuple[ModelAdapter, LazyWeights]:
    """The family's model, none of its encoders loaded yet.

    The transformer's parameters are placeholders; the second value knows what they stand for.

    Raises:
        CheckpointError: the model's files are missing or do not fit.
    """
    lazy = LazyWeights()
    with lazy.transformer():
        adapter = adapter_of(spec).from_pretrained(options)
    return adapter, lazy


def share_encoders(config: RunConfig, adapter: ModelAdapter, accelerator: Accelerator) -> None:
    """Let the ranks of a machine share the large encoders, where the strategy does that; all ranks together."""
    if STRATEGIES[config.strategy].shares_encoders and ranks_here() > 1:
        adapter.encoders.shard_over(EncoderSharding.within_a_machine(accelerator.device))


def choose_weights(
    config: RunConfig, plan: RunPlan, transformer: nn.Module, lazy: LazyWeights, *, lora: bool, fresh: bool
) -> None:
    """Decide what trains: adapters that are put in, or the parts of the model that were named.

    Args:
        fresh: no checkpoint will be loaded; adapters start from the LoRA that ``network_path`` names, if it does.

    Raises:
        CheckpointError: the LoRA to start from does not fit.
        ConfigError: a name that matches nothing in this model.
    """
    spec, dims = plan.spec, plan.dims
    if not lora:
        without_gradient = spec.model.modules_without_gradient(dims)
        choose_trainable(transformer, config.trained_modules, without_gradient, spec.export.names["same"])
        return
    add_adapters(transformer, config, spec, dims, lazy)
    if config.network_path is not None and fresh:
        load_network(transformer, config.network_path, config, spec, dims)


def prepare_blocks(config: RunConfig, plan: RunPlan, transformer: nn.Module) -> None:
    """Weights as copies where the strategy makes none, then recomputation and compilation of the transformer's blocks.

    Raises:
        EnvironmentFault: no compiler where one is needed.
    """
    model = plan.spec.model
    copies = STRATEGIES[config.strategy].whole_weights
    if copies and not config.compile:
        use_in(compute_dtype(config), transformer)
    checkpoint_blocks(
        transformer, model.block_classes, config.gradient_checkpointing, compiled=config.compile,
        injections=model.injection_classes, offload=config.activation_offload,
    )  # fmt: skip
    if config.compile:
        if copies:  # around what is computed again, because a compiler cannot trace them inside
            use_in(compute_dtype(config), transformer)
        compile_blocks(transformer, model.block_classes)


def prepare_state(
    config: RunConfig, spec: FamilySpec, adapter: ModelAdapter, accelerator: Any, lazy: LazyWeights = NOT_LAZY
) -> TrainedState:
    """Read the weights to where they live, and let the strategy wrap the transformer and the optimizer."""
    transformer, strategy = adapter.transformer, STRATEGIES[config.strategy]
    lazy.to_meta(transformer)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(kept_dtype(config, trained=parameter.requires_grad))
    if config.stream_blocks is not None:
        _stream(config, spec, transformer, accelerator, lazy)
    if config.base_precision != "bf16":
        quantise_layers(transformer, config.base_precision, accelerator.device, lazy)
    transformer.train()
    blocks = find_blocks(transformer, spec.model.block_classes)
    slow = slow_names(config, trainable(transformer), spec.export.names["same"])
    make = partial(make_optimizer, config=config, device=accelerator.device, slow=slow)
    # Before anything is wrapped: afterwards a rank may have parts of parameters.
    shapes = [tuple(parameter.shape) for parameter in trainable(transformer).values()]
    model, optimizer = _WRAP[strategy.gathers](make, transformer, accelerator, lazy)
    assert_strategy(config.strategy, model)
    assert_shards(config, model)
    assert_accumulation(config, model)
    if config.fsdp_prefetch:
        prefetch_blocks(blocks, config.fsdp_prefetch)
    lazy.stored.clear()  # all is read: the files need not be mapped any more
    state = TrainedState(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        kind=optimizers.find(config.optimizer),
        moments_bytes=optimizers.state_bytes(config, shapes, ranks=optimizers.ranks_of_a_parameter(config)),
    )
    if config.use_ema:
        state.average = WeightAverage(master_weights(state), config.ema_decay)
    return state


def _stream(config: RunConfig, spec: FamilySpec, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> None:
    """Send all blocks but ``stream_blocks`` to the host, and say what is where."""
    assert config.stream_blocks is not None
    blocks = find_layers(transformer, spec.model.block_classes)
    stream = stream_blocks(blocks, config.stream_blocks, config.base_precision, accelerator.device, lazy)
    if accelerator.is_main_process:
        each = " of each process" if accelerator.num_processes > 1 else ""
        print(
            f"{len(stream.blocks)} of {len(blocks)} blocks, {stream.host_bytes / 1e9:.2f} GB, are streamed from host "
            f"memory{each} through {stream.ring_bytes / 1e9:.2f} GB of the device",
            file=sys.stderr,
            flush=True,
        )


Make = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""The run's optimizer over parameters by name."""


def _wrap(make: Make, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> tuple[nn.Module, Any]:
    """Where each rank has all weights: each parameter goes from its file to the device before the next is read."""
    for _ in lazy.placed(transformer, accelerator.device):
        pass
    transformer.to(accelerator.device)  # the buffers
    wait_for_all()  # their disks may differ, and DDP begins with a collective
    model, optimizer = accelerator.prepare(transformer, make(trainable(transformer)))
    return model, optimizer


def _shard(make: Make, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> tuple[nn.Module, Any]:
    """FSDP: sharded first, then each rank reads its shards; the optimizer knows only those."""
    files = lazy.by_name(transformer)
    sharded = fsdp2_prepare_model(accelerator, transformer)
    load_shards(sharded, files, accelerator.device)
    optimizer = make(trainable(sharded))
    shards = [list(group["params"]) for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(sharded, optimizer)
    # accelerate looks parameters up by the address of their data, and all shards without rows have the same.
    for group, own in zip(optimizer.param_groups, shards, strict=True):
        group["params"] = own
    return model, optimizer


def _partition(make: Make, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> tuple[nn.Module, Any]:
    """ZeRO-3: a parameter is read, cut into the ranks' parts and let go before the next one is read.

    A model that has its weights would go to the device as a whole first: 30.4 GiB of Wan-S2V, offloaded or not.
    """
    import deepspeed

    parameters = lazy.placed(transformer, accelerator.device)
    first: Any = next(parameters)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings)
    first.convert_to_zero_parameters(param_list=parameters)
    transformer.to(accelerator.device)  # the buffers
    model, optimizer = accelerator.prepare(transformer, make(trainable(transformer)))
    return model, optimizer


_WRAP = {None: _wrap, "blocks": _shard, "layers": _partition}
"""By what of sharded weights the strategy gathers."""
