"""Which micro-batches of a plan a forecast is about."""

from dataclasses import dataclass

import numpy as np

from vfun_cli.families.spec import ClipShape
from vfun_cli.forecast.request import Batch
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan
from vfun_cli.plan.sizes import size_set


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Of a plan."""

    heaviest: Batch
    """That of most tokens: whether it fits decides."""
    typical: Batch
    """The median by tokens."""


def batches(plan: RunPlan, epoch: EpochPlan | None = None) -> Batches:
    """Of an epoch or, where no clips are known, of the sizes that square clips may get."""
    return _of_sizes(plan) if epoch is None or not len(epoch.tokens) else _of_epoch(epoch)


def _of_epoch(epoch: EpochPlan) -> Batches:
    used = np.unique(epoch.steps.reshape(-1)) if epoch.num_steps else np.arange(len(epoch.tokens))
    by_tokens = used[np.argsort(epoch.tokens[used], kind="stable")]

    def batch(number: int) -> Batch:
        return Batch(
            frames=int(epoch.frames[number]),
            height=int(epoch.height[number]),
            width=int(epoch.width[number]),
            clips=int(epoch.offset[number + 1] - epoch.offset[number]),
        )

    return Batches(heaviest=batch(int(by_tokens[-1])), typical=batch(int(by_tokens[len(by_tokens) // 2])))


def _of_sizes(plan: RunPlan) -> Batches:
    spec, options = plan.spec, plan.options
    sizes = size_set(spec.media_types[0], options, spec, plan.dims)

    def tokens(shape: ClipShape) -> int:
        return spec.model.sequence_tokens(shape, plan.dims)

    def batch(shape: ClipShape) -> Batch:
        budget = options.tokens_per_batch
        clips = options.train_batch_size if budget is None else max(1, budget // tokens(shape))
        return Batch(frames=shape.frames, height=shape.height, width=shape.width, clips=clips)

    shapes = sorted(map(sizes.square, range(len(sizes.sizes))), key=tokens)
    return Batches(heaviest=batch(shapes[-1]), typical=batch(shapes[len(shapes) // 2]))
