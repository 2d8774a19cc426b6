"""An exponential moving average of the trainable weights, kept in float32 beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Shadow weights: shadow <- decay * shadow + (1 - decay) * weight after every step."""

    def __init__(self, transformer: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: parameter.detach().float().clone() for name, parameter in _trained(transformer)}

    @torch.no_grad()
    def update(self, transformer: nn.Module) -> None:
        """One step of averaging."""
        for name, parameter in _trained(transformer):
            self.shadow[name].lerp_(parameter.detach().float(), 1 - self.decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the shadow weights of a checkpoint."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])


def _trained(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
