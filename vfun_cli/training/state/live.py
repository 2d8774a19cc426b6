"""The live objects that a checkpoint holds, and how their parts are reached under every strategy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vfun_cli.errors import CheckpointError
from vfun_cli.training.state.ema import WeightAverage

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter."""


@dataclass(kw_only=True)
class TrainedState:
    """The live objects that a checkpoint holds."""

    accelerator: Accelerator
    model: nn.Module
    """The transformer as the strategy wrapped it."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None


def trained_parameters(state: TrainedState) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, as the strategy keeps them."""
    transformer = state.accelerator.unwrap_model(state.model)
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def require_names(expected: set[str], found: set[str], where: Path) -> None:
    """Refuse a checkpoint that does not hold exactly the weights that are trained.

    Raises:
        CheckpointError: with what is missing and what is unexpected.
    """
    if expected != found:
        missing, extra = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise CheckpointError(
            f"{where} does not hold the weights this run trains: {len(expected - found)} missing {missing}, "
            f"{len(found - expected)} unexpected {extra}.",
            hint="Resume with the --trainable-modules of the run that wrote it.",
        )
