"""An exponential moving average of the trainable weights, kept in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Shadow weights: shadow <- d * shadow + (1 - d) * weight after every step.

    d rises towards ``decay`` as diffusers' EMAModel has it: 0 at the first step, then (1 + n) / (10 + n). Held at
    0.9999 from the start, the average of 1000 steps would still be nine tenths the untrained weights.
    """

    def __init__(self, transformer: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: parameter.detach().float().clone() for name, parameter in _trained(transformer)}

    @torch.no_grad()
    def update(self, transformer: nn.Module, step: int) -> None:
        """Average in the weights after ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        for name, parameter in _trained(transformer):
            self.shadow[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def in_place(self, transformer: nn.Module) -> Iterator[None]:
        """The shadow weights in the place of the trained ones, which come back as they were; nothing is copied."""
        trained = [(parameter, parameter.data) for _, parameter in _trained(transformer)]
        try:
            for name, parameter in _trained(transformer):
                parameter.data = self.shadow[name].to(parameter.dtype)
            yield
        finally:
            for parameter, data in trained:
                parameter.data = data

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the shadow weights of a checkpoint."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])


def _trained(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
