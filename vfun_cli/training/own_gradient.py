"""Whose gradients are no numbers: once they are summed over the ranks, nobody can tell."""

from typing import Any

import torch
from torch import Tensor, nn


class OwnGradient:
    """Looks once a backward pass at what comes back to the first layer that trains, on this rank alone.

    What is no number spreads to all that follows, and there the pass ends. Nothing waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def watch(self, model: nn.Module) -> None:
        """Look from now on, in a model as the strategy has wrapped it."""
        first = next(filter(_is_trained_layer, model.modules()), None)
        if first is not None:
            first.register_forward_hook(self._hook)

    def take(self) -> Tensor:
        """Whether anything was no number since the last call, on the device. No: nothing was, or it was not seen."""
        broken, self.broken = self.broken, torch.zeros_like(self.broken)
        return broken

    def _hook(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self.broken = self.broken | ~gradient.isfinite().all()


def _is_trained_layer(module: nn.Module) -> bool:
    """Whether it has weights of its own that train. What contains a list of layers, such as a whole model, is none."""
    own = any(weight.requires_grad for weight in module.parameters(recurse=False))
    return own and not any(isinstance(part, nn.ModuleList) for part in module.modules())
