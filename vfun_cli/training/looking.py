"""What all that looks at a run from outside of its training shares: it can be stopped, and leaves nothing behind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vfun_cli.training.signals import CONTINUE, StopFlag
from vfun_cli.training.waiting import most_of_all


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


@contextmanager
def evaluating(transformer: nn.Module) -> Iterator[None]:
    """Without gradients and dropout. Compiled blocks run as they were written: nothing is compiled for it."""
    transformer.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        transformer.train()
