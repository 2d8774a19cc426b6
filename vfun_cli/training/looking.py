"""What all that looks at a run from outside of its training shares: it can be stopped, and leaves nothing behind."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from vfun_cli.modeling.transfer import catch_up
from vfun_cli.training.data import loader
from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.state.averaged import average_in_place
from vfun_cli.training.state.live import TrainedState, let_go
from vfun_cli.training.waiting import most_of_all

T = TypeVar("T")

ASKED_EVERY = 0.1
"""Seconds; every question reads a file of the run's disk, which may be a network's."""


class Stopped(BaseException):
    """The run was asked to stop in the middle. No ``Exception``: none of those who go on after a failure catch it."""

    def __init__(self, reason: int) -> None:
        super().__init__()
        self.reason = reason


def go_on(stop: StopFlag, numbers: Sequence[int] = ()) -> list[int]:
    """The largest of each number over all ranks, which call it together.

    Raises:
        Stopped: a rank was asked to stop; on all of them.
    """
    reason, *most = most_of_all([stop.reason(), *numbers])
    if reason != CONTINUE:
        raise Stopped(reason)
    return most


def heeding(stop: StopFlag, work: Callable[[], T]) -> T:
    """What some work of this rank gives, as soon as every rank is done; all of them call it together.

    While it lasts it asks, by ``asking``, whether to go on.

    Raises:
        Exception: what the work raised on this rank; the others are done too.
        Stopped: a rank was asked to stop meanwhile; on all of them.
    """
    failed = None
    try:
        found = work()
    except Exception as error:
        failed = error
    while go_on(stop, [False])[0]:  # another rank is at work
        pass
    if failed is not None:
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame: with it, the work's tensors would wait for a garbage collector
    return found


def asking(stop: StopFlag, device: torch.device) -> Callable[[], None]:
    """What work in ``heeding`` calls as often as it can: now and then it asks all ranks, and raises as ``go_on`` does.

    The device has done by then what it was given, so that nothing is left to wait for.
    """
    asked = -math.inf

    def ask() -> None:
        nonlocal asked
        catch_up(device)
        if time.monotonic() - asked >= ASKED_EVERY:
            go_on(stop, [True])
            asked = time.monotonic()

    return ask


def patiently(ask: Callable[[], None], work: Callable[[], T]) -> T | None:
    """What some work gives that may hang and cannot ask; None if it took longer than a clip may that is trained on."""
    waiting = loader.patiently(work, limit=loader.LOAD_TIMEOUT)
    while True:
        try:
            next(waiting)
        except StopIteration as done:
            found: T | None = done.value
            return found
        ask()


def weights_of(state: TrainedState) -> list[str]:
    """By which weights a run is looked at: those that it trains and, where it has one, their moving average."""
    return ["trained"] if state.average is None else ["trained", "ema"]


@contextmanager
def evaluating(state: TrainedState, weights: str) -> Iterator[nn.Module]:
    """The transformer with one of ``weights_of``, without gradients and dropout; then all is as it was.

    Compiled blocks run as they were written: nothing is compiled for it.
    """
    transformer = state.transformer
    with average_in_place(state) if weights == "ema" else nullcontext():
        transformer.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield transformer
        finally:
            transformer.train()
            let_go(state)
