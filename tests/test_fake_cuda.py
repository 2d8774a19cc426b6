"""The made-up CUDA device refuses what makes host and device wait for each other, and lets all else through."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.fake_cuda import CUDA, HostTraffic, made_up_cuda

HOST = torch.ones(3)
WAITS: dict[str, Callable[[Tensor], object]] = {
    "operation on both sides": lambda x: x + HOST,
    "index on the host": lambda x: x[[0, 1]],
    "number among tensors": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "to the device, pageable": lambda x: HOST.to(CUDA, non_blocking=True),
    "to the device, blocking": lambda x: HOST.pin_memory().to(CUDA),
    "into a tensor, pageable": lambda x: x.copy_(HOST, non_blocking=True),
    "made from a list": lambda x: torch.tensor([1.0], device=CUDA),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "to the host, pageable": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "to the host, blocking": lambda x: torch.empty(3, pin_memory=True).copy_(x),
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "condition": lambda x: 1 if x.sum() > 0 else 0,
    "number": lambda x: float(x.sum()),
    "size from a value": lambda x: torch.arange(x.sum(), device=CUDA),
    "nonzero": lambda x: x.nonzero(),
    "mask as an index": lambda x: x[x > 0],
    "comparison": lambda x: torch.equal(x, x),
    "read in a backward pass": lambda x: read_backwards(x),
    "device": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}


def read_backwards(x: Tensor) -> None:
    weight = torch.ones(3, device=CUDA, requires_grad=True)
    weight.register_hook(lambda gradient: gradient.cpu())
    (weight * x).sum().backward()


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(name: str) -> None:
    with made_up_cuda() as device, pytest.raises(HostTraffic):
        WAITS[name](torch.randn(3, device=device))


def test_what_does_not_wait_goes_through() -> None:
    with made_up_cuda() as device:
        x = HOST.pin_memory().to(device, non_blocking=True)
        assert (x.device, x.is_cuda, x.is_meta, HOST.is_cuda) == (CUDA, True, False, False)
        torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        loss = torch.where(x > 0, x * torch.tensor(2.0), 0.0).masked_fill(x < 0, 1.0)[x.long()].dot(weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        torch.optim.AdamW([weight], fused=True).step()
        assert weight.grad is not None and weight.grad.device == device
        assert HOST.sum().item() == 3
