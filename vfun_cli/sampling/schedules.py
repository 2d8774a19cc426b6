"""From which noise level to which a video goes, step by step: diffusers' schedulers, set as each family is released."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vfun_cli.errors import CheckpointError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.foreign import from_folder

SCHEDULER = "scheduler"
"""Folder of the model directory with a released DDIM configuration."""

log = logging.getLogger(__name__)


class Schedule:
    """One way down the noise levels; it is used once. Latents are float32 between its steps."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps
        """[N], 0..1000 from above: float32 for flow matching, whole numbers for DDIM."""

    def last(self, count: int) -> None:
        """Leave out all but the last ``count`` steps."""
        self.timesteps = self.timesteps[len(self.timesteps) - count :]
        set_begin = getattr(self.scheduler, "set_begin_index", None)
        if set_begin is not None:
            set_begin(len(self.scheduler.timesteps) - count)

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents as noisy as the first step expects them."""
        first = self.timesteps[:1]
        if isinstance(self.scheduler, DDIMScheduler):
            mixed: Tensor = self.scheduler.add_noise(clean, noise, first)
        else:
            mixed = self.scheduler.scale_noise(clean, first, noise)
        return mixed

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents after a step, float32 like ``latents``; the last one lands on the clean estimate.

        Euler: x + (sigma' - sigma) v. DDIM, eta 0: sqrt(a') x0 + sqrt(1 - a') eps.
        """
        stepped: Tensor = self.scheduler.step(prediction.float(), timestep, latents, return_dict=False)[0]
        return stepped


def make_schedule(spec: FamilySpec, model_dir: Path, steps: int) -> Schedule:
    """The family's schedule of so many steps.

    Raises:
        CheckpointError: the model directory's scheduler does not fit.
    """
    return Schedule(SCHEDULES[spec.model.sampler](steps, model_dir, **spec.model.sampler_options))


def _shifted_twice(steps: int, model_dir: Path, *, shift: float) -> Any:
    """diffusers shifts the ends of its table and then the steps between them: what the Wan models are released with."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def _shifted_once(steps: int, model_dir: Path, *, shift: float) -> Any:
    """sigma = shift u / (1 + (shift - 1) u) of u = 1 - i / N."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    return scheduler


def _shifted_dynamically(steps: int, model_dir: Path, *, mu: float) -> Any:
    """Shifted by exp(mu), with u from 1 to 0.001."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def _ddim(steps: int, model_dir: Path) -> Any:
    """The released betas read by the plain DDIM class: the one that the files name shifts the SNR, training does not.

    Raises:
        CheckpointError: a setting with which the steps would be undefined, or another model's.
    """
    folder = model_dir / SCHEDULER
    scheduler = from_folder(DDIMScheduler, folder)
    config, zero_snr = scheduler.config, float(scheduler.alphas_cumprod[-1]) < 1e-7
    if config.clip_sample:
        raise CheckpointError(
            f"{folder} has clip_sample true, which would cut latents off at 1.",
            hint='The released models have "clip_sample": false in scheduler/scheduler_config.json.',
        )
    if config.prediction_type != "v_prediction" and (zero_snr or config.prediction_type != "epsilon"):
        raise CheckpointError(
            f"{folder}: a video cannot be made with prediction_type {config.prediction_type!r}"
            f"{' from pure noise' * zero_snr}.",
            hint="Use the scheduler folder of the released model.",
        )
    if config.timestep_spacing != "trailing":
        log.warning(
            "%s has timestep_spacing %r: its steps do not begin at pure noise, where the model expects the noise that "
            "a video starts from. The released models are sampled with trailing.", folder, config.timestep_spacing,
        )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


SCHEDULES: Mapping[str, Callable[..., Any]] = {
    "flow-shifted-twice": _shifted_twice,
    "flow-shifted-once": _shifted_once,
    "flow-shifted-dynamically": _shifted_dynamically,
    "ddim": _ddim,
}


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) in float32: u + scale (c - u)."""
    if unconditional is None:
        return conditional.float()
    return unconditional.float() + scale * (conditional.float() - unconditional.float())
