"""The mathematics of training: what noise is added, what is predicted, how the error counts. All in float32."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.foreign import from_folder
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.modeling.transfer import upload
from vfun_cli.training.variant import NUM_TIMESTEPS, PLAIN, Variant

OUTLIER = 50.0
"""Elements further off than this count as zero (docs/numerics.md, The loss)."""


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A noised micro-batch: what the model sees and what it should say."""

    noisy: Tensor
    """[B, C, F, H, W]"""
    timesteps: Tensor
    """[B], 0..1000"""
    target: Tensor
    """[B, C, F, H, W]"""
    weights: Tensor | None = None
    """[B] float32, how much each sample counts; None: all alike."""


class Objective(Protocol):
    """One training objective."""

    def corrupt(self, latents: Tensor, keys: Sequence[SampleKey]) -> Corrupted:
        """Noise each sample by its own key; latents [B, C, F, H, W] float32."""
        ...

    def corrupt_at(self, latents: Tensor, keys: Sequence[SampleKey], indices: Sequence[int]) -> Corrupted:
        """The same at these places of the schedule, one a sample, instead of those that the keys draw."""
        ...

    def at_quantile(self, quantile: float) -> int:
        """The place of the schedule at a quantile (above 0, at most 1) of what training draws, least noise first."""
        ...

    def plain(self) -> "Objective":
        """The same without what a run asks for beside it: nothing weighs more, uniform timesteps, white noise."""
        ...

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """Scalar float32 loss; ``mask`` broadcasts over [B, C, F, H, W], 1 counts; ``weights`` are [B]."""
        ...


def _noise_rank(quantile: float) -> int:
    """How many of the timesteps, if all are drawn alike, have less noise than that at the quantile."""
    return round(quantile * NUM_TIMESTEPS) - 1


def _weighted_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return errors.mean()
    weights = mask.to(errors).expand_as(errors)
    return (errors * weights).sum() / weights.sum().clamp(min=1)


def _motion_error(difference: Tensor, mask: Tensor | None) -> Tensor:
    """How far off the steps from frame to frame are; those between two frames that count."""
    steps = difference[:, :, 1:] - difference[:, :, :-1]
    if mask is not None:
        wide = mask.to(difference).expand_as(difference)
        mask = wide[:, :, 1:] * wide[:, :, :-1]
    return _weighted_mean(steps.square(), mask)


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """What both objectives have: draws by the samples' keys, and how the error counts."""

    outlier: float = math.inf
    variant: Variant = PLAIN

    def plain(self) -> Self:
        """See :class:`Objective`."""
        return replace(self, variant=PLAIN)

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """Mean squared error over elements. Outliers, where the family has them, count as zero, but NaN and infinity
        do not vanish. Of clips of more than two latent frames a share is the error of the steps between frames, to
        which neither outliers nor weights apply (docs/numerics.md, The loss).
        """
        difference = prediction.float() - target
        errors = difference.square() * (difference.abs() <= self.outlier)
        error = _weighted_mean(errors if weights is None else errors * weights.view(-1, 1, 1, 1, 1), mask)
        share = self.variant.motion_sub_loss_ratio
        if not share or difference.shape[2] <= 2:
            return error
        return (1 - share) * error + share * _motion_error(difference, mask)

    def _noise(self, latents: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        drawn = [self.variant.noise(key.normal("noise", tuple(latents.shape[1:]))) for key in keys]
        return upload(torch.stack(drawn), latents.device)

    def _timestep_indices(self, keys: Sequence[SampleKey]) -> list[int]:
        """For every sample, whatever its rank."""
        if self.variant.is_uniform:
            return [int(key.numpy("timestep").integers(NUM_TIMESTEPS)) for key in keys]
        return self.variant.indices([float(key.numpy("timestep-density").random()) for key in keys])


@dataclass(frozen=True, kw_only=True)
class FlowMatching(_Objective):
    """Rectified flow: noisy = (1 - sigma) x + sigma n, target = n - x (docs/numerics.md, Flow matching)."""

    shift: float
    """sigma = shift s / (1 + (shift - 1) s): how much of the schedule lies at high noise."""
    outlier: float = OUTLIER

    def sigmas(self) -> Tensor:
        """[1000], from 1 down; no terminal zero. Rounded to float32 at every step, as diffusers' scheduler does."""
        steps = torch.arange(NUM_TIMESTEPS, 0, -1, dtype=torch.float32) / NUM_TIMESTEPS
        return self.shift * steps / (1 + (self.shift - 1) * steps)

    def corrupt(self, latents: Tensor, keys: Sequence[SampleKey]) -> Corrupted:
        """See :class:`Objective`."""
        return self.corrupt_at(latents, keys, self._timestep_indices(keys))

    def corrupt_at(self, latents: Tensor, keys: Sequence[SampleKey], indices: Sequence[int]) -> Corrupted:
        """See :class:`Objective`."""
        sigma = upload(self.sigmas()[list(indices)], latents.device)
        noise = self._noise(latents, keys)
        wide = sigma.view(-1, 1, 1, 1, 1)
        return Corrupted(
            noisy=(1 - wide) * latents + wide * noise,
            timesteps=sigma * NUM_TIMESTEPS,
            target=noise - latents,
            weights=self.variant.weights(sigma),
        )

    def at_quantile(self, quantile: float) -> int:
        """See :class:`Objective`; the schedule begins at the most noise."""
        if self.variant.is_uniform:
            return NUM_TIMESTEPS - 1 - _noise_rank(quantile)
        (index,) = self.variant.indices([1 - quantile])
        return index


@dataclass(frozen=True, kw_only=True)
class DDPM(_Objective):
    """Discrete diffusion over the scheduler's alphas_cumprod (docs/numerics.md, Denoising diffusion).

    All timesteps are drawn alike: a ``weighting_scheme`` is of flow matching, and refused with the options.
    """

    alphas_cumprod: Tensor
    """[1000] float32"""
    prediction_type: str

    def corrupt(self, latents: Tensor, keys: Sequence[SampleKey]) -> Corrupted:
        """See :class:`Objective`."""
        return self.corrupt_at(latents, keys, self._timestep_indices(keys))

    def corrupt_at(self, latents: Tensor, keys: Sequence[SampleKey], indices: Sequence[int]) -> Corrupted:
        """noisy = sqrt(a) x + sqrt(1 - a) n; target is v = sqrt(a) n - sqrt(1 - a) x, or the noise."""
        drawn = torch.tensor(list(indices))
        noise = self._noise(latents, keys)
        alpha = upload(self.alphas_cumprod[drawn], latents.device).view(-1, 1, 1, 1, 1)
        signal, amount = alpha.sqrt(), (1 - alpha).sqrt()
        velocity = self.prediction_type == "v_prediction"
        return Corrupted(
            noisy=signal * latents + amount * noise,
            timesteps=upload(drawn, latents.device),
            target=signal * noise - amount * latents if velocity else noise,
        )

    def at_quantile(self, quantile: float) -> int:
        """See :class:`Objective`; the schedule begins at the least noise."""
        return _noise_rank(quantile)


def make_objective(name: str, settings: Mapping[str, Any], model_dir: Path, variant: Variant = PLAIN) -> Objective:
    """The family's objective from its ``objective_options`` and its model directory, as a run asks for it."""
    return OBJECTIVES[name]({**settings, "variant": variant}, model_dir)


def _flow_matching(settings: Mapping[str, Any], model_dir: Path) -> Objective:
    return FlowMatching(**settings)


def _ddpm(settings: Mapping[str, Any], model_dir: Path) -> Objective:
    """The schedule of the released ``scheduler/`` read as DDPM, as the originals train (they ignore other classes)."""
    folder = model_dir / "scheduler"
    scheduler = from_folder(DDPMScheduler, folder)
    kind = scheduler.config.prediction_type
    if kind not in ("v_prediction", "epsilon"):
        raise CheckpointError(f"{folder}: prediction_type {kind!r} cannot be trained; known: v_prediction, epsilon.")
    return DDPM(alphas_cumprod=scheduler.alphas_cumprod.float(), prediction_type=kind, **settings)


OBJECTIVES: dict[str, Callable[[Mapping[str, Any], Path], Objective]] = {
    "flow-matching": _flow_matching,
    "ddpm": _ddpm,
}
