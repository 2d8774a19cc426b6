"""Which rows a run is validated on, as which clips, and what their loss costs.

What is held out, and as what, depends on the rows, the options and the seed alone: not on the order of the rows, not on
the number of ranks.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.clips import KINDS, draw_shapes, prepare
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.sets import read_rows

QUANTILES = tuple(tenth / 10 for tenth in range(1, 10))
"""Of the timesteps that training draws: where the loss of a held-out clip is computed, with the same noise at each."""


def hold_out(config: RunConfig, spec: FamilySpec, dims: ModelDims, table: ClipTable) -> ClipTable:
    """The table of a run's metadata with ``validation_rows`` of the rows that could be trained marked as held out.

    All rows of a video are held out or none: what was trained under another caption would not be unseen. The videos
    with the smallest hashes of seed and path go first, until there are as many rows as asked.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    wanted = config.validation_rows
    if wanted is None:
        return table
    clips = prepare(spec, dims, table, plan_options(config))
    places = {int(table.row[index]): index for index in np.flatnonzero(clips.used).tolist()}
    visual = next(item.name for item in spec.fields if item.media == "visual")
    videos: dict[str, list[int]] = defaultdict(list)
    for record in read_rows(config).records:
        if record.row in places:
            videos[_rank(config.seed, record.fields.get(visual))].append(places[record.row])
    held_out = np.zeros(len(table), dtype=np.bool_)
    for _, rows in sorted(videos.items()):
        if held_out.sum() >= wanted:
            break
        held_out[rows] = True
    if held_out.sum() == len(places):
        raise ConfigError(
            f"validation_rows {wanted} of the {len(places)} rows that can be trained would leave nothing to train on.",
            hint="Hold fewer rows out, or name other ones with --validation-meta.",
            option="--validation-rows",
        )
    return replace(table, held_out=held_out)


def _rank(seed: int, video: Any) -> str:
    return hashlib.blake2b(f"{seed}\0{video}".encode(errors="surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class HeldOutClip:
    """The one clip that a held-out row is looked at as."""

    row: int
    kind: str
    shape: ClipShape
    stride: int
    total_frames: int
    fps: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What the held-out loss of a run is computed on."""

    clips: tuple[HeldOutClip, ...]
    """In the order of the rows."""
    forward_flops: float
    """Of one forward pass over each of them."""


def held_out_clips(spec: FamilySpec, dims: ModelDims, options: PlanOptions, table: ClipTable) -> HeldOut:
    """Each usable row of a table as what the plan would draw of it in the first epoch."""
    table = replace(table, held_out=np.zeros(len(table), dtype=np.bool_))
    clips = prepare(spec, dims, table, options)
    used = np.flatnonzero(clips.used)
    first = np.zeros(len(used), dtype=np.int64)
    drawn = draw_shapes(clips, used, first, first)
    found = []
    for index, place in enumerate(used.tolist()):
        found.append(
            HeldOutClip(
                row=int(table.row[place]),
                kind=KINDS[int(drawn.is_image[index])],
                shape=ClipShape(
                    frames=int(drawn.frames[index]), height=int(drawn.height[index]), width=int(drawn.width[index])
                ),
                stride=int(clips.stride[place]),
                total_frames=int(table.frames[place]),
                fps=(int(table.fps_num[place]), int(table.fps_den[place])),
            )
        )
    flops = sum(spec.model.forward_flops(clip.shape, dims) for clip in found)
    return HeldOut(clips=tuple(found), forward_flops=float(flops))


@dataclass(frozen=True, kw_only=True)
class Dates:
    """How often a run validates, beside before its first step and after its last."""

    steps: int | None = None
    epochs: int | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "Dates | None":
        """As the options say; None for a run that has nothing to validate on."""
        if not config.validates:
            return None
        steps, epochs = config.validation_steps, config.validation_epochs
        return cls(steps=config.checkpointing_steps if steps is None and epochs is None else steps, epochs=epochs)

    def ends(self, epochs: Iterator[Any]) -> Iterator[int]:
        """The steps after which so many epochs are over.

        Args:
            epochs: the plans of a run in order; one in which the step size changed comes as several.
        """
        if self.epochs is None:
            return
        step, times = 0, 0
        for plan in epochs:
            if plan.epoch // self.epochs > times:
                times = plan.epoch // self.epochs
                yield step
            step += plan.num_steps
