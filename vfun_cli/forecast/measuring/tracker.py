"""Counts the bytes that tensors made inside it hold, at every operation."""

import weakref
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
        self._known: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()

    def mark(self) -> int:
        """The most up to now; from now on the peak is counted anew."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run the operation and count what is new of its results."""
        given = {each.untyped_storage() for each in arguments if isinstance(each, Tensor)}
        found = operation(*arguments, **(named or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage(), given)
        return found

    def _count(self, storage: UntypedStorage, given: set[UntypedStorage]) -> None:
        """A view or a result in place is of a storage that was given."""
        if storage in self._known or storage in given:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._let_go, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _let_go(self, size: int) -> None:
        self.bytes -= size
