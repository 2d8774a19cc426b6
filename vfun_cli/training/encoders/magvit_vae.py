"""The VAE of EasyAnimate V5 and V5.1: a released ``vae`` folder in diffusers' AutoencoderKLMagvit."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMagvit
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.training.encoders.placement import freeze
from vfun_cli.training.loading import empty_model, load_weights, safetensors_files

FRAMES_PER_LATENT = 4

SUPPORTED = {
    "mid_block_use_attention": False,
    "cache_mag_vae": True,
    "slice_mag_vae": False,
    "cache_compression_vae": False,
    "slice_compression_vae": False,
    "mini_batch_encoder": FRAMES_PER_LATENT,
}
"""Settings of the released configuration that diffusers' class has built in, and the value it has them at."""


class MagvitVAE(nn.Module):
    """Pixels to scaled latents, in mini-batches."""

    def __init__(self, model: AutoencoderKLMagvit, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1) -> "MagvitVAE":
        """From ``config.json`` and the safetensors beside it. Raises CheckpointError if they do not fit."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", hint="download the vae folder again") from error
        model = empty_model(lambda: AutoencoderKLMagvit(**vae_arguments(config, str(path))))
        load_weights(model, safetensors_files(folder), dtype=dtype, where=str(folder))
        return cls(model, mini_batch=mini_batch)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (16 in the released VAE)."""
        return int(self.model.config.latent_channels)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of one clip's latents."""
        side = self.model.spatial_compression_ratio
        return self.latent_channels, (frames - 1) // FRAMES_PER_LATENT + 1, height // side, width // side

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, z, f, h, w] float32 of pixels [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k, f = 1 + k.

        z = (mu + exp(logvar / 2) * noise) * scaling_factor, logvar clamped to [-30, 20]; ``noise`` is standard normal
        of the latents' shape on any device, None gives the posterior's mode.

        Raises ValueError for another number of frames: the last group would be encoded as a shorter one.
        """
        frames = pixels.shape[2]
        if frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"the EasyAnimate VAE encodes 1 + 4k frames, got {frames}")
        parts = [self._posterior(part) for part in torch.split(pixels, self.mini_batch)]
        latents = torch.cat([mean for mean, _ in parts])
        if noise is not None:
            latents = latents + torch.cat([deviation for _, deviation in parts]) * noise.to(latents)
        return latents * float(self.model.config.scaling_factor)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32. The networks run in their own dtype."""
        with torch.no_grad():
            posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        mu, logvar = posterior.parameters.float().chunk(2, dim=1)
        return mu, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))


def vae_arguments(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of diffusers' class that a released VAE configuration means.

    Raises CheckpointError for a setting that diffusers' class does not have: it would encode differently in silence.
    """
    wrong = {name: config[name] for name, value in SUPPORTED.items() if config.get(name, value) != value}
    if wrong:
        right = {name: SUPPORTED[name] for name in wrong}
        raise CheckpointError(
            f"{where}: the VAE of EasyAnimate V5 and V5.1 has {right}, not {wrong}",
            hint="point --pretrained_model_name_or_path at a released EasyAnimate V5 or V5.1 Control model",
        )
    known = set(signature(AutoencoderKLMagvit.__init__).parameters) - {"self"}
    return {name: value for name, value in config.items() if name in known}
