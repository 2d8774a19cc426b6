"""What a run may ask for beside its family's objective: which timesteps are drawn, how each counts, which noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from vfun_cli.config.options import RunConfig

NUM_TIMESTEPS = 1000

SMALLEST_DRAW = 2.0**-53
"""Of a uniform draw that is not 0. At 0 and at 1 the normal distribution has no quantile."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What the options of these names say; formulas are in docs/numerics.md, Densities and weights."""

    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    motion_sub_loss_ratio: float = 0.0
    """The share of the loss that is the error of what changes from frame to frame."""
    noise_share_in_frames_ratio: float = 0.0
    """How much of the frame before is in the noise of a frame."""

    @property
    def is_uniform(self) -> bool:
        """Whether all timesteps are drawn alike."""
        return self.weighting_scheme not in DENSITIES

    def indices(self, quantiles: Sequence[float]) -> list[int]:
        """Places of the schedule, which begins at the most noise, at these quantiles of a density that is not uniform.

        Each is found by itself: what a sample draws cannot depend on those it is drawn with.
        """
        density = DENSITIES[self.weighting_scheme]
        places = (int(density(quantile, self) * NUM_TIMESTEPS) for quantile in quantiles)
        return [min(max(place, 0), NUM_TIMESTEPS - 1) for place in places]

    def weights(self, sigmas: Tensor) -> Tensor | None:
        """[B] float32, how much each sample counts at these noise levels [B]; None: all alike."""
        weigh = WEIGHTS.get(self.weighting_scheme)
        return None if weigh is None else weigh(sigmas)

    def noise(self, white: Tensor) -> Tensor:
        """Noise [C, F, H, W] of unit variance, of white noise of that shape.

        Each frame is a mixture of the one before and its own, as in EasyAnimate, divided by its standard deviation.
        """
        ratio = self.noise_share_in_frames_ratio
        if not ratio:
            return white
        mixed, variance = white[:, 0], 1.0
        frames = [mixed]
        for own in white[:, 1:].unbind(1):
            mixed, variance = ratio * mixed + (1 - ratio) * own, ratio**2 * variance + (1 - ratio) ** 2
            frames.append(mixed / math.sqrt(variance))
        return torch.stack(frames, dim=1)


PLAIN = Variant()


def variant_of(config: RunConfig) -> Variant:
    """What a run asks for."""
    return Variant(
        weighting_scheme=config.weighting_scheme,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        motion_sub_loss_ratio=config.motion_sub_loss_ratio if config.motion_sub_loss else 0.0,
        noise_share_in_frames_ratio=config.noise_share_in_frames_ratio if config.noise_share_in_frames else 0.0,
    )


def _logit_normal(quantile: float, variant: Variant) -> float:
    """The sigmoid of a normal draw."""
    normal = NormalDist(variant.logit_mean, variant.logit_std)
    return 1 / (1 + math.exp(-normal.inv_cdf(min(max(quantile, SMALLEST_DRAW), 1 - SMALLEST_DRAW))))


def _mode(quantile: float, variant: Variant) -> float:
    """The paper's 1 - u - scale (cos^2(pi u / 2) - 1 + u), which falls with its uniform u: here u = 1 - quantile."""
    return quantile - variant.mode_scale * (math.sin(math.pi * quantile / 2) ** 2 - quantile)


DENSITIES: Mapping[str, Callable[[float, Variant], float]] = {"logit_normal": _logit_normal, "mode": _mode}
"""Positions in the schedule, 0 the most noise and 1 the least, at a quantile of what is drawn (arXiv 2403.03206, 3.1).

All draws follow from quantiles, so that the held-out loss is computed at those of the same density.
"""

WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigma_sqrt": lambda sigmas: sigmas**-2.0,
    "cosmap": lambda sigmas: 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
}
