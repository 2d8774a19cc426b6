"""What layers save for their backward pass goes to the host's memory and comes back, beside the computation.

While a layer computes, what the layer before it saved goes out; while a layer is in its backward pass, what the layer
before it saved comes back. So what two layers save is on the device at most, however many there are.

Who may touch what when, with a side stream for the copies:

- Memory of the device is taken and let go in the order of the main stream. The side stream waits for the main one
  before it reads or writes, the main one for the side stream before anything is used or let go. With
  ``record_stream`` instead, memory would stay taken for as long as the host is ahead of the device.
- Each such wait is an entry in a stream: the host itself waits for nothing.
- Memory of the host is used again as soon as its way back is asked for: all copies are of one stream, one after the
  other. Nothing is pinned anew in the next step.

A CPU has no streams; there the same copies are made in the order of the program.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from vfun_cli.modeling.transfer import SideStream
from vfun_cli.training.precision import is_weight

RESIDENT = 1
"""Layers at the end whose tensors stay: the backward pass begins with them, and they could not be back in time."""

SMALLEST = 1 << 16
"""Bytes of a storage that is worth the copies: through PCIe 4 they take 3 µs, but asking for one takes the host 10."""

PIECE = 8 << 20
"""Bytes that are pinned at once. torch rounds up to a power of two: the 368.6 MB that enter a layer of Wan-S2V would
take 536.9, if they were one piece, and no clip of another size could have the memory of one."""


class Offload:
    """Runs the layers of a transformer, one pass after another.

    Args:
        layers: how many there are in a pass.
    """

    def __init__(self, transformer: nn.Module, layers: int) -> None:
        self.layers = layers
        self.host: _Host | None = None
        self.side: SideStream | None = None
        self.newest: _Layer | None = None
        self.leaving: list[_Stored] = []
        self.coming: list[_Stored] = []
        """What the side stream works on; its memory must not be let go meanwhile."""
        self.known = WeakValueDictionary[Any, _Stored]()
        transformer.register_forward_pre_hook(lambda *_: self.begin())

    def begin(self) -> None:
        """A pass starts: nothing of another one is looked at any more."""
        if self.side is not None:
            self._meet()
        self.newest = None
        self.known.clear()

    def run(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Compute a layer; what it saves goes out while the next one computes."""
        if self.side is None:
            device = next(each.device for each in arguments if isinstance(each, Tensor))
            self.side, self.host = SideStream(device, used=True), _Host(pinned=device.type == "cuda")
        layer = self.newest = _Layer(self.newest)
        with saved_tensors_hooks(self.pack, self.unpack):
            result = compute(*arguments)
        self._meet()
        if layer.number < self.layers - RESIDENT:
            self._send(layer)
        return result

    def pack(self, tensor: Tensor) -> Any:
        """What stands for a tensor until the backward pass."""
        assert self.side is not None and self.newest is not None
        elsewhere = tensor.device.type == "cpu" != self.side.device.type
        storage = tensor.untyped_storage()
        if elsewhere or storage.nbytes() < SMALLEST or is_weight(tensor):
            # A leaf as it is: ZeRO-3 and FSDP give its weights back later. Others without their graph, lest it be kept.
            return tensor if tensor.is_leaf else tensor.detach()
        # A storage is known as long as somebody refers to what is stored of it, so no other has its address.
        key = storage._cdata, tensor._version, tensor.dtype
        stored = self.known.get(key)
        if stored is None:
            stored = self.known[key] = _Stored(tensor)
        self.newest.stored[stored] = None
        return _Saved(self.newest, stored, tensor)

    def unpack(self, saved: Any) -> Tensor:
        """The tensor again."""
        if not isinstance(saved, _Saved):
            tensor: Tensor = saved
            return tensor
        if not saved.layer.entered:
            self._enter(saved.layer)
        return saved.tensor()

    def _enter(self, layer: "_Layer") -> None:
        """Its backward pass begins: what it saved has come, and what the layer before saved is sent for."""
        layer.entered = True
        self._fetch(layer)  # it was sent for, unless passes come back in another order
        self._meet()
        layer.stored.clear()
        if layer.previous is not None:
            self._fetch(layer.previous)
            layer.previous = None

    def _meet(self) -> None:
        """Let the main stream go on when all copies are made. What left may be let go then, what came may be used."""
        assert self.side is not None
        if self.leaving or self.coming:
            self.side.hand_over()
        for stored in self.leaving:
            stored.there = None
        self.leaving, self.coming = [], []

    def _send(self, layer: "_Layer") -> None:
        assert self.side is not None and self.host is not None
        self.side.follow()
        self.leaving = [stored for stored in layer.stored if not stored.pieces]
        with self.side.context():
            for stored in self.leaving:
                stored.send(self.host)

    def _fetch(self, layer: "_Layer") -> None:
        assert self.side is not None and self.host is not None
        missing = [stored for stored in layer.stored if stored.there is None]
        if not missing:
            return
        for stored in missing:
            stored.there = stored.like.new_empty(stored.size)
        self.side.follow()
        with self.side.context():
            for stored in missing:
                stored.fetch(self.host)
        self.coming += missing


class _Layer:
    """What one layer saved in one pass."""

    def __init__(self, previous: "_Layer | None") -> None:
        self.previous = previous
        self.number: int = 0 if previous is None else previous.number + 1
        self.stored = dict[_Stored, None]()
        self.entered = False


class _Stored:
    """The bytes of a storage: on the device (``there``), on the host (``pieces``), or both."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive = StorageWeakRef(storage)
        self.version: int | None = tensor._version
        """Of the tensor that was saved; what has come back has none, and nobody else has it."""
        self.there: Tensor | None = alias(tensor, whole=True)
        self.size, self.like = len(self.there), self.there.new_empty(0)
        self.pieces: list[Tensor] = []

    def send(self, host: "_Host") -> None:
        self.pieces = host.take(self.size)
        for piece, part in zip(self.pieces, self.bytes().split(PIECE), strict=True):
            piece[: len(part)].copy_(part, non_blocking=True)

    def fetch(self, host: "_Host") -> None:
        assert self.there is not None
        for piece, part in zip(self.pieces, self.there.split(PIECE), strict=True):
            part.copy_(piece[: len(part)], non_blocking=True)
        host.give(self.pieces)
        self.pieces, self.version = [], None

    def bytes(self) -> Tensor:
        """All of them, on the device."""
        assert self.there is not None
        return self.there if self.version is None else unchanged(self.there, self.version)


class _Saved:
    """A view of what is stored, as it was saved."""

    def __init__(self, layer: _Layer, stored: _Stored, tensor: Tensor) -> None:
        self.layer, self.stored = layer, stored
        self.dtype, self.place = tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        return self.stored.bytes().view(self.dtype).as_strided(*self.place)


def alias(tensor: Tensor, *, whole: bool = False) -> Tensor:
    """The same memory without a graph, or the bytes of the whole storage; changes in place are counted for both alike.

    Under a dispatch mode, which works below where they are counted, that has to be asked for.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        same = tensor.detach()
        if not whole:
            return same
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        return same.as_strided((elements,), (1,), 0).view(torch.uint8)


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """The tensor, if it was not changed in place since it had this version.

    Raises:
        RuntimeError: it was.
    """
    if tensor._version != version:
        raise RuntimeError("what a layer keeps for its backward pass was changed in place")
    return tensor


class _Host:
    """Memory of the host in pieces of ``PIECE`` bytes, the last one of a storage in the next power of two."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.free = defaultdict[int, list[Tensor]](list)

    def take(self, size: int) -> list[Tensor]:
        """Pieces for so many bytes."""
        rest = size % PIECE
        sizes = [PIECE] * (size // PIECE) + ([1 << (rest - 1).bit_length()] if rest else [])
        return [self._piece(each) for each in sizes]

    def _piece(self, size: int) -> Tensor:
        free = self.free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give(self, pieces: list[Tensor]) -> None:
        """Take them back, although the device may still read them: it writes to them later in the same stream."""
        for piece in pieces:
            self.free[len(piece)].append(piece)
