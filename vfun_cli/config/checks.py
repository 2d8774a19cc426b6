"""What options refuse each other: checked once, on the resolved configuration, before anything is read or started."""

from vfun_cli.config import optimizers
from vfun_cli.config.options import ENDING_SCHEDULERS, TIMESTEP_DENSITIES, RunConfig, default_of, parse
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import ConfigError, EnvironmentFault, as_flag, did_you_mean
from vfun_cli.families.spec import FamilySpec, ModelDims

MOST_CLIPS_OF_A_STEP = 10_000_000
"""A plan of such steps takes seconds; of a thousand times as many, all memory."""


def check(config: RunConfig, spec: FamilySpec, *, command: str) -> None:
    """Refuse combinations that no single option can refuse.

    Raises:
        ConfigError: a combination that cannot work.
        EnvironmentFault: a quantised base without a GPU.
    """
    _check_processes(config)
    _check_strategy(config)
    _check_optimizer(config)
    _check_schedule(config)
    _check_conditioning(config, spec)
    _check_sizes(config, spec)
    _check_objective(config, spec)
    _check_validation(config)
    if command == "lora":
        _check_lora(config, spec)
        _check_quantised_base(config)
        _check_streaming(config)
    elif not config.trainable_modules:
        raise ConfigError("trainable_modules is empty: nothing would be trained.", hint='Use "." for everything.')
    elif command == "train" and config.stream_blocks is not None:
        raise ConfigError(
            "stream_blocks is about weights that never change, and a full fine-tune changes them.",
            hint="Drop it and choose --zero3-offload, or use vfun lora.",
        )


def check_step(config: RunConfig, ranks: int) -> None:
    """Refuse a step that no machine can plan, before it is tried.

    Raises:
        ConfigError: it would hold more clips than there are.
    """
    micro_batches, clips = config.gradient_accumulation_steps, config.train_batch_size
    if ranks * micro_batches * clips > MOST_CLIPS_OF_A_STEP:
        raise ConfigError(
            f"{ranks} processes x {micro_batches} micro-batches (gradient_accumulation_steps) x {clips} clips "
            f"(train_batch_size) are {ranks * micro_batches * clips} clips in a step; the most that makes sense is "
            f"{MOST_CLIPS_OF_A_STEP}."
        )


def _check_processes(config: RunConfig) -> None:
    assert config.num_processes is not None
    check_step(config, config.num_processes)
    if config.num_processes > 1 and not STRATEGIES[config.strategy].several_processes:
        raise ConfigError(
            f"strategy {config.strategy!r} with num_processes {config.num_processes}.",
            hint="Drop one of them, or choose --ddp, --fsdp, --zero2 or --zero3.",
        )
    if config.num_processes % config.num_machines:
        raise ConfigError(
            f"num_processes {config.num_processes} does not divide by num_machines {config.num_machines}.",
            hint="num_processes counts all machines together.",
        )
    if config.machine_rank >= config.num_machines:
        raise ConfigError(f"machine_rank {config.machine_rank} of {config.num_machines} machines: ranks count from 0.")


def _check_strategy(config: RunConfig) -> None:
    """Options that only some strategies can follow."""
    strategy = STRATEGIES[config.strategy]
    for name in ("fsdp_shard_size", "fsdp_prefetch", "fsdp_reduce_dtype"):
        if strategy.wrapper != "fsdp" and getattr(config, name) != default_of(name):
            raise ConfigError(f"{name} is about FSDP; the strategy is {strategy.name}.", hint="Drop it, or add --fsdp.")
    _check_shards(config)
    if config.compile and not strategy.whole_blocks:
        raise ConfigError(
            "compile cannot be combined with ZeRO-3, which gathers each layer's weights in the middle of a block.",
            hint="Choose --fsdp, which gathers whole blocks, or drop --compile.",
        )
    if config.compile and config.base_precision != "bf16":
        raise ConfigError("compile and a quantised base cannot be combined.", hint="Drop one of them.")


def _check_shards(config: RunConfig) -> None:
    """Groups of ranks that each have all weights: several in a machine, or several machines in a group."""
    assert config.num_processes is not None
    size, ranks = config.fsdp_shard_size, config.num_processes
    here = ranks // config.num_machines
    if size is None:
        return
    if size == 1 < ranks:
        raise ConfigError(
            "fsdp_shard_size 1 leaves all weights on each rank, which is DDP.", hint="Drop it, and choose --ddp."
        )
    if ranks % size:
        raise ConfigError(
            f"num_processes {ranks} does not divide into groups of fsdp_shard_size {size}.",
            hint=f"Choose one that divides {ranks}, or drop it: then all ranks are one group.",
        )
    if here % size and size % here:
        raise ConfigError(
            f"groups of fsdp_shard_size {size} would lie across machines of {here} processes each, and some of them "
            "in one alone.",
            hint=f"Choose {here}, the processes of a machine, or what divides it.",
        )


def _check_optimizer(config: RunConfig) -> None:
    """An optimizer that there is, that takes its arguments, and that works under the strategy."""
    optimizer, strategy = optimizers.find(config.optimizer), STRATEGIES[config.strategy]
    optimizers.check_arguments(optimizer, optimizers.parse_arguments(config.optimizer_args))
    if strategy.wrapper not in optimizer.wrappers:
        able = (one for one in STRATEGIES.values() if one.wrapper in optimizer.wrappers)
        ways = [f"--{one.name}" for one in able if one.several_processes]
        raise ConfigError(
            f"optimizer {optimizer.name} cannot work under strategy {strategy.name}: {optimizer.because}.",
            hint=f"Use {' or '.join(ways)}, or --optimizer adamw.",
            option="--optimizer",
        )
    if optimizer.one_rate and config.trainable_modules_low_learning_rate:
        raise ConfigError(
            f"optimizer {optimizer.name} has one learning rate for all weights, and "
            "trainable_modules_low_learning_rate asks for two.",
            hint="Drop one of them.",
        )


def _check_schedule(config: RunConfig) -> None:
    """No setting of a schedule that is not the run's."""
    for name, schedulers in (
        ("lr_num_cycles", ("cosine_with_restarts",)),
        ("lr_power", ("polynomial",)),
        ("lr_min_ratio", ENDING_SCHEDULERS),
    ):
        value = getattr(config, name)
        if value != default_of(name) and config.lr_scheduler not in schedulers:
            raise ConfigError(
                f"{name} is {value}, which has no effect on lr_scheduler {config.lr_scheduler}.",
                hint=f"Drop it, or choose --lr-scheduler {' or '.join(schedulers)}.",
                option=as_flag(name),
            )


def _check_conditioning(config: RunConfig, spec: FamilySpec) -> None:
    """Choices that a family has, or has not."""
    spec.check_options(config)  # first: a family says why
    mode, image = config.train_mode, config.control_ref_image
    if mode is not None and mode not in spec.train_modes:
        known = ", ".join(spec.train_modes) or "none: leave --train-mode out"
        raise ConfigError(
            f"{spec.name} has no train mode {mode!r}.{did_you_mean(mode, spec.train_modes)} Its modes: {known}."
        )
    if config.loss_type is not None and "loss_type" not in spec.defaults.train:
        raise ConfigError(f"{spec.name} has no choice of loss_type.", hint="Leave --loss-type out.")
    if image != default_of("control_ref_image") and image not in spec.reference_images:
        raise ConfigError(f"{spec.name} has no choice of control_ref_image.", hint="Leave --control-ref-image out.")


def _check_sizes(config: RunConfig, spec: FamilySpec) -> None:
    """One size for all clips that they can have, and nothing beside it that chooses another."""
    size, grid = config.fix_sample_size, spec.plan.grid
    if size and len(size) != 2:
        raise ConfigError(
            f"fix_sample_size is {' '.join(map(str, size))}; it takes a height and a width.",
            hint="For example --fix-sample-size 480 832.",
            option="--fix-sample-size",
        )
    nearest = tuple(max(1, round(side / step)) * step for side, step in zip(size, grid, strict=False))
    if size != nearest:
        raise ConfigError(
            f"fix_sample_size is {size[0]} {size[1]}; {spec.name} needs a height that is a multiple of {grid[0]} and a "
            f"width that is one of {grid[1]}.",
            hint=f"The nearest is --fix-sample-size {nearest[0]} {nearest[1]}.",
            option="--fix-sample-size",
        )
    if size and config.random_ratio_crop:
        raise ConfigError(
            "fix_sample_size gives every clip one size, random_ratio_crop gives it several.",
            hint="Drop --fix-sample-size, or --random-ratio-crop.",
            option="--random-ratio-crop",
        )
    if config.random_ratio_crop and not config.enable_bucket:
        raise ConfigError(
            "random_ratio_crop draws an aspect ratio, but without enable_bucket every clip is cropped to a square.",
            hint="Drop --no-enable-bucket, or --random-ratio-crop.",
            option="--random-ratio-crop",
        )
    if size and not config.enable_bucket:
        raise ConfigError(
            "fix_sample_size gives every clip one size, without enable_bucket it is cropped to a square of another.",
            hint="Drop --no-enable-bucket, or --fix-sample-size.",
            option="--fix-sample-size",
        )


def _check_objective(config: RunConfig, spec: FamilySpec) -> None:
    """No weights and densities of another objective, and no setting of what is off."""
    scheme = config.weighting_scheme
    if scheme != "none" and spec.model.objective != "flow-matching":
        raise ConfigError(
            f"weighting_scheme {scheme} is about the noise levels of flow matching; {spec.name} trains by denoising "
            "diffusion.",
            hint="Leave --weighting-scheme out.",
            option="--weighting-scheme",
        )
    if scheme in TIMESTEP_DENSITIES and config.uniform_sampling:
        raise ConfigError(
            f"weighting_scheme {scheme} says how often each timestep is drawn, and uniform_sampling draws all alike.",
            hint="Add --no-uniform-sampling, or drop --weighting-scheme.",
            option="--weighting-scheme",
        )
    for name, needs, value, switch in (
        ("logit_mean", "weighting_scheme", "logit_normal", "--weighting-scheme logit_normal --no-uniform-sampling"),
        ("logit_std", "weighting_scheme", "logit_normal", "--weighting-scheme logit_normal --no-uniform-sampling"),
        ("mode_scale", "weighting_scheme", "mode", "--weighting-scheme mode --no-uniform-sampling"),
        ("motion_sub_loss_ratio", "motion_sub_loss", True, "--motion-sub-loss"),
        ("noise_share_in_frames_ratio", "noise_share_in_frames", True, "--noise-share-in-frames"),
    ):
        if getattr(config, name) != default_of(name) and getattr(config, needs) != value:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which has no effect without {needs}"
                f"{'' if value is True else f' {value}'}.",
                hint=f"Drop it, or add {switch}.",
                option=as_flag(name),
            )


def check_guidance(config: RunConfig, spec: FamilySpec, dims: ModelDims) -> None:
    """Refuse an embedded guidance of a model that is not told any.

    Raises:
        ConfigError: it would have no effect.
    """
    if config.guidance_scale != default_of("guidance_scale") and not spec.model.embedded_guidance(dims):
        raise ConfigError(
            f"guidance_scale is {config.guidance_scale:g}, but this {spec.name} has no embedded guidance: it is told "
            "no scale while it trains.",
            hint="Leave it out; of samples, --validation-guidance is the scale.",
            option="--guidance-scale",
        )


def _check_validation(config: RunConfig) -> None:
    """One set of held-out rows, and no dates for nothing."""
    if config.validation_meta is not None and config.validation_rows is not None:
        raise ConfigError(
            f"validation_meta {config.validation_meta} and validation_rows {config.validation_rows} are two sets of "
            "held-out rows.",
            hint="Keep one of them.",
        )
    for name in ("validation_steps", "validation_epochs"):
        every = getattr(config, name)
        if every is not None and not config.validates:
            raise ConfigError(
                f"{name} is {every}, but there is nothing to validate on.",
                hint="Add --validation-rows N, --validation-meta FILE or --validation-prompts TEXT, or drop it.",
                option=as_flag(name),
            )


def _check_lora(config: RunConfig, spec: FamilySpec) -> None:
    if not config.target_name:
        own = parse("target_name", spec.defaults.lora["target_name"], spec.name)
        raise ConfigError(
            "target_name is empty: no layer would get an adapter.",
            hint=f"The default of {spec.name} is --target-name {','.join(own)}.",
        )
    if config.trainable_modules != default_of("trainable_modules"):
        raise ConfigError(
            "trainable_modules chooses weights of the model; LoRA trains adapters only.",
            hint="Choose layers with --target-name, or use vfun train.",
        )
    if config.trainable_modules_low_learning_rate:
        raise ConfigError(
            "trainable_modules_low_learning_rate chooses weights of the model; LoRA trains adapters only, at one rate.",
            hint="Drop it, or use vfun train.",
        )
    if config.use_dora and not STRATEGIES[config.strategy].whole_blocks:
        raise ConfigError(
            "use_dora needs a layer's whole weight in the forward pass, which ZeRO-3 keeps in parts.",
            hint="Choose --fsdp, --zero2 or --ddp.",
        )


def check_streamed_blocks(config: RunConfig, spec: FamilySpec, dims: ModelDims) -> None:
    """Refuse to stream no block of this model.

    Raises:
        ConfigError: as many stay as there are, or more.
    """
    resident, blocks = config.stream_blocks, spec.model.blocks(dims)
    if resident is not None and resident >= blocks:
        raise ConfigError(
            f"stream_blocks {resident}: the model has {blocks} blocks, so that none of them would be streamed.",
            hint=f"Use --stream-blocks 0 to {blocks - 1}, or drop it.",
            option="--stream-blocks",
        )


def _check_streaming(config: RunConfig) -> None:
    """Only what is whole on each rank and multiplied outside of a compiled block can be streamed."""
    if config.stream_blocks is None:
        return
    if not STRATEGIES[config.strategy].whole_weights:
        raise ConfigError(
            f"stream_blocks with strategy {config.strategy}, which moves weights between host and devices by itself.",
            hint="Use --ddp or --strategy single, or drop --stream-blocks.",
        )
    if config.compile:
        raise ConfigError(
            "compile and stream_blocks cannot be combined: a compiled block does not ask for its weights.",
            hint="Drop one of them.",
        )


def _check_quantised_base(config: RunConfig) -> None:
    precision = config.base_precision
    if precision == "bf16":
        return
    if config.device != "cuda":
        raise EnvironmentFault(
            f"base_precision {precision} needs a GPU, this run is on {config.device}.",
            hint="Use --base-precision bf16 here.",
        )
    if not STRATEGIES[config.strategy].whole_weights:
        raise ConfigError(
            f"base_precision {precision} with strategy {config.strategy}: a quantised base cannot be sharded.",
            hint="Use --ddp, or --base-precision bf16, which the strategy spreads over the GPUs.",
        )
    if config.use_dora:
        raise ConfigError(
            f"use_dora needs the base's weights, base_precision {precision} keeps codes.", hint="Drop one of the two."
        )
