"""CogVideoX-Fun in the trainer's terms: what is decoded, encoded and handed to the transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfun_cli.errors import ConfigError
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.masks import draw_mask
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer, load_transformer
from vfun_cli.training.adapter import AdapterOptions, Conditions, Sample, SampleRequest
from vfun_cli.training.clips import read_clip
from vfun_cli.training.encoders.bert_t5 import PaddedText, load_t5
from vfun_cli.training.encoders.cogvideox_vae import CogVideoXVAE
from vfun_cli.training.encoders.placement import encoding_on
from vfun_cli.training.loading import read_json
from vfun_cli.training.randomness import SampleKey

TEXT_DROP = 0.1
"""How often a caption is left out, for classifier-free guidance."""
EMPTY_DROP = 0.9
"""How often a clip without any known pixel gets zeros instead of the latents of an all-masked clip."""
MASKED = -1.0
"""What pixels to be generated are set to: black."""


class CogVideoXFunAdapter:
    """Noisy latents beside a mask and the latents of the known pixels, with a caption."""

    def __init__(
        self,
        *,
        transformer: CogVideoXFunTransformer,
        vae: CogVideoXVAE,
        text: PaddedText,
        options: AdapterOptions,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.text = text
        self.options = options
        self.inpaint = train_mode(options.train_mode) == "inpaint"
        self._check_channels()

    @classmethod
    def from_pretrained(cls, options: AdapterOptions) -> "CogVideoXFunAdapter":
        """Load the released directory, offline; the transformer in float32, the encoders in the compute dtype.

        Raises:
            CheckpointError: a file is missing, or is another model's.
            ConfigError: the model was not made for the train mode.
        """
        folder, dtype = options.model_dir, options.compute_dtype
        config = read_json(folder / SPEC.config_file)
        length = read_dims(config).extra["text_tokens"]
        return cls(
            transformer=load_transformer(folder / "transformer", config),
            vae=CogVideoXVAE.from_folder(folder / "vae", dtype=dtype, mini_batch=options.vae_mini_batch),
            text=load_t5(folder / "text_encoder", folder / "tokenizer", dtype=dtype, length=length),
            options=options,
        )

    @staticmethod
    def load(request: SampleRequest, options: Mapping[str, Any]) -> Sample:
        """``pixels`` [F, 3, H, W] and ``text``; to inpaint also ``mask`` [F, 1, H, W] and ``known`` [F, 3, H, W].

        ``mask`` is True where the model generates, ``known`` is black there. It is drawn on the clip as it is trained:
        the original draws it on a longer one and cuts it, so masks lose their known last frames.
        """
        key = request.key
        pixels = read_clip(request)
        sample: Sample = {
            "pixels": pixels,
            "text": "" if key.chance("text-drop", TEXT_DROP) else request.record.get("text") or "",
        }
        if train_mode(options.get("train_mode")) == "inpaint":
            drawn = draw_mask(key.numpy("mask"), request.frames, request.height, request.width)
            mask = torch.from_numpy(drawn).unsqueeze(1)
            sample |= {"mask": mask, "known": pixels.masked_fill(mask, MASKED)}
        return sample

    def encode(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> tuple[Tensor, Conditions]:
        """Latents [B, 16, f, h, w] float32; ``text`` [B, 226, channels], to inpaint also ``inpaint`` [B, 17, f, h, w].

        The clips of a micro-batch have one shape.
        """
        options = self.options
        conditions: Conditions = {}
        with encoding_on(self.vae, options.device, low_vram=options.low_vram):
            latents = self._latents(_stack(samples, "pixels"), keys, "vae-clip")
            if self.inpaint:
                conditions["inpaint"] = self._inpaint(samples, keys)
        with encoding_on(self.text, options.device, low_vram=options.low_vram):
            conditions["text"] = self.text.encode([sample["text"] for sample in samples])
        return latents, conditions

    def predict(self, transformer: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """[B, 16, f, h, w] like ``noisy``; everything enters in the dtype of ``noisy``, timesteps as they are."""
        parts = [noisy, conditions["inpaint"].to(noisy)] if self.inpaint else [noisy]
        frames_first = torch.cat(parts, dim=1).transpose(1, 2)  # [B, f, 33, h, w], as CogVideoX has it
        prediction: Tensor = transformer(frames_first, conditions["text"].to(noisy), timesteps)
        return prediction.transpose(1, 2)

    def _latents(self, pixels: Tensor, keys: Sequence[SampleKey], purpose: str) -> Tensor:
        """Sampled latents [B, 16, f, h, w] of pixels [B, 3, F, H, W], each clip with its own noise."""
        shape = self.vae.latent_shape(*pixels.shape[2:])
        return self.vae.encode(pixels, torch.stack([key.normal(purpose, shape) for key in keys]))

    def _inpaint(self, samples: Sequence[Sample], keys: Sequence[SampleKey]) -> Tensor:
        """Mask and latents of the known pixels, [B, 17, f, h, w] float32; zeros for most clips without any."""
        known, mask = _stack(samples, "known"), _stack(samples, "mask")
        if self.transformer.config.add_noise_in_inpaint_model:
            known = torch.stack([add_noise(clip, key) for clip, key in zip(known, keys, strict=True)])
        inpaint = join(self._latents(known, keys, "vae-known"), mask, self.vae.scale)
        keep = [
            not (sample["mask"].all() and key.chance("empty-drop", EMPTY_DROP))
            for sample, key in zip(samples, keys, strict=True)
        ]
        return inpaint * torch.tensor(keep, device=inpaint.device).view(-1, 1, 1, 1, 1)

    def _check_channels(self) -> None:
        """Refuse a train mode that gives the transformer other channels than it reads."""
        latent = self.transformer.config.out_channels
        modes = {"normal": latent, "inpaint": 2 * latent + 1}
        mode, reads = "inpaint" if self.inpaint else "normal", self.transformer.config.in_channels
        if reads == modes[mode]:
            return
        fitting = next((mode for mode, channels in modes.items() if channels == reads), None)
        raise ConfigError(
            f"train_mode {mode!r} gives the transformer {modes[mode]} channels"
            f" ({'noisy, mask and known latents' if self.inpaint else 'the noisy latents alone'}), but the model in "
            f"{self.options.model_dir} reads {reads}"
            + (": an InP model is trained to inpaint, text to video included" if fitting == "inpaint" else ""),
            hint=f"use --train-mode {fitting}" if fitting else "use a CogVideoX-Fun InP model",
        )


def train_mode(asked: str | None) -> str:
    """The train mode of a run that may not have named one."""
    return asked or SPEC.train_modes[0]


def add_noise(known: Tensor, key: SampleKey) -> Tensor:
    """Known pixels [3, F, H, W] as V1.1 and later want them: a little noisy, by exp(N(-3, 0.5)) times standard normal.

    Pixels that are exactly black stay so, whether masked or not: that is how the original tells them apart.
    """
    strength = float(key.numpy("known-strength").normal(-3.0, 0.5))
    noise = key.normal("known-noise", tuple(known.shape)).to(known) * torch.tensor(strength).exp().item()
    return torch.where(known == MASKED, known, known + noise)


def join(latents: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The known part of the clip, resized to latents, then the latents of its pixels: [B, 1 + 16, f, h, w].

    latents: [B, 16, f, h, w], scaled. mask: [B, 1, F, H, W], 1 where the model generates.
    Frame 0 becomes latent 0 and every later four frames one latent; the mask is scaled like the latents, in training
    and inference alike.
    """
    frames, *size = latents.shape[2:]
    known = 1 - mask.to(latents)
    parts = [F.interpolate(known[:, :, :1], (1, *size), mode="trilinear", align_corners=False)]
    if frames > 1:
        parts.append(F.interpolate(known[:, :, 1:], (frames - 1, *size), mode="trilinear", align_corners=False))
    return torch.cat([torch.cat(parts, dim=2) * scale, latents], dim=1)


def _stack(samples: Sequence[Sample], name: str) -> Tensor:
    """[B, C, F, H, W] of every sample's [F, C, H, W]."""
    return torch.stack([sample[name] for sample in samples]).transpose(1, 2)
