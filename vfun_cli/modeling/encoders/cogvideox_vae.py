"""The VAE of CogVideoX-Fun: a released ``vae`` folder in diffusers' AutoencoderKLCogVideoX."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from vfun_cli.modeling.encoders.clip_vae import ClipVAE, require_whole_latents
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.weights import load_diffusers, read_json
from vfun_cli.typed_json import number, optional

LATENTS_AT_ONCE = 2
"""How many latents behind the first are decoded together: the group norms see all of their frames."""


class CogVideoXVAE(ClipVAE):
    """Pixels to scaled latents and back, in mini-batches."""

    def __init__(self, model: AutoencoderKLCogVideoX, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch

    @classmethod
    def from_folder(
        cls, folder: Path, *, dtype: torch.dtype, mini_batch: int = 1, given: Path | None = None
    ) -> "CogVideoXVAE":
        """From ``config.json`` and the safetensors beside it, or those that are given.

        Raises:
            CheckpointError: they do not fit.
        """
        return cls(load_diffusers(AutoencoderKLCogVideoX, folder, dtype=dtype, given=given), mini_batch=mini_batch)

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

    def reconstruction(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of scaled latents: the first latent alone, then groups of LATENTS_AT_ONCE.

        This is how the models were trained. diffusers' own ``decode`` gives the odd latent to the first group: its
        frames differ by up to 0.3 of the range from black to white, and an even f makes 4 f of them.
        """
        decoder = self.model.decoder
        latents = (latents / self.scale).to(self.model.device, self.model.dtype)
        frame, cache = decoder(latents[:, :, :1])
        groups = [frame]
        with _every_frame_doubled(decoder):
            for start in range(1, latents.shape[2], LATENTS_AT_ONCE):
                frames, cache = decoder(latents[:, :, start : start + LATENTS_AT_ONCE], conv_cache=cache)
                groups.append(frames)
        return torch.cat(groups, dim=2)


@contextmanager
def _every_frame_doubled(decoder: nn.Module) -> Iterator[None]:
    """Inside, the upsamplers of time double every frame, as behind the first latent.

    They themselves leave an odd frame as one, wherever it is. Here they are given each frame twice and enlarge height
    and width alone, which is the same as their interpolation (nearest) along all three.
    """
    upsamplers = [each for each in decoder.modules() if isinstance(each, CogVideoXUpsample3D) and each.compress_time]
    hooks = [each.register_forward_pre_hook(_doubled) for each in upsamplers]
    try:
        for each in upsamplers:
            each.compress_time = False
        yield
    finally:
        for each, hook in zip(upsamplers, hooks, strict=True):
            each.compress_time = True
            hook.remove()


def _doubled(_: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Frames [B, C, 2f, h, w] for an upsampler that is called with [B, C, f, h, w]."""
    frames: Tensor = inputs[0].repeat_interleave(2, dim=2)
    return frames


def read_scale(folder: Path) -> float:
    """:attr:`CogVideoXVAE.scale` from the ``config.json`` of a ``vae`` folder.

    Raises:
        CheckpointError: there is no such file.
    """
    default = signature(AutoencoderKLCogVideoX.__init__).parameters["scaling_factor"].default
    stated = read_json(folder / "config.json", {"scaling_factor": optional(number())})
    return float(stated.get("scaling_factor") or default)
