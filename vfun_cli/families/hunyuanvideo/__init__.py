"""HunyuanVideo text-to-video and image-to-video: one 13B architecture, two released directories."""

from collections.abc import Mapping
from typing import Any, Literal

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.families.documented import (
    DEMO,
    DEMO_VIDEO,
    DIFFUSERS_FILES,
    ENGLISH_NEGATIVE_PROMPT,
    FIRST,
    FULL_FINE_TUNE,
    NO_SCHEDULE,
    SECOND_TEXT_ENCODER,
)
from vfun_cli.families.hunyuanvideo.comfyui import comfyui_location, original_location
from vfun_cli.families.hunyuanvideo.sizes import (
    ASSISTANT_TOKENS,
    IMAGE_INTERLEAVE,
    PATCH_SIZE,
    PROMPT_TOKENS,
    SHIFT,
    VAE_STRIDE,
    Condition,
    attention_flops,
    dims_reader,
    fits,
    forward_flops,
    released,
    sequence_tokens,
)
from vfun_cli.families.spec import (
    DefaultOptions,
    EncoderSize,
    ExportSpec,
    FamilySpec,
    ModelSpec,
    PlanSpec,
    Preset,
    Release,
    SamplingInput,
    SamplingSpec,
)
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.modeling.encoders import captions

# The published command line, the same for single process, ZeRO-2 and FSDP.
_DEFAULTS: Mapping[str, Any] = {
    **FULL_FINE_TUNE,
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "image_sample_size": 640,
    "video_sample_size": 640,
    "token_sample_size": 640,
    "video_sample_stride": 2,
    "video_sample_n_frames": 81,
    "video_repeat": 1,
    "checkpointing_steps": 50,
    "output_dir": "output_dir2",
    "adam_weight_decay": 3e-2,
    "low_vram": True,
}

# Attention and feed-forward of both streams. The original's "ff.0, ff.2" name no module of this model.
_LORA: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "rank": 64,
    "network_alpha": 32,
    "target_name": (
        "to_q",
        "to_k",
        "to_v",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
}

_LORA_ALIASES = {
    "ff.0": "ff.net.0.proj",
    "ff.2": "ff.net.2",
    "ff_context.0": "ff_context.net.0.proj",
    "ff_context.2": "ff_context.net.2",
}


def _spec(
    condition: Condition,
    *,
    summary: str,
    adapter: str,
    media_types: tuple[Literal["video", "image"], ...],
    train_mode: str,
    block_classes: tuple[str, ...],
    model_dir: str,
    video_size: tuple[int, int],
    required: tuple[SamplingInput, ...] = (),
    more_files: Mapping[str, tuple[str, ...]] = {},
) -> FamilySpec:
    cut = {"t2v": 0, "i2v": ASSISTANT_TOKENS}[condition]  # of a caption that is too long, the last four go beside
    return FamilySpec(
        name=f"hunyuanvideo-{condition}",
        summary=summary,
        adapter=f"vfun_cli.families.hunyuanvideo.adapter:{adapter}",
        fields=(MetadataField(name="file_path", media="visual"),),
        media_types=media_types,
        releases=(Release(size="13B", hugging_face=f"hunyuanvideo-community/{model_dir}"),),
        files={**DIFFUSERS_FILES, **SECOND_TEXT_ENCODER, **more_files},
        train_modes=(train_mode,),
        fixed_flags={"num_hidden_layers_to_skip": 2, "image_embed_interleave": IMAGE_INTERLEAVE},
        model=ModelSpec(
            released=released(condition),
            layers=("num_layers", "num_single_layers"),
            read_dims=dims_reader(condition),
            recognises=lambda config: fits(config, condition),
            config_file="transformer/config.json",
            encoders={
                "vae": EncoderSize(weights=0.246),
                "prompt": EncoderSize(weights={"t2v": 7.505, "i2v": 7.812}[condition], shared=True),
                "pooled": EncoderSize(weights=0.123),
            },
            captions=lambda dims: (captions.instructed("tokenizer", PROMPT_TOKENS, cut), captions.clip("tokenizer_2")),
            block_classes=block_classes,
            unit_classes=("HunyuanVideoTokenRefiner",),
            blocks=lambda dims: dims.num_layers + dims.extra["num_single_layers"],
            sequence_tokens=sequence_tokens,
            forward_flops=forward_flops,
            attention_flops=attention_flops,
            objective="flow-matching",
            objective_options={"shift": SHIFT},
            embedded_guidance=lambda dims: bool(dims.extra["guidance_embeds"]),
            sampler="flow-shifted-once",
            sampler_options={"shift": SHIFT},
        ),
        plan=PlanSpec(
            vae_stride=VAE_STRIDE,
            patch_size=PATCH_SIZE,
            decoded_frames=lambda frames: frames + 2,  # the first one for two encoders
        ),
        sampling=SamplingSpec(  # examples/hunyuanvideo/predict_t2v.py and predict_i2v.py
            steps=40,
            guidance=1.0,  # off: what guides these models is an input of theirs
            negative_prompt=ENGLISH_NEGATIVE_PROMPT,
            frames=81,
            size=video_size,
            fps=16,
            required=required,
            demo=DEMO_VIDEO,
        ),
        defaults=DefaultOptions(
            train={
                **_DEFAULTS,
                "pretrained_model_name_or_path": f"models/Diffusion_Transformer/{model_dir}",
                "train_mode": train_mode,
            },
            lora=_LORA,
            lora_aliases=_LORA_ALIASES,
            presets={"2025": FIRST, "2026": Preset(lora=NO_SCHEDULE)},
            demo=DEMO,
        ),
        export=ExportSpec(
            names={"same": unchanged, "diffusers": unchanged},
            architecture="hunyuan-video",
            implementation="https://github.com/Tencent/HunyuanVideo",
            comfyui_location=comfyui_location,
            original_location=original_location,
        ),
    )


T2V = _spec(
    "t2v",
    summary="HunyuanVideo, text to video (13B)",
    adapter="TextToVideoAdapter",
    media_types=("video", "image"),
    train_mode="normal",
    block_classes=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    model_dir="HunyuanVideo",
    video_size=(832, 480),
)

I2V = _spec(
    "i2v",
    summary="HunyuanVideo-I2V, first frame to video (13B, the 16-channel token-replace model)",
    adapter="ImageToVideoAdapter",
    # The first latent frame is given. A picture has no other, so it teaches this model nothing.
    media_types=("video",),
    train_mode="i2v",
    block_classes=("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    model_dir="HunyuanVideo-I2V",
    video_size=(480, 832),
    required=("image",),
    more_files={"image processor": ("image_processor/*",)},
)
