"""EasyAnimate Control, two families: V5.1 (flow matching, Qwen2-VL captions) and V5 (DDPM, BERT and mT5 captions)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import cast

from vfun_cli.errors import ConfigError
from vfun_cli.families.documented import DEMO, DEMO_VIDEO, FIRST, FULL_FINE_TUNE, NO_SCHEDULE
from vfun_cli.families.easyanimate_control.names import diffusers_name, released_name
from vfun_cli.families.spec import (
    LAYERS,
    SIZE,
    ClipShape,
    ConditioningOptions,
    DefaultOptions,
    EncoderSize,
    ExportSpec,
    FamilySpec,
    ModelDims,
    ModelSpec,
    PlanSpec,
    Preset,
    SamplingInput,
    SamplingSpec,
)
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.modeling.encoders import captions
from vfun_cli.typed_json import Check, check_fields, optional, whole

CAPTION_TOKENS = 256
"""Every caption is padded or cut to this many tokens, for each text encoder."""

POINT_AT = "Point --pretrained-model-name-or-path at EasyAnimateV5.1-12b-zh-Control or EasyAnimateV5-12b-zh-Control."

CONFIG_DEFAULTS: Mapping[str, object] = {
    "mmdit_layers": 10_000,
    "text_embed_dim": 4096,
    "text_embed_dim_t5": 4096,
    "time_embed_dim": 512,
}
"""What the released code takes for an absent key of the transformer's config.json; diffusers takes other values."""

TOKENIZER_LIMITS: Mapping[str, tuple[str, str]] = {
    "caption_limit": ("tokenizer/tokenizer_config.json", "model_max_length"),
    "caption_limit_t5": ("tokenizer_2/tokenizer_config.json", "model_max_length"),
}
"""Where V5 states how many tokens its encoders take, in the order of the transformer's streams."""

CONFIG: Mapping[str, Check] = {
    "num_attention_heads": SIZE,
    "attention_head_dim": SIZE,
    "in_channels": SIZE,
    "out_channels": SIZE,
    "patch_size": SIZE,
    "num_layers": LAYERS,
    "mmdit_layers": LAYERS,
    "text_embed_dim": optional(SIZE),
    "text_embed_dim_t5": optional(SIZE),
    "time_embed_dim": SIZE,
    **dict.fromkeys(TOKENIZER_LIMITS, optional(whole(1, 10**40))),  # tokenizers without a limit state 10^30
}

LOSS_TYPES = {"flow": "easyanimate-v5.1-control", "ddpm": "easyanimate-v5-control"}
"""The loss of the original scripts to the family that is trained with it."""


def complete_config(config: Mapping[str, object]) -> dict[str, object]:
    """A transformer's ``config.json`` with the defaults of the released code filled in.

    Raises:
        CheckpointError: a size without a default is missing, or no model has it.
    """
    full = {**CONFIG_DEFAULTS, **config}
    check_fields(full, CONFIG, "the transformer's configuration", hint=POINT_AT)
    return full


def _is_easyanimate(config: Mapping[str, object], *, t5: bool) -> bool:
    """V5 reads two text encoders, the second a T5; V5.1 one."""
    full = {**CONFIG_DEFAULTS, **config}
    return config.get("_class_name") == "EasyAnimateTransformer3DModel" and bool(full["text_embed_dim_t5"]) == t5


def caption_lengths(settings: Mapping[str, object]) -> tuple[int, ...]:
    """Tokens that each text stream has room for: 256, or what a tokenizer of V5 takes if that is less."""
    return tuple(min(cast(int, settings.get(name, CAPTION_TOKENS)), CAPTION_TOKENS) for name in TOKENIZER_LIMITS)


def read_dims(config: Mapping[str, object]) -> ModelDims:
    """Dimensions from ``transformer/config.json``.

    Raises:
        CheckpointError: sizes are missing, or no model has them.
    """
    full = cast(Mapping[str, int], complete_config(config))
    dim = full["num_attention_heads"] * full["attention_head_dim"]
    channels = [full[name] for name in ("text_embed_dim", "text_embed_dim_t5") if full[name]]
    lengths = caption_lengths(config)[: len(channels)]
    return ModelDims(
        dim=dim,
        ffn_dim=4 * dim,
        num_layers=full["num_layers"],
        extra={
            "mmdit_layers": min(full["mmdit_layers"], full["num_layers"]),
            "text_streams": len(channels),
            "caption_tokens": sum(lengths),
            **dict(zip(TOKENIZER_LIMITS, lengths, strict=False)),
            "caption_channels": sum(length * width for length, width in zip(lengths, channels, strict=True)),
            "in_channels": full["in_channels"],
            "out_channels": full["out_channels"],
            "time_dim": full["time_embed_dim"],
        },
    )


def sequence_tokens(clip: ClipShape, dims: ModelDims) -> int:
    """Caption tokens, padding included (nothing masks it), then the clip's own."""
    return dims.extra["caption_tokens"] + V5_1.plan.video_tokens(clip)


def forward_flops(clip: ClipShape, dims: ModelDims) -> float:
    """FLOPs of the matrix products of one forward pass; norms, activations and rotations are left out.

    A text token costs a block as much as a video token, by weights of its own or by the video's; only a block that
    shares its weights leaves the output projection of the text out.
    """
    dim, time_dim, patch = dims.dim, dims.extra["time_dim"], V5_1.plan.patch_size[1] * V5_1.plan.patch_size[2]
    video, length = V5_1.plan.video_tokens(clip), sequence_tokens(clip, dims)
    per_token = 4 * dim * dim + 2 * dim * dims.ffn_dim  # q, k, v, out and the feed-forward, in multiply-adds
    modulation = 2 * time_dim * 6 * dim
    blocks = dims.num_layers * (length * per_token + modulation)
    blocks -= (dims.num_layers - dims.extra["mmdit_layers"]) * (length - video) * dim * dim
    patches = video * patch * dim * (dims.extra["in_channels"] + dims.extra["out_channels"])
    captions = dims.extra["caption_channels"] * dim
    time = dim * time_dim + time_dim * time_dim + 2 * time_dim * dim
    return attention_flops(clip, dims) + 2.0 * (blocks + patches + captions + time)


def attention_flops(clip: ClipShape, dims: ModelDims) -> float:
    """Scores and weighted sums over the joint sequence."""
    return 4.0 * dims.num_layers * dims.dim * sequence_tokens(clip, dims) ** 2


def modules_without_gradient(dims: ModelDims) -> tuple[str, ...]:
    """Modules of the last block that only feed the text stream, which ends there.

    The first two get no gradient at all, and DDP would wait for it; the others only zeros, and AdamW would decay them.
    In a model whose last block shares its weights between text and video there are none.
    """
    if dims.extra["mmdit_layers"] < dims.num_layers:
        return ()
    last = f"transformer_blocks.{dims.num_layers - 1}"
    return tuple(f"{last}.{part}" for part in ("attn1.to_add_out", "txt_ff", "attn1.add_q_proj", "attn1.norm_added_q"))


def check_options(options: ConditioningOptions, family: str) -> None:
    """Refuse what the original scripts take and this family cannot be trained with.

    Raises:
        ConfigError: with what is possible.
    """
    spec = SPECS[family]
    mode = options.train_mode or spec.train_modes[0]
    if mode not in spec.train_modes:
        why = " Camera models read pose files, not clips." if mode == "control_camera_ref" else ""
        raise ConfigError(
            f"train_mode {mode!r} is not supported by {family}.{why}",
            hint=f"Choose one of: {', '.join(spec.train_modes)}.",
        )
    image = options.control_ref_image
    if image not in spec.reference_images:
        raise ConfigError(
            f"control_ref_image {image!r} is not supported: the reference enters at latent frame 0, "
            "where the released models expect the clip's first frame.",
            hint=f"Choose one of: {', '.join(spec.reference_images)}.",
        )
    own = next(loss for loss, name in LOSS_TYPES.items() if name == family)
    loss = options.loss_type or own
    if loss == own:
        return
    if loss == "sigma":
        why = "it is the learned-variance diffusion of EasyAnimate V1 to V3; later models predict no variance"
    elif loss in LOSS_TYPES:
        why = f"it belongs to {LOSS_TYPES[loss]}"
    else:
        why = "there is no such loss"
    raise ConfigError(f"loss_type {loss!r} cannot train {family}: {why}.", hint=f"Use --loss-type {own}.")


def _check(family: str) -> Callable[[ConditioningOptions], None]:
    return lambda options: check_options(options, family)


DEFAULTS: Mapping[str, object] = {
    **FULL_FINE_TUNE,
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "image_sample_size": 1024,
    "video_sample_size": 256,
    "token_sample_size": 512,
    "video_sample_stride": 3,
    "video_sample_n_frames": 49,
    "video_repeat": 1,
    "checkpointing_steps": 100,
    "output_dir": "output_dir",
    "adam_weight_decay": 5e-3,
    "control_ref_image": "first_frame",
}
"""What the published command lines of both families say."""


def _without_image(dims: ModelDims) -> Mapping[SamplingInput, str]:
    """Noisy and control latents alone: no channels for a reference."""
    has_room = dims.extra["in_channels"] > 2 * dims.extra["out_channels"]
    return {} if has_room else {"image": "this model has no channels for a reference image"}


V5_1 = FamilySpec(
    name="easyanimate-v5.1-control",
    summary="EasyAnimate V5.1 Control (12B): a control clip and a reference image; flow matching",
    adapter="vfun_cli.families.easyanimate_control.adapter:EasyAnimateV51",
    fields=(
        MetadataField(name="file_path", media="visual"),
        MetadataField(name="control_file_path", media="control"),
    ),
    media_types=("video", "image"),
    train_modes=("control_ref", "control"),
    reference_images=("first_frame",),
    check_options=_check("easyanimate-v5.1-control"),
    model=ModelSpec(
        released={
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "in_channels": 48,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 48,
            "mmdit_layers": 48,
            "text_embed_dim": 3584,
            "text_embed_dim_t5": None,
            "add_norm_text_encoder": True,
        },
        layers=("num_layers", "mmdit_layers"),
        read_dims=read_dims,
        recognises=lambda config: _is_easyanimate(config, t5=False),
        config_file="transformer/config.json",
        encoders={
            "vae": EncoderSize(weights=0.24),
            "encoder_hidden_states": EncoderSize(weights=7.071, shared=True),
        },
        captions=lambda dims: (captions.chat("tokenizer", dims.extra["caption_limit"]),),
        block_classes=("EasyAnimateTransformerBlock",),
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        modules_without_gradient=modules_without_gradient,
        objective="flow-matching",
        # Training draws the timestep uniformly: the scheduler's shift is applied at inference only.
        objective_options={"shift": 1.0},
        sampler="flow-shifted-dynamically",
        sampler_options={"mu": 1.0},
    ),
    plan=PlanSpec(
        vae_stride=(4, 8, 8),
        patch_size=(1, 2, 2),
        usable_span=(Fraction(1, 10), Fraction(9, 10)),
        decoded_frames=lambda frames: 2 * frames + 1,  # clip, control, reference
    ),
    sampling=SamplingSpec(  # predict_v2v_control.py
        steps=50,
        guidance=6.0,
        negative_prompt="扭曲的身体，肢体残缺，文本字幕，漫画，静止，丑陋，错误，乱码。",
        frames=49,
        size=(672, 384),
        fps=8,
        optional=("image", "control"),
        without=_without_image,
        demo=DEMO_VIDEO,
    ),
    defaults=DefaultOptions(
        train={
            **DEFAULTS,
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/EasyAnimateV5.1-12b-zh-Control",
            "loss_type": "flow",
            "train_mode": "control_ref",
        },
        lora={
            "rank": 64,
            "network_alpha": 32,
            "learning_rate": 1e-4,
            "target_name": ("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2"),
        },
        presets={
            "2025": FIRST,
            "2026": Preset(
                lora={**NO_SCHEDULE, "rank": 128, "network_alpha": 64, "low_vram": True}
            ),  # of the LoRA guide
        },
        lora_aliases={"ff.0": "ff.net.0.proj", "ff.2": "ff.net.2"},
        demo=DEMO,
    ),
    export=ExportSpec(
        names={"same": released_name, "diffusers": diffusers_name},
        parameter=diffusers_name,
        # diffusers' transformer and pipeline of this model load no LoRA; ComfyUI runs it in the original's own nodes.
        lora_formats={"peft": "peft", "comfyui": "original", "original": "original"},
    ),
)

V5 = replace(
    V5_1,
    name="easyanimate-v5-control",
    summary="EasyAnimate V5 Control (12B): a control clip; DDPM",
    adapter="vfun_cli.families.easyanimate_control.adapter:EasyAnimateV5",
    train_modes=("control",),
    check_options=_check("easyanimate-v5-control"),
    model=replace(
        V5_1.model,
        released={
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "in_channels": 32,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 48,
            "mmdit_layers": 48,
            "text_embed_dim": 1024,
            "text_embed_dim_t5": 2048,
            "add_norm_text_encoder": False,
        },
        recognises=lambda config: _is_easyanimate(config, t5=True),
        other_settings=TOKENIZER_LIMITS,
        encoders={
            "vae": EncoderSize(weights=0.24),
            "encoder_hidden_states": EncoderSize(weights=0.326, shared=True),
            "encoder_hidden_states_t5": EncoderSize(weights=1.67, shared=True),
        },
        captions=lambda dims: (
            captions.bert("tokenizer", dims.extra["caption_limit"]),
            captions.t5("tokenizer_2", dims.extra["caption_limit_t5"]),
        ),
        objective="ddpm",
        objective_options={"outlier": 50.0},  # betas and prediction type are in the model directory's scheduler/
        sampler="ddim",
        sampler_options={},
    ),
    defaults=replace(
        V5_1.defaults,
        train={
            **DEFAULTS,
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/EasyAnimateV5-12b-zh-Control",
            "loss_type": "ddpm",
            "train_mode": "control",
        },
    ),
)

SPECS = {spec.name: spec for spec in (V5_1, V5)}
