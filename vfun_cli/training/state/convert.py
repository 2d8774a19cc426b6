"""Fills the live state of any strategy from a checkpoint of any other: weights, moments and step counts by name.

Tensors are read one after another when they are put into place, so at most one full tensor is in memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vfun_cli.checkpoints.reader import CheckpointReader
from vfun_cli.training.state.gather import STEP, restore
from vfun_cli.training.state.live import TrainedState, require_names, trained_parameters


def load_converted(state: TrainedState, checkpoint: CheckpointReader) -> None:
    """Put the checkpoint's weights and moments into a state that has not stepped yet; all ranks together.

    Raises:
        CheckpointError: it holds other weights than those that are trained.
    """
    require_names(set(trained_parameters(state)), set(checkpoint.weights), checkpoint.path)
    restore(state, _Weights(checkpoint), _Moments(checkpoint))


@dataclass(frozen=True)
class _Weights(Mapping[str, Tensor]):
    """Weights by name, read when they are accessed."""

    checkpoint: CheckpointReader

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.checkpoint.weights[name].read())

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.weights)

    def __len__(self) -> int:
        return len(self.checkpoint.weights)


@dataclass(frozen=True)
class _Moments(Mapping[str, Tensor]):
    """``<parameter>.<moment>``, read when it is accessed."""

    checkpoint: CheckpointReader

    def __getitem__(self, name: str) -> Tensor:
        parameter, _, key = name.rpartition(".")
        moments = self.checkpoint.moments[parameter]
        return torch.tensor(float(moments.step)) if key == STEP else torch.from_numpy(getattr(moments, key).read())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.rpartition(".")[0] in self.checkpoint.moments

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.{key}" for name in self.checkpoint.moments for key in ("exp_avg", "exp_avg_sq", STEP))

    def __len__(self) -> int:
        return 3 * len(self.checkpoint.moments)
