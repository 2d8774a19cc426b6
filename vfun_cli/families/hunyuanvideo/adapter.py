"""HunyuanVideo in the terms of the trainer: released folders in, latents, conditions and predictions out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.families.hunyuanvideo.sizes import IMAGE_INTERLEAVE, PROMPT_TOKENS, SHIFT, Condition, check_config
from vfun_cli.training.adapter import AdapterOptions, Conditions, Sample, SampleRequest
from vfun_cli.training.clips import read_clip
from vfun_cli.training.encoders.clip_text import ClipPooledText
from vfun_cli.training.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.training.encoders.llama_prompt import LlamaPrompt
from vfun_cli.training.encoders.llava_prompt import LlavaPrompt
from vfun_cli.training.encoders.placement import encoding_on
from vfun_cli.training.loading import empty_model, load_weights, read_json, safetensors_files
from vfun_cli.training.randomness import SampleKey

TEXT_DROP = 0.1
"""How often a caption is left out, for classifier-free guidance."""
GUIDANCE_SCALE = 6.0
"""The embedded guidance that these guidance-distilled models are trained and sampled at."""


class HunyuanVideoAdapter:
    """What the two families share: VAE, pooled CLIP text, transformer, guidance."""

    condition: ClassVar[Condition]

    def __init__(
        self,
        *,
        transformer: HunyuanVideoTransformer3DModel,
        vae: HunyuanVAE,
        prompt: nn.Module,
        pooled: ClipPooledText,
        options: AdapterOptions,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.prompt = prompt
        self.pooled = pooled
        self.options = options

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> Self:
        """The released diffusers directory, offline; transformer float32, encoders in the compute dtype.

        Raises CheckpointError for an incomplete or foreign directory, ConfigError for another family's.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        _check_shift(folder / "scheduler" / "scheduler_config.json")
        return cls(
            transformer=load_transformer(folder / "transformer", cls.condition),
            vae=HunyuanVAE(load_vae(folder / "vae", dtype), mini_batch=options.vae_mini_batch),
            prompt=cls._load_prompt(folder, dtype),
            pooled=ClipPooledText.from_folders(folder / "text_encoder_2", folder / "tokenizer_2", dtype=dtype),
            options=options,
        )

    @classmethod
    def _load_prompt(cls, folder: Path, dtype: torch.dtype) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def load(request: SampleRequest, options: Mapping[str, Any]) -> Sample:
        """``pixels`` [F, 3, H, W] float32 in [-1, 1] and ``text``. Raises MetadataError for an unreadable file."""
        return {"pixels": read_clip(request), "text": request.record.get("text") or ""}

    def encode(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, f, h, w] float32 and what ``predict`` needs; the clips of a micro-batch have one shape."""
        device, low_vram = self.options.device, self.options.low_vram
        pixels = torch.stack([sample["pixels"] for sample in samples]).transpose(1, 2)  # [B, 3, F, H, W]
        captions = [
            "" if key.chance("text-drop", TEXT_DROP) else str(sample["text"])
            for sample, key in zip(samples, keys, strict=True)
        ]
        with encoding_on(self.vae, device, low_vram=low_vram):
            latents = self.vae.encode(pixels, keys)
            conditions = self._image_conditions(pixels, latents)
        with encoding_on(self.prompt, device, low_vram=low_vram):
            text, mask = self._encode_prompt(captions, pixels)
        with encoding_on(self.pooled, device, low_vram=low_vram):
            pooled = self.pooled.encode(captions)
        # In bf16 this is 6016, not 6000: the value the released models are sampled with.
        guidance = torch.full((len(samples),), GUIDANCE_SCALE, device=device, dtype=self.options.compute_dtype) * 1000
        return latents, {**conditions, "text": text, "text_mask": mask, "pooled": pooled, "guidance": guidance}

    def _image_conditions(self, pixels: Tensor, latents: Tensor) -> Conditions:
        """Conditions taken from the clip itself; the VAE is on its device while this runs."""
        return {}

    def _encode_prompt(self, captions: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, 16, f, h, w], in the compute dtype like the inputs."""
        text = conditions["text"]
        prediction: Tensor = transformer(
            hidden_states=noisy.to(text.dtype),
            timestep=timesteps,
            encoder_hidden_states=text,
            encoder_attention_mask=conditions["text_mask"],
            pooled_projections=conditions["pooled"],
            guidance=conditions["guidance"] if self.transformer.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return prediction


class TextToVideoAdapter(HunyuanVideoAdapter):
    """Captions only; every latent frame is noised and counts."""

    condition = "t2v"
    prompt: LlamaPrompt

    @classmethod
    def _load_prompt(cls, folder: Path, dtype: torch.dtype) -> LlamaPrompt:
        return LlamaPrompt.from_folders(
            folder / "text_encoder", folder / "tokenizer", dtype=dtype, max_length=PROMPT_TOKENS
        )

    def _encode_prompt(self, captions: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.prompt.encode(captions)


class ImageToVideoAdapter(HunyuanVideoAdapter):
    """The first frame is given, to LLaVA as an image and to the transformer as its first latent frame."""

    condition = "i2v"
    prompt: LlavaPrompt

    @classmethod
    def _load_prompt(cls, folder: Path, dtype: torch.dtype) -> LlavaPrompt:
        return LlavaPrompt.from_folders(
            folder / "text_encoder",
            folder / "tokenizer",
            folder / "image_processor",
            dtype=dtype,
            max_length=PROMPT_TOKENS,
            interleave=IMAGE_INTERLEAVE,
        )

    def _image_conditions(self, pixels: Tensor, latents: Tensor) -> Conditions:
        """The latent of the image alone, as in inference, and the mask that leaves it out of the loss.

        The clip's own first latent will not do: the encoder normalises over the whole temporal window.
        """
        mask = latents.new_ones(len(latents), 1, latents.shape[2], 1, 1)
        mask[:, :, :1] = 0
        return {"first_latent": self.vae.encode(pixels[:, :, :1]), "loss_mask": mask}

    def _encode_prompt(self, captions: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.prompt.encode(captions, pixels[:, :, 0])

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """As the base class, with the given latent in place of the first noisy frame."""
        given = torch.cat([conditions["first_latent"].to(noisy), noisy[:, :, 1:]], dim=2)
        return super().predict(transformer, given, timesteps, conditions)


def load_transformer(folder: Path, condition: Condition) -> HunyuanVideoTransformer3DModel:
    """The released transformer in float32 on the CPU.

    Raises ConfigError if the directory is another family's, CheckpointError if the tensors do not fit.
    """
    config = read_json(folder / "config.json")
    check_config(config, condition)
    model = empty_model(lambda: HunyuanVideoTransformer3DModel.from_config(config))
    load_weights(model, safetensors_files(folder), where=str(folder), transformer=True)
    return model


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLHunyuanVideo:
    """The released VAE. Raises CheckpointError if the tensors do not fit."""
    config = read_json(folder / "config.json")
    model = empty_model(lambda: AutoencoderKLHunyuanVideo.from_config(config))
    load_weights(model, safetensors_files(folder), dtype=dtype, where=str(folder))
    return model


def _check_shift(path: Path) -> None:
    """The objective trains with the released models' shift; raise CheckpointError if the scheduler has another."""
    shift = read_json(path).get("shift")
    if shift != SHIFT:
        raise CheckpointError(
            f"{path} has shift {shift}; the released HunyuanVideo models have {SHIFT}, and so does the training",
            hint="use the scheduler folder of the released model",
        )
