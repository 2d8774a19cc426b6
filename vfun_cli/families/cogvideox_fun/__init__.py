"""CogVideoX-Fun InP, 2b and 5b, V1.0, V1.1 and V1.5: a clip from text and the known part of itself.

The smallest whole family: this file is all that the plan and the command line see, ``adapter.py`` is all that the
trainer sees, ``transformer.py`` mends what diffusers lacks and ``masks.py`` draws the parts to be generated.
"""

from collections.abc import Mapping
from typing import cast

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.errors import ConfigError
from vfun_cli.families.documented import COMMON, DEMO, DEMO_VIDEO, ENGLISH_NEGATIVE_PROMPT, FIRST, NO_SCHEDULE
from vfun_cli.families.spec import (
    LAYERS,
    SIZE,
    ClipShape,
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
from vfun_cli.typed_json import Check, check_fields, flag, optional

FRAMES_PER_LATENT = 4

POINT_AT = "Point --pretrained-model-name-or-path at a CogVideoX-Fun InP model: 2b or 5b, V1.0, V1.1 or V1.5."

CONFIG_DEFAULTS: Mapping[str, int] = {
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "sample_frames": 49,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "max_text_seq_length": 226,
    "use_rotary_positional_embeddings": False,
}
"""What an absent key of the transformer's config.json means."""
CONFIG: Mapping[str, Check] = {
    "num_attention_heads": SIZE,
    "attention_head_dim": SIZE,
    "in_channels": SIZE,
    "num_layers": LAYERS,
    **dict.fromkeys(CONFIG_DEFAULTS, optional(SIZE)),
    "use_rotary_positional_embeddings": optional(flag),
}


def read_dims(config: Mapping[str, object]) -> ModelDims:
    """Dimensions from ``transformer/config.json``.

    Raises:
        CheckpointError: sizes are missing, or no model has them.
    """
    check_fields(config, CONFIG, "the transformer's configuration", hint=POINT_AT)
    stated = {name: cast(int, config[name]) for name in CONFIG if config.get(name) is not None}
    full = {**CONFIG_DEFAULTS, **stated}
    dim = full["num_attention_heads"] * full["attention_head_dim"]
    return ModelDims(
        dim=dim,
        ffn_dim=4 * dim,
        num_layers=full["num_layers"],
        extra={
            "in_channels": full["in_channels"],
            "out_channels": full["out_channels"],
            "patch": full["patch_size"],
            "patch_frames": full["patch_size_t"],  # latent frames per token: 2 in V1.5
            "text_tokens": full["max_text_seq_length"],
            "text_dim": full["text_embed_dim"],
            "time_dim": full["time_embed_dim"],
            # The 2b models have a table of positions for this many frames; 0: rotary positions, no end.
            "most_frames": 0 if full["use_rotary_positional_embeddings"] else full["sample_frames"],
        },
    )


def adjust_frames(frames: int, dims: ModelDims) -> int:
    """The longest clip of at most ``frames`` (4k + 1) frames that the model can take.

    V1.5 joins its latent frames in pairs, so their number must be even: 49 frames, 13 latents, become 45. A picture's
    single latent is paired with an empty one.

    Raises:
        ConfigError: more frames than a 2b model has positions for.
    """
    most = dims.extra["most_frames"]
    if most and frames > most:
        raise ConfigError(
            f"clips of {frames} frames: this CogVideoX-Fun model (2b) has positions for {most} frames and no more.",
            hint=f"Use --video-sample-n-frames {most}, or a 5b model.",
        )
    latents = (frames - 1) // FRAMES_PER_LATENT + 1
    return max(frames - latents % dims.extra["patch_frames"] * FRAMES_PER_LATENT, 1)


def clip_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """Tokens of the clip itself."""
    frames, height, width = SPEC.plan.latent_shape(shape)
    pairs = -(-frames // dims.extra["patch_frames"])
    return pairs * (height // dims.extra["patch"]) * (width // dims.extra["patch"])


def sequence_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """Caption tokens, padding included (nothing masks it), then the clip's own: one joint sequence."""
    return dims.extra["text_tokens"] + clip_tokens(shape, dims)


def forward_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Matrix products and attention of one forward pass; norms, activations and rotations are left out."""
    dim, size = dims.dim, dims.extra
    video, length = clip_tokens(shape, dims), sequence_tokens(shape, dims)
    token_latents = size["patch_frames"] * size["patch"] ** 2
    per_token = 4 * dim * dim + 2 * dim * dims.ffn_dim  # q, k, v, out and the feed-forward, in multiply-adds
    modulation = 2 * size["time_dim"] * 6 * dim
    blocks = dims.num_layers * (length * per_token + modulation)
    patches = video * token_latents * dim * (size["in_channels"] + size["out_channels"])
    captions = size["text_tokens"] * size["text_dim"] * dim
    time = dim * size["time_dim"] + size["time_dim"] ** 2 + 2 * size["time_dim"] * dim
    return attention_flops(shape, dims) + 2.0 * (blocks + patches + captions + time)


def attention_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Scores and weighted sums over the joint sequence."""
    return 4.0 * dims.num_layers * dims.dim * sequence_tokens(shape, dims) ** 2


def _without_images(dims: ModelDims) -> Mapping[SamplingInput, str]:
    if dims.extra["in_channels"] > dims.extra["out_channels"]:
        return {}
    return dict.fromkeys(("image", "end_image", "edit_mask"), "this model is no InP model: it has no mask channels")


DEFAULTS: Mapping[str, object] = {
    **COMMON,
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/CogVideoX-Fun-2b-InP",
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "image_sample_size": 512,
    "video_sample_size": 512,
    "token_sample_size": 512,
    "video_sample_stride": 3,
    "video_sample_n_frames": 49,
    "video_repeat": 1,
    "checkpointing_steps": 50,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",  # the script's own default; the command line names none
    "lr_warmup_steps": 0,
    "output_dir": "output_dir",
    "adam_weight_decay": 3e-2,
    "low_vram": True,
    "train_mode": "inpaint",
}
"""The published command line, the same for its three strategies."""

SPEC = FamilySpec(
    name="cogvideox-fun",
    summary="CogVideoX-Fun InP (2b, 5b; V1.0, V1.1, V1.5): text, and the known part of a clip; DDPM",
    adapter="vfun_cli.families.cogvideox_fun.adapter:CogVideoXFunAdapter",
    fields=(MetadataField(name="file_path", media="visual"),),
    media_types=("video", "image"),
    train_modes=("inpaint", "normal"),
    model=ModelSpec(
        # V1.1-5b: the published 49 frames at 512, as for the 2b models, and no end of positions.
        released={
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "in_channels": 33,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        read_dims=read_dims,
        recognises=lambda config: config.get("_class_name") == "CogVideoXTransformer3DModel",
        config_file="transformer/config.json",
        input_settings=("add_noise_in_inpaint_model",),
        encoders={"vae": EncoderSize(weights=0.216), "text": EncoderSize(weights=4.762, shared=True)},
        captions=lambda dims: (captions.t5("tokenizer", dims.extra["text_tokens"]),),
        block_classes=("CogVideoXBlock",),
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        objective="ddpm",  # betas and prediction type are in the model directory's scheduler/
        sampler="ddim",
    ),
    plan=PlanSpec(
        vae_stride=(FRAMES_PER_LATENT, 8, 8),
        patch_size=(1, 2, 2),
        adjust_frames=adjust_frames,
        # To inpaint, beside the clip what is known of it in float32, and a mask without colours.
        decoded_frames=lambda frames: 6 * frames,
    ),
    sampling=SamplingSpec(  # examples/cogvideox_fun/predict_i2v.py
        steps=50,
        guidance=6.0,
        negative_prompt=ENGLISH_NEGATIVE_PROMPT,
        frames=49,
        size=(384, 672),
        fps=8,
        optional=("image", "end_image", "edit", "edit_mask"),
        without=_without_images,
        strength=0.7,  # examples/cogvideox_fun/predict_v2v.py
        demo=DEMO_VIDEO,
    ),
    defaults=DefaultOptions(
        train=DEFAULTS,
        lora={
            "rank": 64,
            "network_alpha": 32,
            # The published "ff.0,ff.2" name no module: its feed-forward stayed untrained without a word.
            "target_name": ("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2"),
        },
        presets={
            "2025": FIRST,
            "2026": Preset(  # which has a document of the full fine-tune too
                train={
                    "learning_rate": 2e-5,
                    "lr_scheduler": "constant_with_warmup",
                    "lr_warmup_steps": 100,
                    "low_vram": False,
                },
                lora={"learning_rate": 1e-4, **NO_SCHEDULE, "low_vram": True},
            ),
        },
        lora_aliases={"ff.0": "ff.net.0.proj", "ff.2": "ff.net.2"},
        demo=DEMO,
    ),
    export=ExportSpec(
        names={"same": unchanged, "diffusers": unchanged},
        # ComfyUI runs this model in nodes that split a LoRA's keys at the first dot: the original's have one alone.
        lora_formats={"peft": "peft", "diffusers": "diffusers", "comfyui": "original", "original": "original"},
    ),
)
