"""What a run makes videos of while it trains besides its rows: the originals' ``--validation_prompts`` and paths."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec, ModelDims, SamplingInput
from vfun_cli.plan.sizes import round_frames
from vfun_cli.sampling.rows import Videos, videos_of_options
from vfun_cli.sampling.settings import Wanted, on_grid


def videos_of_prompts(config: RunConfig, spec: FamilySpec, dims: ModelDims) -> Videos | None:
    """A video of each prompt, as large and as long as the clips of the run; None without prompts.

    ``validation_paths`` are control clips where the family follows one, otherwise the pictures that videos begin with:
    what the original scripts take them for.

    Raises:
        ConfigError: media that the family does not take, or other numbers of them than of prompts.
    """
    if not config.validation_prompts or not config.validation_samples:
        return None
    takes = (*spec.sampling.required, *spec.sampling.optional)
    first: SamplingInput = "control" if "control" in takes else "image"
    given: dict[SamplingInput, tuple[str, ...]] = {
        first: config.validation_paths,
        "audio": config.validation_audio_paths,
    }
    if config.validation_image_paths:
        given["image"] = config.validation_image_paths
    media: Mapping[SamplingInput, Sequence[Path]] = {name: list(map(Path, paths)) for name, paths in given.items()}
    height, width = config.fix_sample_size or (config.video_sample_size, config.video_sample_size)
    size = (on_grid(Fraction(height), 0, spec), on_grid(Fraction(width), 1, spec))
    frames = round_frames(config.video_sample_n_frames, spec, dims)
    ours = replace(spec, sampling=replace(spec.sampling, frames=frames, size=size))
    wanted = Wanted(steps=config.validation_sampling_steps, guidance=config.validation_guidance, seed=config.seed)
    return videos_of_options(config.validation_prompts, media, ours, dims, wanted)
