"""An exponential moving average of the trained weights, kept in float32 beside the masters."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

EXCHANGED = 1 << 22
"""Elements that change places at a time: a buffer of 16 MB."""


class WeightAverage:
    """Shadow weights: shadow <- d * shadow + (1 - d) * weight after every step.

    d rises towards ``decay`` as diffusers' EMAModel has it: 0 at the first step, then (1 + n) / (10 + n). Held at
    0.9999 from the start, the average of 1000 steps would still be nine tenths the untrained weights.

    Each rank averages the masters that lie on it (``live.master_weights``), on their device: 4 bytes for each of them.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = [master.detach().clone(memory_format=torch.contiguous_format) for master in masters]
        """Of each master, in its shape."""

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], step: int) -> None:
        """Average in the weights after ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        for shadow, master in zip(self.shadow, masters, strict=True):
            shadow.lerp_(master, 1 - decay)

    @torch.no_grad()
    def exchange(self, masters: Sequence[Tensor]) -> None:
        """Let average and masters change places, to the bit; a second time puts them back."""
        for shadow, master in zip(self.shadow, masters, strict=True):
            for here, there in zip(_pieces(shadow), _pieces(master), strict=True):
                kept = there.clone()
                there.copy_(here)
                here.copy_(kept)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of all elements, each of at most ``EXCHANGED``."""
    return iter(tensor.detach().view(-1).split(EXCHANGED))
