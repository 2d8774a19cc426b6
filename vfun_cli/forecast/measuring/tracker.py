"""Counts the bytes that tensors made inside it hold, at every operation."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Inside, each memory that an operation makes counts from then until it is let go.

    What was there before does not count: weights, inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Now."""
        self.peak = 0
        """The most since the last ``mark``."""
        self._sizes: dict[int, int] = {}
        """By what ``memory`` says, of what is there."""

    def mark(self) -> int:
        """The most up to now; from now on the peak is counted anew."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run the operation and count what is new of its results."""
        named = named or {}
        given = set(map(memory, tensors_in((arguments, named))))
        found = operation(*arguments, **named)
        for each in tensors_in((found,)):
            place = memory(each)
            if place in self._sizes or place not in given:  # a view or a result in place is of a memory that was given
                self._count(place, each.untyped_storage())
        return found

    def _count(self, place: int, storage: UntypedStorage) -> None:
        """Also of one that was there, for an operation in place may have enlarged it."""
        if place not in self._sizes:
            weakref.finalize(storage, self._let_go, place)
        size = storage.nbytes()
        self.bytes += size - self._sizes.get(place, 0)
        self._sizes[place] = size
        self.peak = max(self.peak, self.bytes)

    def _let_go(self, place: int) -> None:
        self.bytes -= self._sizes.pop(place)


def memory(tensor: Tensor) -> int:
    """What tells the memory of one tensor from that of others that are there."""
    return tensor.untyped_storage()._cdata


def tensors_in(given: Iterable[Any]) -> list[Tensor]:
    """All in arguments or results, however they are nested."""
    found = []
    for each in given:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            found += tensors_in(each)
        elif isinstance(each, dict):
            found += tensors_in(each.values())
    return found
