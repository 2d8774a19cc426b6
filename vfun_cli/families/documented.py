"""What the published command lines of all families have in common, and what their demos do."""

from collections.abc import Mapping

from vfun_cli.families.spec import Preset

COMMON: Mapping[str, object] = {
    "train_data_dir": "datasets/internal_datasets/",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "num_train_epochs": 100,
    "seed": 42,
    "gradient_checkpointing": "block",
    "mixed_precision": "bf16",
    "adam_epsilon": 1e-10,
    "vae_mini_batch": 1,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "enable_bucket": True,
}

FULL_FINE_TUNE: Mapping[str, object] = {
    **COMMON,
    "learning_rate": 2e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 100,
    "uniform_sampling": True,
    "trainable_modules": ".",
}
"""Everything but CogVideoX-Fun, whose document trains LoRA."""

NO_SCHEDULE: Mapping[str, object] = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
"""Of a command line that names none: the scripts' own default."""

FIRST = Preset()
"""The documents that the defaults are of."""

DEMO: Mapping[str, object] = {
    "image_sample_size": 64,
    "video_sample_size": 64,
    "token_sample_size": 64,
    "video_sample_stride": 1,
    "video_sample_n_frames": 9,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "learning_rate": 4e-3,
    "max_grad_norm": 1.0,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "low_vram": False,
}
"""Four steps of a tiny model on tiny clips, in seconds on a CPU."""

DEMO_VIDEO: Mapping[str, object] = {"steps": 4, "frames": 9, "size": (64, 64)}
"""The same of ``vfun generate``."""

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
"""Of the predict scripts of Wan2.2-S2V and Wan2.1-Fun; a setting of the released models, as its words stand there."""

ENGLISH_NEGATIVE_PROMPT = (
    "The video is not of a high quality, it has a low resolution. Watermark present in each frame. The background is "
    "solid. Strange body and strange trajectory. Distortion. "
)
"""Of the predict scripts of CogVideoX-Fun and HunyuanVideo; the blank at its end is theirs."""
