"""The trainable parameters, their optimizer, and its learning rate as a function of the step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.config.options import RunConfig
from vfun_cli.config.trainable import choose

FUSED = ("cuda", "cpu")
"""Devices for which torch has AdamW in one pass over each tensor."""


def learning_rate(step: int, config: RunConfig, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0), the schedules of transformers.get_scheduler.

    A function of the step alone, so nothing has to be saved or replayed to resume.
    """
    warmup = 0 if config.lr_scheduler == "constant" else config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate


def choose_trainable(
    transformer: nn.Module,
    parts: Sequence[str],
    without_gradient: Sequence[str] = (),
    released: Callable[[str], str] = unchanged,
) -> list[str]:
    """Freeze everything but the parameters that :func:`vfun_cli.config.trainable.choose` finds; their names.

    Raises:
        ConfigError: a part that matches nothing.
    """
    chosen = choose(parts, [name for name, _ in transformer.named_parameters()], released, without_gradient).names
    trained = set(chosen)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in trained)
    return chosen


def make_optimizer(transformer: nn.Module, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=device.type in FUSED,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate; wrappers of accelerate and DeepSpeed share the groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
