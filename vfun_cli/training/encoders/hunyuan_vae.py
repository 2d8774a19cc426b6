"""The VAE of HunyuanVideo with the tiling its latents are defined by."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from vfun_cli.training.encoders.placement import freeze
from vfun_cli.training.randomness import SampleKey


class HunyuanVAE(nn.Module):
    """Pixels to scaled latents, in mini-batches."""

    def __init__(self, model: AutoencoderKLHunyuanVideo, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        # Off by default in diffusers. The released model was trained with it: the tiles (256 pixels, 192 apart,
        # 17 frames, 12 apart) change the latents of everything larger by about 1 %.
        self.model.enable_tiling()
        self.mini_batch = mini_batch

    def encode(self, pixels: Tensor, keys: Sequence[SampleKey] | None = None) -> Tensor:
        """Latents [B, z, f, h, w] float32 of pixels [B, 3, F, H, W] in [-1, 1]; F = 4k + 1, f = k + 1.

        keys: draw from the posterior, each clip by its own key; None takes the mode.
        """
        parts = [self._posterior(part) for part in torch.split(pixels, self.mini_batch)]
        latents = torch.cat([mean for mean, _ in parts])
        if keys is not None:
            std = torch.cat([std for _, std in parts])
            noise = torch.stack([key.normal("posterior", tuple(latents.shape[1:])) for key in keys])
            latents = latents + std * noise.to(latents.device)
        scale: float = self.model.config.scaling_factor
        return latents * scale

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32."""
        with torch.no_grad():
            posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()
