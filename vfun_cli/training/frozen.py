"""Frozen linear layers that keep nothing of their weight for the gradient of their input: they ask for it again.

Autograd would keep every layer's weight to the end of the backward pass: as a dequantised copy, or as a view of memory
in which by then another block's weights lie.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear(nn.Module):
    """x·Wᵀ + b, in the dtype of x [..., in]; neither W nor b trains. Of what W is made, and how, a subclass says."""

    kept: ClassVar[tuple[str, ...]]
    """The parameters that W is made of."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.elsewhere: Callable[[], Sequence[Tensor]] | None = None

    def lend(self, source: Callable[[], Sequence[Tensor]]) -> None:
        """Let go of the parameters of ``kept``; from now on ``source`` gives them, valid until it is asked again."""
        for name in self.kept:
            delattr(self, name)
        self.elsewhere = source

    def parts(self) -> Sequence[Tensor]:
        """The values of ``kept``, on the device."""
        return [self.get_parameter(name) for name in self.kept] if self.elsewhere is None else self.elsewhere()

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """Keeps the layer, and asks it for W in either direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight_as(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight_as(gradient.dtype), None


class WholeLinear(FrozenLinear):
    """With its weight as it is."""

    kept = ("values",)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.values = linear.weight

    @property
    def weight(self) -> Tensor:
        """A copy, [out, in], for those who may keep it: peft's DoRA takes the length of each row."""
        [values] = self.parts()
        return values.clone()

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]; no copy where that is its dtype."""
        [values] = self.parts()
        return values.to(dtype)


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], FrozenLinear]) -> int:
    """Put another layer in the place of each frozen linear layer inside of ``module``; how many."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not child.weight.requires_grad:
                setattr(parent, name, make(child))
                count += 1
    return count
