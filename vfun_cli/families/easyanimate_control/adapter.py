"""EasyAnimate Control in the trainer's terms: what is decoded, encoded and handed to the transformer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import EasyAnimateTransformer3DModel
from torch import Tensor, nn

from vfun_cli.errors import ConfigError
from vfun_cli.families.easyanimate_control import CAPTION_TOKENS, V5, V5_1, check_options, complete_config
from vfun_cli.families.easyanimate_control.transformer import load_transformer
from vfun_cli.families.spec import FamilySpec
from vfun_cli.training.adapter import AdapterOptions, Conditions, Sample, SampleRequest
from vfun_cli.training.clips import read_clip
from vfun_cli.training.encoders.bert_t5 import PaddedText, load_bert, load_t5
from vfun_cli.training.encoders.magvit_vae import MagvitVAE
from vfun_cli.training.encoders.placement import encoding_on
from vfun_cli.training.encoders.qwen2_vl import Qwen2VLText
from vfun_cli.training.loading import read_json
from vfun_cli.training.randomness import SampleKey

TEXT_DROP = 0.10
CONTROL_DROP = 0.20
REFERENCE_DROP = 0.20
"""Independent of each other, per sample (spec section 6)."""

TextEncoders = dict[str, Qwen2VLText | PaddedText]
"""By the name of the transformer's argument that reads their output."""


class EasyAnimateControl(ABC):
    """What V5.1 and V5 share; a subclass says how it reads captions."""

    spec: ClassVar[FamilySpec]

    def __init__(
        self,
        transformer: EasyAnimateTransformer3DModel,
        vae: MagvitVAE,
        text: TextEncoders,
        options: AdapterOptions,
    ) -> None:
        self.transformer: EasyAnimateTransformer3DModel = transformer
        self.vae = vae
        self.text = text
        self.options = options
        self.train_mode = options.train_mode or self.spec.train_modes[0]
        self._check_channels()

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "EasyAnimateControl":
        """See :class:`~vfun_cli.training.adapter.ModelAdapter`.

        Raises ConfigError for options this family cannot train with, CheckpointError for a directory that does not fit.
        """
        asked = {
            **options.family,
            "train_mode": options.train_mode,
            "control_ref_image": options.control_ref_image,
        }
        check_options(asked, cls.spec.name)
        folder, dtype = options.model_dir, options.compute_dtype
        config = complete_config(read_json(folder / cls.spec.config_file))
        _check_family(config, cls.spec, folder)
        vae = MagvitVAE.from_folder(folder / "vae", dtype=dtype, mini_batch=options.vae_mini_batch)
        text = cls.load_text(folder, dtype)
        transformer = load_transformer(folder / "transformer", config)
        return cls(transformer, vae, text, options)

    @staticmethod
    @abstractmethod
    def load_text(folder: Path, dtype: torch.dtype) -> TextEncoders:
        """The text encoders of a model directory."""

    @staticmethod
    def load(request: SampleRequest, options: Mapping[str, Any]) -> Sample:
        """``text``, ``pixels`` and ``control``, both float32 [F, 3, H, W]; the control clip shows the same frames."""
        usable = V5_1.usable_span
        return {
            "text": request.record["text"],
            "pixels": read_clip(request, usable_span=usable),
            "control": read_clip(request, "control_file_path", usable_span=usable),
        }

    def encode(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, C, F, H, W] and ``control_latents`` [B, C or 2C, F, H, W], float32; text [B, 256, channels] each.

        The control latents and the reference are each left out of one sample in five, the caption of one in ten.
        """
        with encoding_on(self.vae, self.options.device, low_vram=self.options.low_vram):
            latents = self._encode_pixels([sample["pixels"] for sample in samples], keys, "vae-clip")
            control = self._encode_pixels([sample["control"] for sample in samples], keys, "vae-control")
            conditioning = [_drop(control, keys, "control-drop", CONTROL_DROP)]
            if self.train_mode == "control_ref":
                conditioning.append(self._reference(samples, keys, like=latents))
        captions = [
            "" if key.chance("text-drop", TEXT_DROP) else str(sample["text"])
            for sample, key in zip(samples, keys, strict=True)
        ]
        conditions: Conditions = {"control_latents": torch.cat(conditioning, dim=1)}
        for argument, encoder in self.text.items():
            with encoding_on(encoder, self.options.device, low_vram=self.options.low_vram):
                conditions[argument] = encoder.encode(captions)
        return latents, conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """[B, C, F, H, W] like ``noisy``; everything enters in the dtype of ``noisy``, timesteps as they are."""
        inputs = {name: value.to(noisy) for name, value in conditions.items()}
        prediction: Tensor = transformer(noisy, timesteps, return_dict=False, **inputs)[0]
        return prediction

    def _encode_pixels(self, clips: Sequence[Tensor], keys: Sequence[SampleKey], purpose: str) -> Tensor:
        """Sampled latents [B, C, f, h, w] of clips [F, 3, H, W], each with its own noise."""
        pixels = torch.stack(list(clips)).transpose(1, 2).to(self.options.device)  # [B, 3, F, H, W]
        shape = self.vae.latent_shape(*pixels.shape[2:])
        return self.vae.encode(pixels, torch.stack([key.normal(purpose, shape) for key in keys]))

    def _reference(self, samples: Sequence[Sample], keys: Sequence[SampleKey], *, like: Tensor) -> Tensor:
        """The clip's first frame at latent frame 0, zeros after it, [B, C, F, H, W].

        Zeros alone for an image, where the reference would be the target itself: the original means to skip images
        and compares the number of channels instead of frames.
        """
        reference = torch.zeros_like(like)
        if like.shape[2] > 1:
            first = self._encode_pixels([sample["pixels"][:1] for sample in samples], keys, "vae-reference")
            reference[:, :, :1] = _drop(first, keys, "reference-drop", REFERENCE_DROP)
        return reference

    def _check_channels(self) -> None:
        """The train mode decides how many channels enter the transformer."""
        latent, has = self.vae.latent_channels, self.transformer.config.in_channels
        parts = {"control": 2, "control_ref": 3}
        if has == parts[self.train_mode] * latent:
            return
        fitting = next((mode for mode, count in parts.items() if has == count * latent), None)
        raise ConfigError(
            f"train_mode {self.train_mode!r} gives the transformer {parts[self.train_mode] * latent} channels "
            f"(noisy, control{', reference' if self.train_mode == 'control_ref' else ''}); "
            f"the model in {self.options.model_dir} reads {has}",
            hint=f"use --train_mode={fitting}" if fitting else "this is not a Control model: use a ...-zh-Control one",
        )


class EasyAnimateV51(EasyAnimateControl):
    """V5.1: captions through Qwen2-VL, flow matching."""

    spec = V5_1

    @staticmethod
    def load_text(folder: Path, dtype: torch.dtype) -> TextEncoders:
        """Qwen2-VL."""
        encoder = Qwen2VLText.from_folders(
            folder / "text_encoder", folder / "tokenizer", dtype=dtype, length=CAPTION_TOKENS
        )
        return {"encoder_hidden_states": encoder}


class EasyAnimateV5(EasyAnimateControl):
    """V5: captions through BERT and mT5, DDPM."""

    spec = V5

    @staticmethod
    def load_text(folder: Path, dtype: torch.dtype) -> TextEncoders:
        """BERT, then mT5: the order in which the transformer joins them."""
        return {
            "encoder_hidden_states": load_bert(
                folder / "text_encoder", folder / "tokenizer", dtype=dtype, length=CAPTION_TOKENS
            ),
            "encoder_hidden_states_t5": load_t5(
                folder / "text_encoder_2", folder / "tokenizer_2", dtype=dtype, length=CAPTION_TOKENS
            ),
        }


def _check_family(config: Mapping[str, Any], spec: FamilySpec, folder: Path) -> None:
    """V5 has two text streams, V5.1 one: tell them apart before gigabytes are read."""
    other = {V5.name: V5_1.name, V5_1.name: V5.name}[spec.name]
    streams = 2 if config["text_embed_dim_t5"] else 1
    if streams != spec.dims.extra["text_streams"]:
        raise ConfigError(
            f"{folder} looks like {other}, not {spec.name}: its transformer reads {streams} text stream(s)",
            hint=f"run vfun train {other}",
        )


def _drop(latents: Tensor, keys: Sequence[SampleKey], purpose: str, probability: float) -> Tensor:
    """Zeros instead of some samples' latents, each by its own draw."""
    kept = torch.tensor([not key.chance(purpose, probability) for key in keys], device=latents.device)
    return latents * kept.view(-1, 1, 1, 1, 1)
