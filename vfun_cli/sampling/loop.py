"""The one loop that makes a video of noise, for every family: guidance, schedule, segment after segment."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vfun_cli.modeling.adapter import Branches, Conditions, ModelAdapter, VideoRequest, cast
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.transfer import upload
from vfun_cli.sampling.schedules import Schedule, guided


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """The latents of a segment on their way."""

    segment: int
    """From 0."""
    step: int
    """How many steps are made; none yet of what the segment starts from."""
    steps: int
    """Of the segment."""
    latents: Tensor
    """[1, C, f, h, w] float32."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What makes videos: a family's model, and the noise levels it goes through."""

    adapter: ModelAdapter
    transformer: nn.Module
    """The adapter's, as a strategy may have wrapped it."""
    schedule: Callable[[], Schedule]
    """A new one for every segment."""
    dtype: torch.dtype
    """What the transformer reads; latents stay float32."""

    def steps(self, outputs: Mapping[str, Output], request: VideoRequest, frames: list[Tensor]) -> Iterator[Denoised]:
        """Make a video, and stop before the first step of each segment and after each step, so that whoever asked can
        count, or leave. A segment is decoded when its last stop is over.

        Args:
            outputs: what the encoders made of ``inputs_to_sample``.
            frames: gets the pixels [F, 3, H, W] in [-1, 1] of each segment, on the host, when it is decoded.
        """
        for segment in range(self.adapter.segments(request)):
            with torch.no_grad():
                shown = torch.cat(frames) if frames else None
                branches = self.adapter.branches(outputs, request, segment, shown)
                noise = self._noise(request, segment)
                schedule = self.schedule()
                latents = self.adapter.begin(noise, branches, request, schedule)
            steps = len(schedule.timesteps)
            yield Denoised(segment=segment, step=0, steps=steps, latents=latents)
            for step, timestep in enumerate(schedule.timesteps, start=1):
                with torch.no_grad():
                    velocity = self.predict(latents, timestep, branches, request.guidance)
                    latents = schedule.step(velocity, timestep, latents)
                yield Denoised(segment=segment, step=step, steps=steps, latents=latents)
            with torch.no_grad():
                frames.append(self.adapter.pixels(latents, branches, request).cpu())

    def predict(self, latents: Tensor, timestep: Tensor, branches: Branches, guidance: float) -> Tensor:
        """The guided prediction, float32; a pass for each branch, since a batch of two rounds otherwise."""
        conditional = self._pass(latents, timestep, branches.conditional)
        if branches.unconditional is None:
            return guided(conditional, None, guidance)
        return guided(conditional, self._pass(latents, timestep, branches.unconditional), guidance)

    def _pass(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        timesteps = upload(timestep, latents.device).expand(len(latents))
        return self.adapter.predict(self.transformer, latents.to(self.dtype), timesteps, cast(conditions, self.dtype))

    def _noise(self, request: VideoRequest, segment: int) -> Tensor:
        """[1, C, f, h, w] float32, drawn on the host from (seed, row, segment): the same on every device and rank."""
        drawn = request.key.normal(f"video {segment}", self.adapter.latent_shape(request)).unsqueeze(0)
        return upload(drawn, self.adapter.options.device)
