"""Wan2.2-S2V: a talking video from speech, a reference image and a control clip."""

from vfun_cli.families.documented import DEMO_VIDEO, FIRST, FULL_FINE_TUNE, NO_SCHEDULE, WAN_FILES, WAN_NEGATIVE_PROMPT
from vfun_cli.families.spec import (
    DefaultOptions,
    EncoderSize,
    ExportSpec,
    FamilySpec,
    ModelSpec,
    PlanSpec,
    Preset,
    Release,
    SamplingSpec,
)
from vfun_cli.families.wan_s2v.sizes import (
    MOTION_FRAMES,
    RELEASED_CONFIG,
    attention_flops,
    forward_flops,
    read_dims,
    sequence_tokens,
    with_layers,
)
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.modeling.encoders import captions

DEFAULTS: dict[str, object] = {
    **FULL_FINE_TUNE,
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/Wan2.2-S2V-14B",
    "train_data_meta": "datasets/internal_datasets/metadata_control.json",
    "video_sample_size": 640,
    "token_sample_size": 640,
    "video_sample_stride": 1,
    "video_sample_n_frames": 80,
    "checkpointing_steps": 50,
    "output_dir": "output_dir",
    "adam_weight_decay": 3e-2,
    "low_vram": True,
}
"""The published command line, as typed there; its four strategies use the same values."""

SPEC = FamilySpec(
    name="wan-s2v",
    summary="Wan2.2-S2V: talking video from speech, a reference image and a control clip",
    adapter="vfun_cli.families.wan_s2v.adapter:WanS2VAdapter",
    fields=(
        MetadataField(name="file_path", media="visual"),
        MetadataField(name="audio_path", media="audio", otherwise="file_path"),
        MetadataField(name="control_file_path", media="control", required=False),
    ),
    media_types=("video",),
    releases=(Release(size="14B", hugging_face="Wan-AI/Wan2.2-S2V-14B", model_scope="Wan-AI/Wan2.2-S2V-14B"),),
    files={
        **WAN_FILES,
        "audio encoder": (
            "wav2vec2-large-xlsr-53-english/*.json",
            "wav2vec2-large-xlsr-53-english/model.safetensors",
        ),
    },
    reference_images=("first_frame", "random"),
    fixed_flags={"boundary_type": "full", "motion_frames": MOTION_FRAMES},
    model=ModelSpec(
        released=RELEASED_CONFIG,
        layers=("num_layers", "audio_inject_layers"),
        with_layers=with_layers,
        read_dims=read_dims,
        vae="Wan2.1_VAE.pth",
        recognises=lambda config: config.get("model_type") == "s2v",
        encoders={
            "vae": EncoderSize(weights=0.127),
            "text": EncoderSize(weights=5.681, shared=True),
            "speech": EncoderSize(weights=0.315, float32=True),
        },
        captions=lambda dims: (captions.umt5(dims.extra["text_len"]),),
        block_classes=("WanS2VBlock",),
        unit_classes=("InjectedAttention", "AudioAdaNorm", "AudioMotionEncoder", "TimeProjection"),
        injection_classes=("AudioInjector",),
        sequence_tokens=sequence_tokens,
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        objective="flow-matching",
        objective_options={"shift": 3.0},
        sampler="flow-shifted-twice",
        sampler_options={"shift": 3.0},
    ),
    plan=PlanSpec(
        vae_stride=(4, 8, 8),
        patch_size=(1, 2, 2),
        first_frame_alone=False,
        reference_frame=True,
        strides_to_max_fps=30,
        smallest_side=64,
        lowest_video_size=256,
        full_size_share=0.9,
        encoded_frames=lambda frames: MOTION_FRAMES + frames,
        # Clip and control, the history, the reference and the first frame again; at most a few frames' worth of sound.
        decoded_frames=lambda frames: 2 * frames + MOTION_FRAMES + 7,
    ),
    sampling=SamplingSpec(  # examples/wan2.2/predict_s2v.py
        steps=40,
        guidance=4.5,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        frames=80,
        size=(832, 480),
        fps=16,
        required=("image", "audio"),
        optional=("control",),
        by_sound=True,
        demo={**DEMO_VIDEO, "frames": 16},
    ),
    defaults=DefaultOptions(
        train=DEFAULTS,
        lora={"rank": 64, "network_alpha": 32, "target_name": "q,k,v,ffn.0,ffn.2", "learning_rate": 1e-4},
        presets={
            "2025": FIRST,
            "2026": Preset(train={"video_sample_stride": 2, "control_ref_image": "random"}, lora=NO_SCHEDULE),
        },
        demo={
            "video_sample_size": 96,
            "token_sample_size": 96,
            "video_sample_n_frames": 16,
            "dataloader_num_workers": 1,
            "learning_rate": 4e-3,
            "lr_warmup_steps": 0,
            "max_grad_norm": 1.0,
            "max_train_steps": 8,
            "checkpointing_steps": 4,
            "low_vram": False,
        },
    ),
    export=ExportSpec(
        architecture="wan2.2-s2v",
        implementation="https://github.com/Wan-Video/Wan2.2",
        lora_formats={"peft": "peft", "comfyui": "comfyui", "original": "original"},  # diffusers has no Wan-S2V
    ),
)
