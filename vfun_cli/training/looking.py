"""What all that looks at a run from outside of its training shares: it can be stopped, and leaves nothing behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from vfun_cli.training.data import loader
from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.state.live import TrainedState, let_go
from vfun_cli.training.waiting import most_of_all

T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop in the middle."""

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


def heeding(stop: StopFlag, work: Callable[[], T]) -> T | None:
    """What some work of this rank gives that may hang, as soon as every rank is done; all of them call it together.

    Returns:
        None if it took longer than a clip may take that is trained on.

    Raises:
        Exception: what the work raised on this rank; the others are done too.
        Stopped: a rank was asked to stop meanwhile; on all of them.
    """
    waiting = loader.patiently(work, limit=loader.LOAD_TIMEOUT)
    found, failed, is_done = None, None, False
    while True:
        try:
            if not is_done:
                next(waiting)
        except StopIteration as done:
            found, is_done = done.value, True
        except Exception as error:
            failed, is_done = error, True
        (some_work,) = go_on(stop, [not is_done])
        if not some_work:
            break
    if failed is not None:
        raise failed
    return found


def weights_of(state: TrainedState) -> list[str]:
    """By which weights a run is looked at: those that it trains and, where it has one, their moving average."""
    return ["trained"] if state.average is None else ["trained", "ema"]


@contextmanager
def evaluating(state: TrainedState, weights: str) -> Iterator[nn.Module]:
    """The transformer with one of ``weights_of``, without gradients and dropout; then all is as it was.

    Compiled blocks run as they were written: nothing is compiled for it.
    """
    transformer = state.accelerator.unwrap_model(state.model)
    average = state.average if weights == "ema" else None
    with nullcontext() if average is None else average.in_place(transformer):
        transformer.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield transformer
        finally:
            transformer.train()
            let_go(state)
