"""Wan2.1-Fun Control, V1.0 and V1.1, 1.3B and 14B: a clip from text, a control clip and a picture.

``train_mode`` and what the released training script has:

* ``control_ref``: control clip, start image, reference image (V1.1) and CLIP embedding, each dropped now and then.
* ``control_object`` and ``inpaint``, which the guides use, are no modes of the released script: every name but its
  own two special ones takes the branch of ``control_ref`` there, and so they do here. A Control checkpoint has no mask
  channels to inpaint with.
* ``control``: the control clip alone. The script's default, where it stops at an undefined variable; here start image,
  reference and CLIP embedding are zeros, as at inference without a picture.
* ``control_camera_ref`` needs a Camera checkpoint, which is not supported.
"""

from collections.abc import Mapping
from typing import cast

from vfun_cli.errors import CheckpointError
from vfun_cli.families.documented import DEMO, DEMO_VIDEO, FIRST, FULL_FINE_TUNE, WAN_FILES, WAN_NEGATIVE_PROMPT
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
    Release,
    SamplingInput,
    SamplingSpec,
)
from vfun_cli.families.wan_fun_control.names import live_name, released_name
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.modeling.encoders import captions
from vfun_cli.typed_json import Check, check_fields, flag, optional

CONTROL_IN_DIM = 48
"""Latent channels a Control transformer reads: 16 noisy, 16 of the control clip, 16 of the start image."""
TEXT_TOKENS = 512
"""Rows of text the cross-attention reads; prompts are padded with zeros to this length."""
IMAGE_TOKENS = 257
"""Rows of the CLIP embedding."""
IMAGE_DIM = 1280
"""Width of the CLIP embedding, where config.json does not state it (the released ones do not)."""
LATENT_CHANNELS = 16

CONFIG_DEFAULTS = {"text_dim": 4096, "freq_dim": 256, "image_dim": IMAGE_DIM, "add_ref_conv": False}
"""What an absent key of config.json means."""
CONFIG: Mapping[str, Check] = {
    "dim": SIZE,
    "ffn_dim": SIZE,
    "num_layers": LAYERS,
    **dict.fromkeys(CONFIG_DEFAULTS, optional(SIZE)),
    "add_ref_conv": optional(flag),
}

HINT = "wan-fun-control trains Wan2.1-Fun-Control and Wan2.1-Fun-V1.1-Control, 1.3B and 14B."


def check_variant(in_dim: object, *, camera: bool) -> None:
    """Refuse the checkpoints of the Wan2.1-Fun series that are not Control models.

    Raises:
        CheckpointError: a Camera checkpoint, or another number of input channels.
    """
    if camera:
        raise CheckpointError("Camera checkpoints (control_adapter) are not supported.", hint=HINT)
    if in_dim != CONTROL_IN_DIM:
        raise CheckpointError(
            f"the transformer reads {in_dim} channels (in_dim); a Control checkpoint reads {CONTROL_IN_DIM}: noisy, "
            "control and start image latents. 36 are an inpainting (InP) or image-to-video model, 16 text-to-video.",
            hint=HINT,
        )


def read_dims(config: Mapping[str, object]) -> ModelDims:
    """Dimensions from the released ``config.json``.

    Raises:
        CheckpointError: another model's configuration.
    """
    check_variant(config.get("in_dim"), camera=bool(config.get("add_control_adapter")))
    check_fields(config, CONFIG, "the transformer's configuration", hint=HINT)
    stated = {key: cast(int, config[key]) for key in CONFIG if config.get(key) is not None}
    numbers = {**CONFIG_DEFAULTS, **stated}
    return ModelDims(
        dim=numbers["dim"],
        ffn_dim=numbers["ffn_dim"],
        num_layers=numbers["num_layers"],
        extra={
            "text_dim": numbers["text_dim"],
            "freq_dim": numbers["freq_dim"],
            "image_dim": numbers["image_dim"],
            "reference": int(numbers["add_ref_conv"]),
        },
    )


def _reference_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """V1.1 puts one frame of tokens before the clip, whether there is a reference image or not."""
    picture = ClipShape(frames=1, height=shape.height, width=shape.width)
    return SPEC.plan.video_tokens(picture) * dims.extra["reference"]


def sequence_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """Tokens of the self-attention: the clip, and the reference of V1.1. Text and CLIP are only attended to."""
    return SPEC.plan.video_tokens(shape) + _reference_tokens(shape, dims)


def forward_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Matrix products, convolutions and attention of one forward pass; a multiply-add counts two."""
    dim, text_dim, freq_dim, image_dim = dims.dim, *(dims.extra[key] for key in ("text_dim", "freq_dim", "image_dim"))
    video, reference = SPEC.plan.video_tokens(shape), _reference_tokens(shape, dims)
    tokens, context = video + reference, TEXT_TOKENS + IMAGE_TOKENS
    patch = SPEC.plan.patch_size[0] * SPEC.plan.patch_size[1] * SPEC.plan.patch_size[2]
    block = (
        6 * tokens * dim * dim  # self-attention q, k, v, o and cross-attention q, o
        + 2 * context * dim * dim  # k, v of text and of the CLIP embedding
        + 2 * tokens * dim * dims.ffn_dim
    )
    outside = (
        (video * CONTROL_IN_DIM + reference * LATENT_CHANNELS) * patch * dim
        + TEXT_TOKENS * (text_dim + dim) * dim
        + IMAGE_TOKENS * (image_dim + dim) * image_dim
        + (freq_dim + 7 * dim) * dim  # timestep embedding and its six modulation vectors
        + tokens * dim * LATENT_CHANNELS * patch
    )
    return attention_flops(shape, dims) + 2.0 * (dims.num_layers * block + outside)


def attention_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Scores and weighted sums of self-attention, and of cross-attention to text and the CLIP embedding."""
    tokens = sequence_tokens(shape, dims)
    return 4.0 * dims.num_layers * dims.dim * tokens * (tokens + TEXT_TOKENS + IMAGE_TOKENS)


def _without_reference(dims: ModelDims) -> Mapping[SamplingInput, str]:
    return {} if dims.extra["reference"] else {"reference": "only V1.1 models read a reference image"}


DEFAULTS: dict[str, object] = {
    **FULL_FINE_TUNE,
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/Wan2.1-Fun-14B-Control",
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "image_sample_size": 1024,
    "video_sample_size": 256,
    "token_sample_size": 512,
    "video_sample_stride": 2,
    "video_sample_n_frames": 81,
    "video_repeat": 1,
    "checkpointing_steps": 50,
    "output_dir": "output_dir",
    "adam_weight_decay": 3e-2,
    "low_vram": True,
    "train_mode": "control_object",
    "control_ref_image": "first_frame",
}
"""The published command line, as typed there."""

SPEC = FamilySpec(
    name="wan-fun-control",
    summary="Wan2.1-Fun Control, V1.0 and V1.1: video from text, a control clip and a picture",
    adapter="vfun_cli.families.wan_fun_control.adapter:WanFunControlAdapter",
    fields=(
        MetadataField(name="file_path", media="visual"),
        MetadataField(name="control_file_path", media="control", required=False),
    ),
    media_types=("video", "image"),
    releases=tuple(
        Release(
            size=size,
            hugging_face=f"alibaba-pai/Wan2.1-Fun-{size}-Control",
            model_scope=f"PAI/Wan2.1-Fun-{size}-Control",
        )
        for size in ("14B", "1.3B", "V1.1-14B", "V1.1-1.3B")
    ),
    files={**WAN_FILES, "image encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",)},
    train_modes=("control_object", "inpaint", "control_ref", "control"),
    reference_images=("first_frame", "random"),
    model=ModelSpec(
        # Wan2.1-Fun-14B-Control, the published default. V1.1 has one frame of tokens more, as its config.json says.
        released={"in_dim": CONTROL_IN_DIM, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
        read_dims=read_dims,
        vae="Wan2.1_VAE.pth",
        recognises=lambda config: config.get("_class_name") == "WanModel" and config.get("in_dim") == CONTROL_IN_DIM,
        encoders={
            "vae": EncoderSize(weights=0.127),
            "text": EncoderSize(weights=5.681, shared=True),
            "clip": EncoderSize(weights=0.632),
        },
        captions=lambda dims: (captions.umt5(TEXT_TOKENS),),
        block_classes=("WanTransformerBlock",),
        unit_classes=("WanTimeTextImageEmbedding",),
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        objective="flow-matching",
        objective_options={"shift": 5.0},
        sampler="flow-shifted-twice",
        sampler_options={"shift": 5.0},
    ),
    plan=PlanSpec(
        vae_stride=(4, 8, 8),
        patch_size=(1, 2, 2),
        token_size_share=0.5,
        full_size_share=0.9,
        decoded_frames=lambda frames: 2 * frames + 2,  # clip, control, one frame for two encoders
    ),
    sampling=SamplingSpec(  # examples/wan2.1_fun/predict_v2v_control.py and _control_ref.py
        steps=50,
        guidance=6.0,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        frames=49,
        size=(832, 480),
        fps=16,
        optional=("image", "reference", "control"),
        without=_without_reference,
        demo=DEMO_VIDEO,
    ),
    defaults=DefaultOptions(
        train=DEFAULTS,
        by_strategy={"zero3": {"train_mode": "inpaint"}},
        lora={
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "rank": 64,
            "network_alpha": 32,
            "target_name": "q,k,v,ffn.0,ffn.2",
        },
        presets={
            "2025": FIRST,
            "2026": Preset(
                train={
                    "pretrained_model_name_or_path": "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-14B-Control",
                    "image_sample_size": 640,
                    "video_sample_size": 640,
                    "token_sample_size": 640,
                    "train_mode": "control_ref",
                    "control_ref_image": "random",
                }
            ),
        },
        demo={
            **DEMO,
            "image_sample_size": 96,
            "video_sample_stride": 2,
            "dataloader_num_workers": 1,
            "max_train_steps": 8,
            "checkpointing_steps": 4,
            "control_ref_image": "random",
        },
    ),
    export=ExportSpec(
        names={"same": released_name},
        parameter=live_name,
        architecture="wan2.1",
        implementation="https://github.com/Wan-Video/Wan2.1",
    ),
)
