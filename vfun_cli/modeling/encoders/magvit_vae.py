"""The VAE of EasyAnimate V5 and V5.1: a released ``vae`` folder in diffusers' AutoencoderKLMagvit."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMagvit
from torch import Tensor

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.clip_vae import FRAMES_PER_LATENT, ClipVAE, require_whole_latents
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.weights import empty_model, load_weights, read_json, safetensors_files
from vfun_cli.typed_json import optional, whole

SUPPORTED = {
    "mid_block_use_attention": False,
    "cache_mag_vae": True,
    "slice_mag_vae": False,
    "cache_compression_vae": False,
    "slice_compression_vae": False,
    "mini_batch_encoder": FRAMES_PER_LATENT,
}
"""Settings of the released configuration that diffusers' class has built in, and the value it has them at."""


class MagvitVAE(ClipVAE):
    """Pixels to scaled latents and back, in mini-batches."""

    def __init__(self, model: AutoencoderKLMagvit, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(
        cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1, given: Path | None = None
    ) -> "MagvitVAE":
        """From ``config.json`` and the safetensors beside it, or those that are given.

        Raises:
            CheckpointError: they do not fit.
        """
        arguments = read_arguments(folder)
        model = empty_model(lambda: AutoencoderKLMagvit(**arguments), where=str(folder))
        load_weights(model, safetensors_files(folder), dtype=dtype, where=str(folder), given=given)
        return cls(model, mini_batch=mini_batch)

    @property
    def scale(self) -> float:
        """What latents are multiplied with: 0.7125 in the released VAE."""
        return float(self.model.config.scaling_factor)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean mu * scaling_factor and deviation exp(logvar / 2) * scaling_factor [B, z, f, h, w] float32.

        F = 1 + 4k, f = 1 + k; logvar is clamped to [-30, 20]. The networks run in their own dtype.

        Raises:
            ValueError: another number of frames: the last group would be encoded as a shorter one.
        """
        require_whole_latents(pixels)
        moments = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.parameters
        mu, logvar = moments.float().chunk(2, dim=1)
        return mu * self.scale, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * self.scale

    def reconstruction(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of scaled latents; latent by latent, with the frames before in caches."""
        pixels: Tensor = self.model.decode((latents / self.scale).to(self.model.device, self.model.dtype)).sample
        return pixels


def latent_channels(folder: Path) -> int:
    """Channels of the latents (16 in the released VAE), from ``config.json``.

    Raises:
        CheckpointError: as ``read_arguments``.
    """
    default = signature(AutoencoderKLMagvit.__init__).parameters["latent_channels"].default
    return int(read_arguments(folder).get("latent_channels") or default)


def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of diffusers' class for a released ``vae`` folder.

    Raises:
        CheckpointError: there is no configuration, or it does not fit.
    """
    path = folder / "config.json"
    return vae_arguments(read_json(path, {"latent_channels": optional(whole(1, 1 << 20))}), str(path))


def vae_arguments(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of diffusers' class that a released VAE configuration means.

    Raises:
        CheckpointError: a setting that diffusers' class does not have: it would encode something else without a word.
    """
    wrong = {name: config[name] for name, value in SUPPORTED.items() if config.get(name, value) != value}
    if wrong:
        right = {name: SUPPORTED[name] for name in wrong}
        raise CheckpointError(
            f"{where}: the VAE of EasyAnimate V5 and V5.1 has {right}, not {wrong}.",
            hint="Point --pretrained-model-name-or-path at a released EasyAnimate V5 or V5.1 Control model.",
        )
    known = set(signature(AutoencoderKLMagvit.__init__).parameters) - {"self"}
    return {name: value for name, value in config.items() if name in known}
