"""Copies between host and device that do not wait for the device's stream, and a second stream."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, copied in the order of its stream.

    From pageable memory CUDA copies only when the stream has drained; a copy from pinned memory is asynchronous.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def catch_up(device: torch.device) -> None:
    """Wait until the device has computed all that it was given: its host may be a thousand kernels ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Download:
    """Values of the device on their way to the host: an asynchronous copy in the stream."""

    def __init__(self, values: Tensor) -> None:
        self.arrived: Any = None
        self.values = values
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def tensor(self) -> Tensor:
        """The values; waits until the device has computed them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values

    def numbers(self) -> list[Any]:
        """The same as Python's numbers."""
        return self.tensor().tolist()


class SideStream:
    """A second stream of the device: what runs there does not wait for the step on the main stream.

    The allocator does not share memory between streams, so a second one takes its own on top: ``used`` is false where
    memory is to be saved. A device without streams works in the order of the program.
    """

    def __init__(self, device: torch.device, *, used: bool) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if used and device.type == "cuda" else None
        self.follow()  # weights may still be on their way

    def context(self) -> AbstractContextManager[Any]:
        """Run what follows on this stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow(self) -> None:
        """Let this stream go on only when the main one has come to where it is now."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def hand_over(self, made: Iterable[Any] = ()) -> None:
        """Let the main stream go on only when this one is done, and own the tensors from then on."""
        if self.stream is None:
            return
        main = torch.cuda.current_stream(self.device)
        main.wait_stream(self.stream)
        for value in made:
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(main)


class Clock:
    """Moments of the device's own time: CUDA events in its stream, else this process's clock."""

    def __init__(self, device: torch.device) -> None:
        self.has_stream = device.type == "cuda"

    def mark(self) -> Any:
        """The moment when the device gets here."""
        if not self.has_stream:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, first: Any, second: Any) -> float:
        """Between two marks that the device has passed."""
        elapsed: float = first.elapsed_time(second) / 1000 if self.has_stream else second - first
        return elapsed
