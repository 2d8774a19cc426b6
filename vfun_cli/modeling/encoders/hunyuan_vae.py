"""The VAE of HunyuanVideo with the tiling its latents are defined by."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from vfun_cli.modeling.encoders.clip_vae import ClipVAE, require_whole_latents
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.weights import load_diffusers


class HunyuanVAE(ClipVAE):
    """Pixels to scaled latents and back, in mini-batches."""

    def __init__(self, model: AutoencoderKLHunyuanVideo, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        # Off by default in diffusers. The released model was trained with it: the tiles (256 pixels, 192 apart,
        # 17 frames, 12 apart) change the latents of everything larger by about 1 %. Decoding has the same tiles.
        self.model.enable_tiling()
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(
        cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1, given: Path | None = None
    ) -> "HunyuanVAE":
        """From ``config.json`` and the safetensors beside it, or those that are given.

        Raises:
            CheckpointError: they do not fit.
        """
        return cls(load_diffusers(AutoencoderKLHunyuanVideo, folder, dtype=dtype, given=given), mini_batch=mini_batch)

    @property
    def scale(self) -> float:
        """What latents are multiplied with: 0.476986 in the released VAE."""
        return float(self.model.config.scaling_factor)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [B, z, f, h, w] float32, both times scaling_factor; F = 4k + 1, f = k + 1.

        Raises:
            ValueError: another number of frames: the last ones would make a latent of their own.
        """
        require_whole_latents(pixels)
        with torch.no_grad():
            posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        return posterior.mean.float() * self.scale, posterior.std.float() * self.scale

    def reconstruction(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of scaled latents, tile by tile."""
        pixels: Tensor = self.model.decode((latents / self.scale).to(self.model.device, self.model.dtype)).sample
        return pixels
