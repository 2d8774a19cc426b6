"""The VAE of CogVideoX-Fun: a released ``vae`` folder in diffusers' AutoencoderKLCogVideoX."""

from inspect import signature
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from vfun_cli.modeling.encoders.clip_vae import ClipVAE, require_whole_latents
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.weights import load_diffusers, read_json
from vfun_cli.typed_json import number, optional


class CogVideoXVAE(ClipVAE):
    """Pixels to scaled latents, in mini-batches."""

    def __init__(self, model: AutoencoderKLCogVideoX, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1) -> "CogVideoXVAE":
        """From ``config.json`` and the safetensors beside it.

        Raises:
            CheckpointError: they do not fit.
        """
        return cls(load_diffusers(AutoencoderKLCogVideoX, folder, dtype=dtype), mini_batch=mini_batch)

    @property
    def scale(self) -> float:
        """What latents are multiplied with: 1.15 in the 2b models, 0.7 in the 5b ones."""
        return float(self.model.config.scaling_factor)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean mu * scale and deviation sigma * scale [B, z, f, h, w] float32; F = 1 + 4k, f = 1 + k.

        The networks run in their own dtype.

        Raises:
            ValueError: another number of frames: some would be encoded as if they were fewer.
        """
        require_whole_latents(pixels)
        found = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        return found.mean.float() * self.scale, found.std.float() * self.scale


def read_scale(folder: Path) -> float:
    """:attr:`CogVideoXVAE.scale` from the ``config.json`` of a ``vae`` folder.

    Raises:
        CheckpointError: there is no such file.
    """
    default = signature(AutoencoderKLCogVideoX.__init__).parameters["scaling_factor"].default
    stated = read_json(folder / "config.json", {"scaling_factor": optional(number())})
    return float(stated.get("scaling_factor") or default)
