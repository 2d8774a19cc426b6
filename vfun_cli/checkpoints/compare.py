"""What two checkpoints have in common, tensor by tensor, whatever strategies wrote them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vfun_cli.checkpoints.reader import CheckpointReader
from vfun_cli.checkpoints.tensors import TensorSource


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two sets of named tensors differ."""

    equal: int
    """Tensors with the same shape and the same values, bit for bit."""
    different: dict[str, float]
    """Largest absolute difference by name; infinite where the shapes differ."""
    only_first: list[str]
    only_second: list[str]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.different or self.only_first or self.only_second)


def compare_tensors(first: Mapping[str, TensorSource], second: Mapping[str, TensorSource]) -> Comparison:
    """Read both sets once, one tensor of each at a time.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    equal, different = 0, {}
    for name in first.keys() & second.keys():
        distance = _distance(first[name], second[name])
        if distance is None:
            equal += 1
        else:
            different[name] = distance
    return Comparison(
        equal=equal,
        different=dict(sorted(different.items())),
        only_first=sorted(first.keys() - second.keys()),
        only_second=sorted(second.keys() - first.keys()),
    )


def distance(first: Mapping[str, TensorSource], second: Mapping[str, TensorSource]) -> float:
    """How far a set of weights is from another, relative to that: ``|first - second| / |second|``, lengths over all
    elements together. 0 if all values are equal; infinite where names or shapes differ, or a value is no number.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    if {name: tensor.shape for name, tensor in first.items()} != {name: each.shape for name, each in second.items()}:
        return math.inf
    gap, length = 0.0, 0.0
    for name, tensor in second.items():
        wanted = tensor.read().astype(np.float64)
        gap += float(np.square(first[name].read().astype(np.float64) - wanted).sum())
        length += float(np.square(wanted).sum())
    if gap == 0:
        return 0.0
    return math.sqrt(gap / length) if math.isfinite(gap) and length else math.inf


def moments(checkpoint: CheckpointReader) -> dict[str, TensorSource]:
    """The optimizer moments as ``<parameter>.<moment>``."""
    return {f"{name}.{key}": each for name, found in checkpoint.moments.items() for key, each in found.arrays.items()}


def _distance(first: TensorSource, second: TensorSource) -> float | None:
    """None for equal tensors. A NaN differs from everything, by infinity."""
    if first.shape != second.shape:
        return float("inf")
    a, b = first.read(), second.read()
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return None
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)
    return float("inf") if np.isnan(gap) else float(gap)
