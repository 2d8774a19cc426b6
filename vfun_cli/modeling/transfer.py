"""Between the host and the device without waiting for the work that is queued there."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, in order with what is queued there.

    CUDA copies from ordinary memory only after its queue has run empty; from pinned memory it queues the copy too.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Download:
    """Values of the device on their way to the host; the copy waits in the queue, not the host."""

    def __init__(self, values: Tensor) -> None:
        self.arrived: Any = None
        self.values = values
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def numbers(self) -> list[Any]:
        """The values; waits until the device has come to them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class SideStream:
    """A second stream of the device: what runs there does not wait for the step on the main stream.

    Memory that one stream has used, another does not use again, so it takes its own on top: not for those who asked to
    save it (``used``). A device without streams works in the order of the program.
    """

    def __init__(self, device: torch.device, *, used: bool) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if used and device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way

    def context(self) -> AbstractContextManager[Any]:
        """Run what follows on this stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def hand_over(self, made: Iterable[Any]) -> None:
        """Let the main stream go on only when this one is done, and own the tensors from then on."""
        if self.stream is None:
            return
        main = torch.cuda.current_stream(self.device)
        main.wait_stream(self.stream)
        for value in made:
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(main)


class Clock:
    """Moments of the device's own time: marks in its queue, or this process's clock where there is no queue."""

    def __init__(self, device: torch.device) -> None:
        self.queued = device.type == "cuda"

    def mark(self) -> Any:
        """The moment when the device gets here."""
        if not self.queued:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, first: Any, second: Any) -> float:
        """Between two marks that the device has passed."""
        elapsed: float = first.elapsed_time(second) / 1000 if self.queued else second - first
        return elapsed
