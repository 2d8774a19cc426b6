"""Which script of the originals trains what, and what it does where nothing is said: facts of their parsers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES, find

COMMON: Mapping[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 1e-2,
    "checkpointing_steps": 500,
    "dataloader_num_workers": 0,
    "enable_bucket": False,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "none",
    "learning_rate": 1e-4,
    "low_vram": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "max_grad_norm": 1.0,
    "num_train_epochs": 100,
    "output_dir": "sd-model-finetuned",
    "random_frame_crop": False,
    "random_hw_adapt": False,
    "report_to": "tensorboard",
    "token_sample_size": 512,
    "train_batch_size": 16,
    "training_with_video_token_length": False,
    "uniform_sampling": False,
    "use_ema": False,
    "vae_mini_batch": 32,
    "video_sample_n_frames": 17,
    "video_sample_size": 512,
    "video_sample_stride": 4,
}
"""Defaults of all the parsers."""

IMAGES = {"image_sample_size": 512}
ADAPTERS = {"network_alpha": 64, "rank": 128}
CONTROL = {"control_ref_image": "first_frame", "train_mode": "control"}

WITHOUT_DEFAULT = (
    "checkpoints_total_limit", "max_train_steps", "mixed_precision", "pretrained_model_name_or_path",
    "resume_from_checkpoint", "seed", "target_name", "train_data_dir", "train_data_meta", "trainable_modules",
    "trainable_modules_low_learning_rate", "validation_audio_paths", "validation_epochs", "validation_image_paths",
    "validation_paths", "validation_prompts", "validation_steps", "video_repeat",
)  # fmt: skip
"""Options of the originals that say nothing where they are left out, or crash."""

WITH_VALIDATION = {"validation_epochs": 5, "validation_steps": 2000}
"""Defaults that count once there are prompts."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One training script."""

    path: str
    """Its folder and name."""
    families: tuple[str, ...]
    command: str = "train"
    told_by: str | None = None
    """The option that tells the family, if there are several: its values are the keys of ``values``."""
    values: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    """Defaults beside ``COMMON``."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What the script does where an option is left out."""
        return {**COMMON, **self.own}


_HUNYUAN = {"normal": "hunyuanvideo-t2v", "i2v": "hunyuanvideo-i2v"}
_EASYANIMATE = {"flow": "easyanimate-v5.1-control", "ddpm": "easyanimate-v5-control"}

TRAINERS: tuple[Trainer, ...] = (
    Trainer(path="wan2.2/train_s2v.py", families=("wan-s2v",), own={"control_ref_image": "first_frame"}),
    Trainer(
        path="wan2.2/train_s2v_lora.py",
        families=("wan-s2v",),
        command="lora",
        own={**ADAPTERS, "control_ref_image": "first_frame"},
    ),
    Trainer(path="wan2.1_fun/train_control.py", families=("wan-fun-control",), own={**IMAGES, **CONTROL}),
    Trainer(
        path="wan2.1_fun/train_control_lora.py",
        families=("wan-fun-control",),
        command="lora",
        own={**IMAGES, **ADAPTERS, **CONTROL},
    ),
    Trainer(
        path="hunyuanvideo/train.py",
        families=tuple(_HUNYUAN.values()),
        told_by="train_mode",
        values=_HUNYUAN,
        own={**IMAGES, "train_mode": "normal"},
    ),
    Trainer(
        path="hunyuanvideo/train_lora.py",
        families=tuple(_HUNYUAN.values()),
        command="lora",
        told_by="train_mode",
        values=_HUNYUAN,
        own={**IMAGES, **ADAPTERS, "train_mode": "normal"},
    ),
    Trainer(path="cogvideox_fun/train.py", families=("cogvideox-fun",), own={**IMAGES, "train_mode": "normal"}),
    Trainer(
        path="cogvideox_fun/train_lora.py",
        families=("cogvideox-fun",),
        command="lora",
        own={**IMAGES, **ADAPTERS, "train_mode": "normal"},
    ),
    Trainer(
        path="scripts/train_control.py",
        families=tuple(_EASYANIMATE.values()),
        told_by="loss_type",
        values=_EASYANIMATE,
        own={**IMAGES, **CONTROL, "loss_type": "sigma"},
    ),
)

MODELS: Mapping[str, str] = {
    "wan-s2v": r"s2v",
    "wan-fun-control": r"wan2\.1.?fun.*control",
    "hunyuanvideo-i2v": r"hunyuan.?video.?i2v",
    "hunyuanvideo-t2v": r"hunyuan.?video",
    "easyanimate-v5.1-control": r"easyanimate.?v5\.1|easyanimate_video_v5\.1",
    "easyanimate-v5-control": r"easyanimate.?v5|easyanimate_video_v5",
    "cogvideox-fun": r"cogvideox.?fun",
}
"""What paths of a family's models and configuration files contain; the first that fits is meant."""


def trainer_of(script: str, where: str, family: str | None) -> Trainer:
    """The training script at this path. ``where`` begins the message of an error; ``family``: as the user says.

    Raises:
        ConfigError: vfun trains none of its models.
    """
    path = PurePosixPath(script)
    folder = path.parent.name
    named = f"{folder}/{path.name}" if folder else path.name
    found = [trainer for trainer in TRAINERS if trainer.path == named or (not folder and _name(trainer) == path.name)]
    if family is not None:
        find(family)
        fitting = [trainer for trainer in found if family in trainer.families]
        command = "lora" if "lora" in path.stem else "train"
        every = [trainer for trainer in TRAINERS if family in trainer.families]
        alike = [trainer for trainer in every if trainer.command == command] or every
        found = fitting or [_as(alike[0], command)]
    if not found:
        raise ConfigError(
            f"{where}: {script} trains none of the models that vfun trains.",
            hint=f"If the model is of one of these families, add --family: {', '.join(FAMILIES)}.",
            option="--family",
        )
    if len(found) > 1:
        raise ConfigError(
            f"{where}: {script} may be any of {', '.join(trainer.path for trainer in found)}.",
            hint=f"Say which family it trains: --family {' or '.join(_families(found))}.",
            option="--family",
        )
    return found[0]


def _name(trainer: Trainer) -> str:
    return PurePosixPath(trainer.path).name


def _as(trainer: Trainer, command: str) -> Trainer:
    """The same for another command: EasyAnimate's control script knows no LoRA."""
    own = {**trainer.own, **(ADAPTERS if command == "lora" else {})}
    return Trainer(path=trainer.path, families=trainer.families, command=command, own=own)


def _families(trainers: list[Trainer]) -> list[str]:
    return sorted({family for trainer in trainers for family in trainer.families})


def family_of(trainer: Trainer, values: Mapping[str, str], where: str, family: str | None) -> str:
    """The family that a script trains with these options, by name as they are typed.

    Raises:
        ConfigError: nothing tells.
    """
    if family is not None:
        return family
    if len(trainer.families) == 1:
        return trainer.families[0]
    assert trainer.told_by is not None
    value = values.get(trainer.told_by, str(trainer.defaults[trainer.told_by]))
    if value in trainer.values:
        return trainer.values[value]
    paths = " ".join(values.get(name, "") for name in ("pretrained_model_name_or_path", "config_path"))
    for name, pattern in MODELS.items():
        if name in trainer.families and re.search(pattern, paths, re.IGNORECASE):
            return name
    raise ConfigError(
        f"{where}: --{trainer.told_by} {value} does not tell which family is trained.",
        hint=f"Say which: --family {' or '.join(trainer.families)}.",
        option="--family",
    )
