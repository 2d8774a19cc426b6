"""Frozen weights of transformer blocks that wait in host memory and come to the device ahead of their block.

    stream = BlockStream(device)
    for layers in blocks:  # the frozen linear layers of each
        stream.take(layers)

A layer asks for its weight whenever it multiplies by it: forward, in what is computed again, and backward. The first
question of a block gets the block a slot of the device's ring, unless it is there already, and sends for the block that
came after these two the last time. So the order of a pass is learned and not told: blocks of two kinds, backward,
passes without gradients, one after the other. Another order than expected costs time, never a wrong number.

Weights go one way: frozen ones never change. On CUDA they come from pinned memory in a stream of their own, which
waits for what was computed with a slot's old weights before it overwrites them, and for which the block waits; the
host waits for nothing. On a CPU the copies are made in the order of the program.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vfun_cli.errors import FitError, first_line
from vfun_cli.modeling.lazy_weights import NOT_LAZY, LazyWeights
from vfun_cli.modeling.transfer import SideStream
from vfun_cli.training.frozen import FrozenLinear, WholeLinear, replace_linears
from vfun_cli.training.quantised import quantiser

RING = 2
"""Slots of the device: a block computes while the next one arrives."""

PIECE = 1 << 24
"""Bytes of a copy. torch takes pinned memory in powers of two, so a block of 700 MB in one piece would hold 1 GiB."""

ALIGNED = 256
"""Bytes: where a tensor in a slot begins, as torch's own allocator aligns."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor lies in its block."""

    first: int
    """Byte."""
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.first + self.shape.numel() * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """The tensor itself, a view of the block's bytes."""
        return block[self.first : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A block's weights as bytes of the host, in pieces, and what they are."""

    pieces: Sequence[Tensor]
    places: Sequence[_Place]

    @property
    def bytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


@dataclass(kw_only=True, eq=False)
class _Slot:
    """Memory of the device for one block at a time."""

    memory: Tensor
    block: int | None = None
    tensors: Sequence[Tensor] = ()
    """Its weights. They share the version counter of ``memory``: if autograd kept one, it would notice the next."""


def _places(tensors: Sequence[Tensor]) -> list[_Place]:
    """One behind the other."""
    places, size = list[_Place](), 0
    for tensor in tensors:
        place = _Place(first=-(-size // ALIGNED) * ALIGNED, dtype=tensor.dtype, shape=tensor.shape)
        places.append(place)
        size = place.end
    return places


class BlockStream:
    """The blocks of a transformer that do not stay on the device; numbered in the order in which they were taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = SideStream(device, used=True)
        self.blocks: list[_Block] = []
        self.slots: list[_Slot] = []
        """Those used last come last."""
        self.before: int | None = None
        self.now: int | None = None
        self.next_after: dict[tuple[int | None, int | None], int] = {}
        """Which block came after two others the last time."""

    @property
    def host_bytes(self) -> int:
        """Of this process."""
        return sum(block.bytes for block in self.blocks)

    @property
    def ring_bytes(self) -> int:
        """Of the device."""
        return sum(len(slot.memory) for slot in self.slots)

    def take(self, layers: Sequence[FrozenLinear], lazy: LazyWeights = NOT_LAZY) -> None:
        """Move the weights of a block's layers to the host; what is in its file yet goes by way of the device.

        Raises:
            FitError: the host has no memory for them.
        """
        sources = [layer.get_parameter(name) for layer in layers for name in layer.kept]
        places = _places(sources)
        block = torch.empty(places[-1].end if places else 0, dtype=torch.uint8, device=self.device)
        for parameter, place in zip(sources, places, strict=True):
            place.of(block).copy_(lazy.value(parameter, self.device))
        number, first = len(self.blocks), 0
        for layer in layers:
            layer.lend(partial(self._tensors, number, slice(first, first + len(layer.kept))))
            first += len(layer.kept)
        self.blocks.append(_Block(pieces=[self._on_host(piece) for piece in block.split(PIECE)], places=places))

    def open(self) -> None:
        """Make the ring, when all blocks are taken."""
        largest = max(block.bytes for block in self.blocks)
        for _ in self.blocks[:RING]:
            self.slots.append(_Slot(memory=torch.empty(largest, dtype=torch.uint8, device=self.device)))

    def _on_host(self, piece: Tensor) -> Tensor:
        """A copy, in the order of the device's stream; whoever copies it back is later there."""
        try:
            held = torch.empty(len(piece), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        except RuntimeError as error:
            raise FitError(
                f"--stream-blocks: no more host memory can be pinned after {self.host_bytes / 1e9:.1f} GB: "
                f"{first_line(error)}.",
                hint="Each process keeps the blocks that it streams: use a larger --stream-blocks, a smaller "
                "--base-precision, or fewer processes; in a container, ask for more memory.",
            ) from error
        return held.copy_(piece, non_blocking=True)

    def _tensors(self, block: int, which: slice) -> Sequence[Tensor]:
        """A layer's weights, on the device until another block is asked for that is not there."""
        if block != self.now:
            # Copies are no part of what is computed: selective checkpointing counts operations, and when it computes a
            # block again there may be another number of them.
            with _disable_current_modes():
                self._turn_to(block)
        return self.slots[-1].tensors[which]

    def _turn_to(self, block: int) -> None:
        before, self.now = self.now, None  # whatever is interrupted here, no block is taken for another afterwards
        self.next_after[self.before, before] = block
        slot = next((slot for slot in self.slots if slot.block == block), None) or self._fetch(block)
        self.slots.remove(slot)
        self.slots.append(slot)
        self.side.hand_over()  # with one copy under way it is this block's
        self.before, self.now = before, block
        ahead = self.next_after.get((before, block))
        if ahead is not None and all(slot.block != ahead for slot in self.slots):
            self._fetch(ahead)

    def _fetch(self, number: int) -> _Slot:
        """Send for a block, into the slot that was used longest ago."""
        slot, block = self.slots[0], self.blocks[number]
        slot.block, slot.tensors = None, ()
        self.side.follow()
        with self.side.context(), torch.no_grad():
            for piece, part in zip(block.pieces, slot.memory.split(PIECE), strict=False):
                part[: len(piece)].copy_(piece, non_blocking=True)
        slot.block, slot.tensors = number, [place.of(slot.memory) for place in block.places]
        return slot


def stream_blocks(
    blocks: Sequence[Sequence[nn.Module]],
    resident: int,
    precision: str,
    device: torch.device,
    lazy: LazyWeights = NOT_LAZY,
) -> BlockStream:
    """Let all but ``resident`` blocks wait on the host; each is read, and quantised, on the device before the next.

    What streams is the weights of a block's frozen linear layers. Norms, biases and tables, 0.03 % of a block of 14B
    weights, stay where they are, and so does what trains.

    Args:
        blocks: the modules of each, in the order of the forward pass. Fewer than these are resident.
        precision: as ``--base-precision`` says.
    """
    stream = BlockStream(device)
    for layers in _leaving(blocks, resident, precision, device, lazy):
        stream.take(layers, lazy)
    stream.open()
    return stream


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What streaming changes, in bytes."""

    host: int
    """Of each process."""
    ring: int
    """Of its device."""


def bytes_moved(blocks: Sequence[Sequence[nn.Module]], resident: int, precision: str, device: torch.device) -> Moved:
    """What ``stream_blocks`` would move of blocks without values, whose linear layers are replaced."""
    sizes = []
    for layers in _leaving(blocks, resident, precision, device, NOT_LAZY):
        sizes.append(_places([layer.get_parameter(name) for layer in layers for name in layer.kept])[-1].end)
    return Moved(host=sum(sizes), ring=max(sizes, default=0) * min(RING, len(sizes)))


def _leaving(
    blocks: Sequence[Sequence[nn.Module]], resident: int, precision: str, device: torch.device, lazy: LazyWeights
) -> Iterator[list[FrozenLinear]]:
    """The frozen linear layers of each block that is not to stay, in their new form."""
    make = WholeLinear if precision == "bf16" else quantiser(precision, device, lazy)
    staying = spread(resident, len(blocks))
    for index, modules in enumerate(blocks):
        if index in staying:
            continue
        for module in modules:
            replace_linears(module, make)
        parts = (part for module in modules for part in module.modules())
        yield [part for part in parts if isinstance(part, FrozenLinear)]


def spread(some: int, of: int) -> set[int]:
    """So many numbers below another one, evenly: a block arrives while those that stay before it compute."""
    return {(2 * index + 1) * of // (2 * some) for index in range(some)}
