"""The VAE of Wan2.1: its ``.pth`` file in diffusers' AutoencoderKLWan, and the latents that Wan models train on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from vfun_cli.checkpoints.given import VAE, typed
from vfun_cli.checkpoints.given_tensors import files_of, require_same_tensors
from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.clip_vae import ClipVAE, require_whole_latents
from vfun_cli.modeling.encoders.frozen import EncoderSource
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.weights import empty_model, given_tensors, load_pth, load_weights

WEIGHTS = "Wan2.1_VAE.pth"
Z_DIM = 16
STAGES = 4
"""Resolution stages of the Wan2.1 VAE, and of diffusers' conversion of its names."""
BLOCKS_PER_STAGE = 3
"""Two residual blocks and one down-sampler; the last stage has no down-sampler."""


class WanVAE(ClipVAE):
    """Pixels to normalised latents and back, in mini-batches."""

    def __init__(self, model: AutoencoderKLWan, *, mini_batch: int = 1) -> None:
        super().__init__()
        self.model = freeze(model)
        self.mini_batch = mini_batch
        mean = torch.tensor(model.config["latents_mean"], dtype=torch.float32)
        std = torch.tensor(model.config["latents_std"], dtype=torch.float32)
        self.register_buffer("mean", mean.view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def from_file(cls, path: Path, *, dtype: torch.dtype, mini_batch: int = 1, given: Path | None = None) -> "WanVAE":
        """The released ``Wan2.1_VAE.pth``, or a smaller one of its layout; with other weights, if they are given.

        Raises:
            CheckpointError: the file is missing or does not fit.
        """
        state, where = load_pth(path), str(path)
        if given is not None:
            other = dict(given_tensors(given, VAE))
            where = typed(VAE, given)
            require_same_tensors(_shapes(other), _shapes(state), given, VAE)
            state = other
        return cls(load_wan_vae(state, dtype=dtype, where=where), mini_batch=mini_batch)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (mu - mean) / std and deviation exp(logvar / 2) [B, z, f, h, w] float32; F = 1 + 4k, f = 1 + k.

        logvar is clamped to [-30, 20]. The released models were trained with noise that is NOT divided by std, unlike
        diffusers' order of sampling and normalising. The networks run in their own dtype.

        Raises:
            ValueError: another number of frames: the encoder would drop the remainder without a word.
        """
        require_whole_latents(pixels)
        moments = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.parameters
        mu, logvar = moments.float().chunk(2, dim=1)
        return (mu - self.mean) / self.std, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def reconstruction(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of normalised latents; latent by latent, with the frames before in caches."""
        wide = latents.to(self.mean.device) * self.std + self.mean
        pixels: Tensor = self.model.decode(wide.to(self.model.dtype)).sample
        return pixels


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def source(model_dir: Path, *, dtype: torch.dtype, mini_batch: int, given: Path | None) -> EncoderSource:
    """The VAE of a released Wan directory, with other weights if they are given.

    Raises:
        CheckpointError: those are not there.
    """
    path = model_dir / WEIGHTS
    return EncoderSource(
        load=lambda: WanVAE.from_file(path, dtype=dtype, mini_batch=mini_batch, given=given),
        files=(path,) if given is None else tuple(files_of(given, VAE)),
        settings=str(dtype),
    )


def load_wan_vae(state: Mapping[str, Tensor], *, dtype: torch.dtype, where: str) -> AutoencoderKLWan:
    """The VAE from tensors in the original naming; every size is read off their shapes.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    config = wan_vae_config(state, where)
    model = empty_model(lambda: AutoencoderKLWan(**config), where=where)
    load_weights(model, convert_wan_vae_to_diffusers(dict(state)), dtype=dtype, where=where)
    return freeze(model)


def wan_vae_config(state: Mapping[str, Tensor], where: str) -> dict[str, object]:
    """What differs from diffusers' default configuration, from tensor shapes."""
    try:
        base = state["encoder.conv1.weight"].shape[0]
        decoder_base = state["decoder.head.0.gamma"].shape[0]
        z_dim = state["conv2.weight"].shape[0]
        widths = [
            state[f"encoder.downsamples.{BLOCKS_PER_STAGE * stage}.residual.2.weight"].shape[0]
            for stage in range(STAGES)
        ]
    except KeyError as error:
        raise CheckpointError(
            f"{where} is not a Wan2.1 VAE: it has no tensor {error.args[0]!r}.",
            hint=f"Download {WEIGHTS} of the released model again.",
        ) from None
    if z_dim != Z_DIM:
        raise CheckpointError(
            f"{where} has {z_dim} latent channels; the Wan2.1 VAE has {Z_DIM}.",
            hint=f"This family needs {WEIGHTS}; a Wan2.2 VAE is another model.",
        )
    downsamplers = [BLOCKS_PER_STAGE * stage + 2 for stage in range(STAGES - 1)]
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_base,
        "z_dim": z_dim,
        "dim_mult": [width // base for width in widths],
        "temperal_downsample": [f"encoder.downsamples.{index}.time_conv.weight" in state for index in downsamplers],
    }
