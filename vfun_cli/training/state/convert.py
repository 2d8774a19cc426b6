"""Fills the live state of any strategy from a checkpoint of any other: weights and what the optimizer kept, by name.

Tensors are read one after another when they are put into place, so at most one full tensor is in memory.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vfun_cli.checkpoints.reader import CheckpointReader, Moments
from vfun_cli.checkpoints.tensors import TensorSource
from vfun_cli.training.state.gather import restore
from vfun_cli.training.state.live import TrainedState, require_names, trained_parameters

Stored = TypeVar("Stored")
Read = TypeVar("Read")


def load_converted(state: TrainedState, checkpoint: CheckpointReader) -> None:
    """Put the checkpoint's weights and moments into a state that has not stepped yet; all ranks together.

    Raises:
        CheckpointError: it holds other weights than those that are trained.
    """
    require_names(set(trained_parameters(state)), set(checkpoint.weights), checkpoint.path)
    counted = {name: torch.tensor(number) for name, number in checkpoint.groups.items()}
    restore(state, _Late(checkpoint.weights, _tensor), _Late(checkpoint.moments, _moments), counted)


@dataclass(frozen=True)
class _Late(Mapping[str, Read], Generic[Stored, Read]):
    """What is stored, read each time that it is accessed."""

    stored: Mapping[str, Stored]
    read: Callable[[Stored], Read]

    def __getitem__(self, name: str) -> Read:
        return self.read(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _tensor(source: TensorSource) -> Tensor:
    return torch.from_numpy(source.read())


def _moments(stored: Moments) -> Mapping[str, Tensor]:
    numbers = {name: torch.tensor(number) for name, number in stored.numbers.items()}  # copies: they are counted up
    return ChainMap(numbers, _Late(stored.arrays, _tensor))  # type: ignore[arg-type]  # nothing is written into it
