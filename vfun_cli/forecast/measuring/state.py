"""What a rank keeps of the weights from step to step under each strategy, to the byte.

Of several ranks it is the one that keeps the most: rank 0, but where DeepSpeed keeps gradients of whole tensors. What
an optimizer keeps is told by the table of optimizers, as for checkpoints: some look at values in their first step, of
which a measurement has none.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from vfun_cli.config.optimizers import state_bytes, step_bytes
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.forecast.measuring.model import Weight
from vfun_cli.forecast.memory import ZERO3_STEPS

WHOLE_BELOW = 100_000
"""ZeRO-3 keeps parameters of at most so many numbers whole (DeepSpeed's ``stage3_param_persistence_threshold``)."""
ALIGNED = 2
"""ZeRO-2 cuts its flat weights into parts of a multiple of so many numbers (DeepSpeed's, for NCCL)."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one rank."""

    weights: int
    """Of those that the model has: float32 masters of what trains but under DeepSpeed, the compute type else."""
    masters: int
    """DeepSpeed's float32 masters, which lie beside."""
    gradients: int
    """After the backward pass."""
    moments: int
    """The optimizer's state after its first step."""
    average: int
    """The moving average of the weights."""
    step: int
    """What the optimizer's step makes, and lets go at its end."""


def kept(config: RunConfig, weights: Sequence[Weight], ranks: int) -> Kept:
    """What a rank of so many keeps."""
    return _KEPT[STRATEGIES[config.strategy].wrapper, "weights" in STRATEGIES[config.strategy].sharded](
        config, weights, ranks
    )


def _whole(config: RunConfig, weights: Sequence[Weight], ranks: int) -> Kept:
    trained = [weight for weight in weights if weight.trained]
    count = sum(weight.numel for weight in trained)
    return Kept(
        weights=4 * count + sum(_itemsize(config, weight) * weight.numel for weight in weights if not weight.trained),
        masters=0,
        gradients=4 * count,
        moments=state_bytes(config, (weight.shape for weight in trained)),
        average=4 * count * config.use_ema,
        step=step_bytes(config, (weight.shape for weight in trained)),
    )


def _sharded(config: RunConfig, weights: Sequence[Weight], ranks: int) -> Kept:
    """FSDP cuts each weight along its first dimension into equal parts, the last ones shorter."""

    def part(weight: Weight) -> tuple[int, ...]:
        return (-(-weight.shape[0] // config.parts_of(ranks)), *weight.shape[1:])

    return _whole(config, [replace(weight, shape=part(weight)) for weight in weights], 1)


def _flat(config: RunConfig, weights: Sequence[Weight], ranks: int) -> Kept:
    """ZeRO-2: weights whole in the compute type; of masters, gradients and moments a part of a flat tensor a group."""
    align, groups = ALIGNED * ranks, [[weight.numel for weight in group] for group in _groups(weights)]
    parts = [math.ceil(sum(numels) / align) * ALIGNED for numels in groups]
    part = sum(parts)
    reached = (_reaching_into_a_part(*each, ranks) for each in zip(groups, parts, strict=True))
    return Kept(
        weights=config.compute_bytes * part * ranks
        + sum(_itemsize(config, weight) * weight.numel for weight in weights if not weight.trained),
        masters=4 * part,
        gradients=4 * (part if config.bf16 else sum(reached)),
        moments=state_bytes(config, [(part,) for part in parts]),
        average=4 * part * config.use_ema,
        step=step_bytes(config, [(part,) for part in parts]),
    )


def _reaching_into_a_part(numels: Sequence[int], part: int, ranks: int) -> int:
    """Numbers of all tensors that lie in the same part of a flat one, if only with an end, and what fills it up.

    Where gradients are summed in another type than the weights have, DeepSpeed makes a tensor of the part for that;
    else it keeps the tensors of the backward pass. Of all parts it is the one where they are most.
    """
    ends = list(accumulate(numels))
    starts = [end - numel for end, numel in zip(ends, numels, strict=True)]

    def reaching(begin: int) -> int:
        inside = [
            numel
            for numel, start, end in zip(numels, starts, ends, strict=True)
            if start < begin + part and end > begin
        ]
        return sum(inside) + max(0, begin + part - max(begin, ends[-1]))

    return max(reaching(part * rank) for rank in range(ranks))


def _partitioned(config: RunConfig, weights: Sequence[Weight], ranks: int) -> Kept:
    """ZeRO-3: each weight is cut into equal parts, the last filled up; small ones lie there whole, too, and filled up.

    One rank has all in its parts. Offloaded gradients lie there twice: as they were summed, and at the masters.
    """
    parts = {weight.name: -(-weight.numel // ranks) for weight in weights}
    whole = ranks * sum(parts[weight.name] for weight in weights if weight.numel <= WHOLE_BELOW) if ranks > 1 else 0
    groups = [[parts[weight.name] for weight in group] for group in _groups(weights)]
    part = sum(map(sum, groups))
    together = [(count,) for group in groups for count in _sub_groups(group)]
    return Kept(
        weights=config.compute_bytes * (sum(parts.values()) + whole),
        masters=4 * part,
        gradients=4 * part * (2 if STRATEGIES[config.strategy].offloads else 1),
        moments=state_bytes(config, together),
        average=4 * part * config.use_ema,
        step=max((step_bytes(config, [shape]) for shape in together), default=0),
    )


def _sub_groups(parts: Iterable[int]) -> list[int]:
    """Sums of parts that follow each other, each just as large as ``ZERO3_STEPS`` or larger, but for the last."""
    groups = [0]
    for part in parts:
        if groups[-1] >= ZERO3_STEPS:
            groups.append(0)
        groups[-1] += part
    return groups


_KEPT = {
    ("none", False): _whole,
    ("ddp", False): _whole,
    ("fsdp", True): _sharded,
    ("deepspeed", False): _flat,
    ("deepspeed", True): _partitioned,
}
"""By what accelerate wraps the model in, and whether the weights themselves are in parts."""


def _groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """What trains at each learning rate: DeepSpeed makes flat tensors of each group of parameters."""
    rates = ([weight for weight in weights if weight.trained and weight.slow == slow] for slow in (False, True))
    return [group for group in rates if group]


def _itemsize(config: RunConfig, weight: Weight) -> int:
    """Bytes of a number of a frozen weight."""
    return weight.itemsize or config.compute_bytes
