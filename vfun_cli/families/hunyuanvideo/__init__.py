"""HunyuanVideo text-to-video and image-to-video: one 13B architecture, two released directories."""

from collections.abc import Mapping
from typing import Any

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.families.documented import DEMO, FULL_FINE_TUNE
from vfun_cli.families.hunyuanvideo.comfyui import comfyui_location
from vfun_cli.families.hunyuanvideo.sizes import (
    PATCH_SIZE,
    SHIFT,
    VAE_STRIDE,
    Condition,
    attention_flops,
    dims_reader,
    fits,
    forward_flops,
    released_dims,
    sequence_tokens,
)
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.fields import MetadataField

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


def _spec(condition: Condition, **own: Any) -> FamilySpec:
    return FamilySpec(
        name=f"hunyuanvideo-{condition}",
        fields=(MetadataField(name="file_path", media="visual"),),
        vae_stride=VAE_STRIDE,
        patch_size=PATCH_SIZE,
        objective="flow-matching",
        objective_options={"shift": SHIFT},
        dims=released_dims(condition),
        read_dims=dims_reader(condition),
        recognises=lambda config: fits(config, condition),
        config_file="transformer/config.json",
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        lora_defaults=_LORA,
        lora_aliases=_LORA_ALIASES,
        demo=DEMO,
        export_names={"same": unchanged, "diffusers": unchanged},
        comfyui_location=comfyui_location,
        **own,
    )


T2V = _spec(
    "t2v",
    summary="HunyuanVideo, text to video (13B)",
    adapter="vfun_cli.families.hunyuanvideo.adapter:TextToVideoAdapter",
    media_types=("video", "image"),
    block_classes=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    defaults={
        **_DEFAULTS,
        "pretrained_model_name_or_path": "models/Diffusion_Transformer/HunyuanVideo",
        "train_mode": "normal",
    },
    train_modes=("normal",),
    demo_builder="vfun_cli.demo.hunyuanvideo:build_t2v",
)

I2V = _spec(
    "i2v",
    summary="HunyuanVideo-I2V, first frame to video (13B, the 16-channel token-replace model)",
    adapter="vfun_cli.families.hunyuanvideo.adapter:ImageToVideoAdapter",
    # The first latent frame is given. A picture has no other, so it teaches this model nothing.
    media_types=("video",),
    block_classes=("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    defaults={
        **_DEFAULTS,
        "pretrained_model_name_or_path": "models/Diffusion_Transformer/HunyuanVideo-I2V",
        "train_mode": "i2v",
    },
    train_modes=("i2v",),
    demo_builder="vfun_cli.demo.hunyuanvideo:build_i2v",
)
