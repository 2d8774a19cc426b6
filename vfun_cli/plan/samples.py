"""How the videos of a run's validation are made, which plan and training take from here alike."""

from dataclasses import dataclass

from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What is the same of all videos that a run makes of its validation rows."""

    steps: int
    """From noise to a video."""
    guidance: float
    """Scale of classifier-free guidance."""
    negative_prompt: str

    @classmethod
    def of(cls, config: RunConfig, spec: FamilySpec) -> "SampleSettings | None":
        """As the options say, or as the family is released; None for a run that makes no videos."""
        if not config.validation_samples:
            return None
        guidance = config.validation_guidance
        return cls(
            steps=config.validation_sampling_steps or spec.sampling.steps,
            guidance=spec.sampling.guidance if guidance is None else guidance,
            negative_prompt=spec.sampling.negative_prompt,
        )

    @property
    def passes(self) -> int:
        """Of the transformer, for a video as long as its clip, which is one segment."""
        return self.steps * (2 if self.guidance > 1 else 1)
