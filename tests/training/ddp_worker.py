"""Ranks under DDP: gradients of a step in the launch that took the one before, and in a launch that begins with it."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.training.strategy import make_accelerator

folder = Path(sys.argv[1])
accelerator = make_accelerator(RunConfig(strategy="ddp", device="cpu"))
rank = accelerator.process_index


def launched() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(300, 300), nn.GELU()) for _ in range(6))  # two megabytes: several buckets
    model: nn.Module = accelerator.prepare(nn.Sequential(*layers))
    return model


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    clips = torch.randn(8, 300, generator=torch.Generator().manual_seed(100 * step + rank))
    model.zero_grad()
    accelerator.backward(model(clips).square().sum())
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


gone_on, resumed = launched(), launched()
gradients(gone_on, 0)
equal = all(map(torch.equal, gradients(gone_on, 1), gradients(resumed, 1)))
(folder / f"rank-{rank}").write_text(str(equal))
accelerator.wait_for_everyone()
