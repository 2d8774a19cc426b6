"""What torch does between two moments, and what of it is left in memory."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vfun_cli.training.blocks import MATRIX_PRODUCTS, is_attention

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Notes operations, and the memory that they take on one device.

    Args:
        device: the one whose memory counts, as torch itself calls it.
        look_every: operations after which memory is looked at for its peak.
    """

    def __init__(self, device: str = "cpu", *, look_every: int | None = None) -> None:
        super().__init__()
        self.device, self.look_every = torch.device(device), look_every
        self.counts = Counter[str]()
        """``product``, ``to itself`` and ``to others`` (attentions), ``host memory`` (taken)."""
        self.attended = 0
        """Bytes that attentions to themselves gave."""
        self.sent = 0
        """Bytes copied from the device to the host."""
        self.peak = 0
        self.done = 0
        self.made = dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        with torch._C.DisableTorchFunction():
            tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            given = {each.untyped_storage()._cdata for each in tree_leaves(arguments) if isinstance(each, Tensor)}
            storages = [each.untyped_storage() for each in tensors if each.device == self.device]
            storages = [storage for storage in storages if storage._cdata not in given]  # views take none
            self.made |= {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages}
            if is_attention(operation):
                itself = arguments[0].shape == arguments[1].shape
                self.counts["to itself" if itself else "to others"] += 1
                self.attended += itself * sum(storage.nbytes() for storage in storages)
            self.counts["product"] += operation in MATRIX_PRODUCTS
            self.counts["host memory"] += operation is aten.empty.memory_format and tensors[0].device.type == "cpu"
            if operation is aten.copy_.default and arguments[0].device != self.device == arguments[1].device:
                self.sent += arguments[1].nbytes
        self.done += 1
        if self.look_every and self.done % self.look_every == 0:
            self.peak = max(self.peak, self.left())
        return result

    def left(self) -> int:
        """Bytes that were taken and not let go."""
        self.made = {key: taken for key, taken in self.made.items() if not taken[0].expired()}
        return sum(size for _, size in self.made.values())
