"""What all video VAEs share: clips of any shape in, posteriors out, and latents to clips again, in mini-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vfun_cli.checkpoints.given import VAE
from vfun_cli.checkpoints.given_tensors import files_of
from vfun_cli.modeling.encoders.frozen import EncoderSource, Output
from vfun_cli.modeling.pixels import LoadedClip, clip_shape, float_pixels
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.transfer import upload
from vfun_cli.modeling.weights import safetensors_files

FRAMES_PER_LATENT = 4
"""Behind the first frame, which makes a latent of its own. All these VAEs would take another number of frames and
encode, or drop, the last ones as if they were fewer."""


class ClipVAE(nn.Module, ABC):
    """A frozen VAE; latents are scaled as its transformer reads them."""

    mini_batch: int

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents [B, z, f, h, w], float32, of pixels [B, 3, F, H, W].

        Raises:
            ValueError: a number of frames that the VAE would encode as another one.
        """

    @abstractmethod
    def reconstruction(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of scaled latents [B, z, f, h, w] float32: in the networks' dtype, not clamped."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] float32 in [-1, 1] of scaled latents [B, z, f, h, w]; F = 1 + 4 (f - 1).

        All frames must be given at once: a latent reads what the decoder made of those before it.
        """
        with torch.no_grad():
            parts = [self.reconstruction(part).float() for part in latents.float().split(self.mini_batch)]
        return torch.cat(parts).clamp_(-1.0, 1.0)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, z, f, h, w] float32 of pixels [B, 3, F, H, W] in [-1, 1].

        ``noise`` is standard normal of the latents' shape, on any device; None takes the posterior's mode.
        """
        with torch.no_grad():
            parts = [self.posterior(part) for part in pixels.split(self.mini_batch)]
        mean = torch.cat([mean for mean, _ in parts])
        if noise is None:
            return mean
        return mean + torch.cat([deviation for _, deviation in parts]) * noise.to(mean)

    def outputs(self, inputs: Sequence[LoadedClip]) -> list[Output]:
        """``mean`` and ``std`` [z, f, h, w] of clips [F, 3, H, W]; clips of one shape share mini-batches."""
        found: dict[int, Output] = {}
        shapes = [clip_shape(clip) for clip in inputs]
        for shape in dict.fromkeys(shapes):
            members = [index for index, other in enumerate(shapes) if other == shape]
            for start in range(0, len(members), self.mini_batch):
                batch = members[start : start + self.mini_batch]
                device = next(self.parameters()).device
                pixels = torch.stack([float_pixels(inputs[index], device).transpose(0, 1) for index in batch])
                with torch.no_grad():
                    means, deviations = self.posterior(pixels)
                for index, mean, deviation in zip(batch, means, deviations, strict=True):
                    found[index] = {"mean": mean, "std": deviation}
        return [found[index] for index in range(len(inputs))]

    @contextmanager
    def paused(self, pause: Callable[[], None]) -> Iterator[None]:
        """Inside, ``pause`` is called before each 3D convolution, of which a clip of any length takes many.

        What it raises ends the encoding or decoding; the VAE is as before.
        """
        hooks = [
            module.register_forward_pre_hook(lambda *given: pause())
            for module in self.modules()
            if isinstance(module, nn.Conv3d)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def require_whole_latents(pixels: Tensor) -> None:
    """Refuse pixels [B, 3, F, H, W] whose frames do not make whole latents.

    Raises:
        ValueError: their number is not 1 + 4k.
    """
    frames = pixels.shape[2]
    if frames % FRAMES_PER_LATENT != 1:
        raise ValueError(f"the VAE encodes 1 + 4k frames, got {frames}")


def folder_source(
    load: Callable[..., ClipVAE], folder: Path, *, dtype: torch.dtype, mini_batch: int, given: Path | None
) -> EncoderSource:
    """A VAE that ``load`` makes of a released ``vae`` folder, of its weights or of those that are given.

    Raises:
        CheckpointError: no weights are there.
    """
    weights = safetensors_files(folder) if given is None else files_of(given, VAE)
    return EncoderSource(
        load=lambda: load(folder, dtype=dtype, mini_batch=mini_batch, given=given),
        files=(folder / "config.json", *weights),
        settings=str(dtype),
    )


def sample_posteriors(outputs: Sequence[Output], keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """Latents [B, z, f, h, w] float32, each drawn from its posterior with the noise of its own key."""
    return torch.stack([sample_posterior(output, key, purpose) for output, key in zip(outputs, keys, strict=True)])


def keep(values: Tensor, kept: Sequence[bool]) -> Tensor:
    """Zeros for the samples of a batch that are not kept."""
    return values * upload(torch.tensor(kept), values.device).view(-1, *[1] * (values.dim() - 1))


def sample_posterior(output: Output, key: SampleKey, purpose: str) -> Tensor:
    """One posterior's sample [z, f, h, w]."""
    mean, deviation = output["mean"], output["std"]
    return mean + deviation * upload(key.normal(purpose, tuple(mean.shape)), mean.device)
