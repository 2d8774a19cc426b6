"""Freezes an encoder, and moves it to its device for as long as it encodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Eval mode, no parameter gradients. In place; returns the module."""
    return module.eval().requires_grad_(False)


@contextmanager
def encoding_on(module: nn.Module, device: torch.device, *, low_vram: bool) -> Iterator[None]:
    """Run a frozen encoder on ``device``: no gradients, no autocast, and back to the CPU afterwards if ``low_vram``.

    Autocast is switched off because an encoder's dtype is a decision of its owner (audio stays in float32 inside a
    bf16 step). Without ``low_vram`` the module stays where it is now, and moving it again costs nothing.
    """
    module.to(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if low_vram:
            module.to("cpu")
