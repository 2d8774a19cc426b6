"""The options that decide the plan."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from vfun_cli.config.options import RunConfig


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the plan depends on beside the family and the clips. Names are those of the command line."""

    video_sample_size: int
    image_sample_size: int | None = None
    """None: the family has no such option (Wan-S2V) or it was not given, and the video size stands for both."""
    token_sample_size: int
    """Size at which a clip of ``video_sample_n_frames`` frames fills the token budget."""
    video_sample_n_frames: int
    video_sample_stride: int
    train_batch_size: int = 1
    video_repeat: int = 1
    """How often a video appears in an epoch; 0 and 1 both mean once. Images appear once."""
    enable_bucket: bool = True
    """Keep the aspect of each clip (nearest of 40); without it every clip is cropped to a square."""
    random_hw_adapt: bool = False
    training_with_video_token_length: bool = False
    fix_sample_size: tuple[int, ...] = ()
    """Height and width of every clip, in the place of all other sizes; empty: clips have those."""
    random_ratio_crop: bool = False
    """Draw the aspect of each clip instead of keeping the nearest of 40."""
    random_frame_crop: bool = False
    gradient_accumulation_steps: int = 1
    seed: int = 42
    world_size: int = 1
    cache_variants: int | None = None
    """Epochs after which sizes and lengths repeat; None: never."""
    heaviest_first: bool = False
    """Open each epoch with its most expensive step, so that what does not fit fails at once."""
    tokens_per_batch: int | None = None
    """Fill micro-batches up to this many tokens instead of ``train_batch_size`` clips."""
    repeats: tuple[Fraction, ...] = (Fraction(1),)
    """How often an epoch shows each clip, on average, by data set; ``video_repeat`` comes on top."""

    @classmethod
    def pick(cls, values: Mapping[str, Any], **more: Any) -> "PlanOptions":
        """The plan's options out of a larger set, such as a family's defaults; ``more`` takes precedence."""
        names = {field.name for field in fields(cls)}
        return cls(**{**{name: value for name, value in values.items() if name in names}, **more})

    @property
    def slots(self) -> int:
        """Micro-batches of one optimizer step: world size x accumulation."""
        return self.world_size * self.gradient_accumulation_steps

    @property
    def low(self) -> int:
        """The smaller of the two sample sizes: the published guides disagree on which option it is."""
        return min(self.video_sample_size, self.image_sample_size or self.video_sample_size)

    @property
    def high(self) -> int:
        """The larger of the two sample sizes."""
        return max(self.video_sample_size, self.image_sample_size or self.video_sample_size)


def plan_options(config: RunConfig, world_size: int | None = None) -> PlanOptions:
    """The options of the plan, which share their names with the configuration's; by default on its own ranks."""
    repeats = tuple(each.repeats for each in config.train_data_meta) or (Fraction(1),)
    return PlanOptions.pick(vars(config), world_size=world_size or config.num_processes or 1, repeats=repeats)
