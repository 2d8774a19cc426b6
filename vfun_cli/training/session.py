"""Assembles one rank of a run from its ``run.json`` and trains it to its end."""

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import nn

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter
from vfun_cli.modeling.encoders.sharding import EncoderSharding
from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights, load_shards
from vfun_cli.modeling.weights import read_json
from vfun_cli.plan.run_plan import load_plan
from vfun_cli.plan.shapes import most_shapes
from vfun_cli.run.messages import ENDINGS, Outcome
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.blocks import checkpoint_blocks, compile_blocks, find_blocks
from vfun_cli.training.data.cache import Cache
from vfun_cli.training.data.loader import load_ahead, with_shared_calls
from vfun_cli.training.data.stream import micro_batches
from vfun_cli.training.ledger import EpochLedger
from vfun_cli.training.lora import ADAPTER_FORMAT, add_adapters, load_network
from vfun_cli.training.meter import Costs, peak_flops, trained_share
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.optim import choose_trainable, make_optimizer
from vfun_cli.training.quantised import quantise_blocks
from vfun_cli.training.signals import StopFlag
from vfun_cli.training.state.checkpointer import Checkpointer
from vfun_cli.training.state.ema import WeightAverage
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.strategy import assert_strategy, make_accelerator, prefetch_blocks, prepare_environment
from vfun_cli.training.trainer import Trainer


def train(run: RunDir, described: Mapping[str, Any], stop: StopFlag) -> None:
    """Train the run that ``described`` (the content of run.json) resolves to."""
    config = RunConfig.from_json(described["config"])
    spec = families.find(described["family"])
    prepare_environment(config.device)
    accelerator = make_accelerator(
        config.strategy,
        config.device,
        config.gradient_accumulation_steps,
        config.mixed_precision,
        config.fsdp_reduce_dtype,
    )
    torch.manual_seed(config.seed)  # only layers with their own randomness use it; data and noise have keys

    plan = load_plan(config, spec, described)
    adapter_class = adapter_of(spec)
    adapter_setting = adapter_options(config, accelerator.device)
    lazy = LazyWeights()
    with lazy.transformer() if config.strategy == "fsdp" else nullcontext():
        adapter = adapter_class.from_pretrained(adapter_setting)
    if config.strategy.startswith(("fsdp", "zero3")) and accelerator.num_processes > 1:
        adapter.encoders.shard_over(EncoderSharding.over_all_ranks(accelerator.device))
    cache = None
    if config.cache is None:
        adapter.encoders.load()
    else:  # what it has needs no encoder
        cache = Cache.for_encoders(config.cache, adapter.encoders)
    lora = described["command"] == "lora"
    if lora:
        add_adapters(adapter.transformer, config, spec, plan.dims, lazy)
        if config.network_path is not None and not described.get("resume"):
            load_network(adapter.transformer, config.network_path, config, spec, plan.dims)
    else:
        choose_trainable(adapter.transformer, config.trainable_modules, spec.modules_without_gradient(plan.dims))
    checkpoint_blocks(adapter.transformer, spec.block_classes, config.gradient_checkpointing)
    if config.compile:
        compile_blocks(adapter.transformer, spec.block_classes, most_shapes(spec, plan.dims, plan.options))
    costs = Costs(spec=spec, dims=plan.dims, share=trained_share(adapter.transformer))
    state = prepare_state(config, spec, adapter, accelerator, lazy)
    checkpointer = Checkpointer(
        run,
        config.strategy,
        keep=config.checkpoints_total_limit,
        config_files=_config_files(spec, config),
        format=ADAPTER_FORMAT if lora else None,
    )
    first_step = 0
    if described.get("resume"):
        first_step = int(checkpointer.load(state, Path(described["resume"]))["step"])
    metrics = Metrics(
        run,
        config,
        costs=costs,
        peak_flops=peak_flops(accelerator.device, config.peak_tflops),
        device=accelerator.device,
        writes=accelerator.is_main_process,
        first_step=first_step,
        total_steps=plan.total_steps,
    )
    ledger = EpochLedger(accelerator, first_step)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        adapter=adapter,
        state=state,
        objective=make_objective(spec.objective, spec.objective_options, adapter_setting.model_dir),
        checkpointer=checkpointer,
        metrics=metrics,
        ledger=ledger,
        cache=cache,
        stop=stop,
        total_steps=plan.total_steps,
        description={
            "strategy": config.strategy,
            "world_size": accelerator.num_processes,
            "family": spec.name,
            "kind": described["command"],
            "layouts": described.get("layouts", []),
            "run_config": config.to_json(),
        },
    )
    loaded = load_ahead(
        adapter_class,
        load_options(config, spec),
        micro_batches(plan, rank=accelerator.process_index, first_step=first_step, tell=ledger.plan),
        config.dataloader_num_workers,
        config.on_bad_sample,
        cache,
    )
    reason = trainer.train(with_shared_calls(loaded, adapter.encoders), first_step)
    metrics.close()
    if accelerator.is_main_process:
        Outcome(ending=ENDINGS[reason], step=trainer.saved_step or 0).write(run)
    accelerator.wait_for_everyone()


def prepare_state(
    config: RunConfig, spec: FamilySpec, adapter: ModelAdapter, accelerator: Any, lazy: LazyWeights = NOT_LAZY
) -> TrainedState:
    """Set precisions, and let the strategy wrap the transformer and the optimizer."""
    transformer = adapter.transformer
    lazy.to_meta(transformer)
    if config.mixed_precision == "bf16":
        for parameter in transformer.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if config.base_precision != "bf16":
        quantise_blocks(transformer, spec.block_classes, config.base_precision, accelerator.device)
    transformer.train()
    blocks = find_blocks(transformer, spec.block_classes)
    wrap = _shard if config.strategy == "fsdp" else _wrap
    model, optimizer = wrap(config, transformer, accelerator, lazy)
    assert_strategy(config.strategy, model)
    if config.fsdp_prefetch:
        prefetch_blocks(blocks, config.fsdp_prefetch)
    average = WeightAverage(accelerator.unwrap_model(model), config.ema_decay) if config.use_ema else None
    return TrainedState(accelerator=accelerator, model=model, optimizer=optimizer, average=average)


def _wrap(config: RunConfig, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> tuple[nn.Module, Any]:
    """As accelerate does it, from a model that has its weights."""
    if not config.strategy.startswith("zero"):
        transformer.to(accelerator.device)
    model, optimizer = accelerator.prepare(transformer, make_optimizer(transformer, config, accelerator.device))
    return model, optimizer


def _shard(config: RunConfig, transformer: nn.Module, accelerator: Any, lazy: LazyWeights) -> tuple[nn.Module, Any]:
    """FSDP: sharded first, then each rank reads its shards; the optimizer knows only those."""
    files = lazy.by_name(transformer)
    sharded = fsdp2_prepare_model(accelerator, transformer)
    load_shards(sharded, files, accelerator.device)
    optimizer = make_optimizer(sharded, config, accelerator.device)
    shards = list(optimizer.param_groups[0]["params"])
    model, optimizer = accelerator.prepare(sharded, optimizer)
    # accelerate looks parameters up by the address of their data, and all shards without rows have the same.
    optimizer.param_groups[0]["params"] = shards
    return model, optimizer


def adapter_of(spec: FamilySpec) -> type[ModelAdapter]:
    """The family's adapter class."""
    module, name = spec.adapter.split(":")
    found: type[ModelAdapter] = getattr(importlib.import_module(module), name)
    return found


def adapter_options(config: RunConfig, device: torch.device) -> AdapterOptions:
    """The part of the configuration that the family's adapter sees.

    On a CPU the encoders stay in float32: one with AVX2 alone takes 10 (linear) to 36 (conv3d) times as long in bf16.
    """
    assert config.pretrained_model_name_or_path is not None
    in_bf16 = config.mixed_precision == "bf16" and device.type != "cpu"
    return AdapterOptions(
        model_dir=config.pretrained_model_name_or_path,
        compute_dtype=torch.bfloat16 if in_bf16 else torch.float32,
        device=device,
        vae_mini_batch=config.vae_mini_batch,
        low_vram=config.low_vram,
        train_mode=config.train_mode or "",
        control_ref_image=config.control_ref_image,
    )


def load_options(config: RunConfig, spec: FamilySpec) -> dict[str, Any]:
    """What the inputs of a clip depend on beside the request: options of the run, settings of the model."""
    assert config.pretrained_model_name_or_path is not None
    model = read_json(config.pretrained_model_name_or_path / spec.config_file)
    settings = {name: model.get(name) for name in spec.input_settings}
    return {"control_ref_image": config.control_ref_image, "train_mode": config.train_mode, **settings}


def _config_files(spec: FamilySpec, config: RunConfig) -> dict[str, Path]:
    assert config.pretrained_model_name_or_path is not None
    source = config.pretrained_model_name_or_path / spec.config_file
    return {source.name: source}
