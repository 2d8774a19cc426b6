"""The VAE of CogVideoX-Fun: a released ``vae`` folder in diffusers' AutoencoderKLCogVideoX."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from vfun_cli.training.encoders.placement import freeze
from vfun_cli.training.loading import empty_model, load_weights, read_json, safetensors_files

FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8


class CogVideoXVAE(nn.Module):
    """Pixels to scaled latents, in mini-batches."""

    def __init__(self, model: AutoencoderKLCogVideoX, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1) -> "CogVideoXVAE":
        """From ``config.json`` and the safetensors beside it. Raises CheckpointError if they do not fit."""
        config = read_json(folder / "config.json")
        model = empty_model(lambda: AutoencoderKLCogVideoX.from_config(config))
        load_weights(model, safetensors_files(folder), dtype=dtype, where=str(folder))
        return cls(model, mini_batch=mini_batch)

    @property
    def scale(self) -> float:
        """What latents are multiplied with: 1.15 in the 2b models, 0.7 in the 5b ones."""
        return float(self.model.config.scaling_factor)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of one clip's latents."""
        side = PIXELS_PER_LATENT
        channels = int(self.model.config.latent_channels)
        return channels, (frames - 1) // FRAMES_PER_LATENT + 1, height // side, width // side

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, z, f, h, w] float32 of pixels [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k, f = 1 + k.

        z = (mu + sigma * noise) * scale; ``noise`` is standard normal of the latents' shape, on any device; None takes
        the posterior's mode.
        Raises ValueError for another number of frames: some of them would be encoded as if they were fewer.
        """
        frames = pixels.shape[2]
        if frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"the CogVideoX VAE encodes 1 + 4k frames, got {frames}")
        parts = [self._posterior(part) for part in torch.split(pixels, self.mini_batch)]
        latents = torch.cat([mean for mean, _ in parts])
        if noise is not None:
            latents = latents + torch.cat([deviation for _, deviation in parts]) * noise.to(latents)
        return latents * self.scale

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32. The networks run in their own dtype."""
        with torch.no_grad():
            posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()
