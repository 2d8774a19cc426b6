"""Freezes an encoder, and has its weights on its device for as long as it encodes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from vfun_cli.modeling.transfer import upload

Module = TypeVar("Module", bound=nn.Module)


def encoder_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """What frozen encoders compute in beside a transformer that computes in ``compute``.

    On a CPU they stay in float32, in which one without units for bf16 computes 4 to 60 times as fast
    (``benchmarks/bf16_on_cpu.py``).
    """
    return torch.float32 if device.type == "cpu" else compute


def freeze(module: Module) -> Module:
    """Eval mode, no parameter gradients. In place; returns the module."""
    return module.eval().requires_grad_(False)


@contextmanager
def encoding_on(module: nn.Module, device: torch.device, *, low_vram: bool) -> Iterator[None]:
    """Run a frozen encoder on ``device``: no gradients, no autocast.

    Autocast is switched off because an encoder's dtype is a decision of its owner (audio stays in float32 inside a
    bf16 step). With ``low_vram`` the device has copies of the weights until the encoder is done; otherwise the module
    moves there and stays, and moving it again costs nothing.
    """
    placed = _lent(module, device) if low_vram else nullcontext(module.to(device))
    with placed, torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies on the device in the place of a module's parameters and buffers, which stay where they are on the host.

    Nothing comes back: frozen weights are what they were (11.4 GB each way for the text encoder of Wan). What several
    modules share is copied once. For CUDA the host's memory is pinned the first time; the copies are then asynchronous.
    """
    kept = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in _own_tensors(owner)
        if tensor.device.type != device.type
    ]
    copies: dict[Tensor, Tensor] = {}
    for _, _, tensor in kept:
        if tensor not in copies:
            copies[tensor] = _copy(tensor, device)
    try:
        for owner, name, tensor in kept:
            setattr(owner, name, copies[tensor])
        copies.clear()
        yield
    finally:
        for owner, name, tensor in kept:
            setattr(owner, name, tensor)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_pinned():
        tensor.data = tensor.data.pin_memory()
    copy = upload(tensor.data, device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers by name, without those of its children."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
