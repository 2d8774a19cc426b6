"""The trainable parameters, their optimizer, and its learning rate as a function of the step."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError, did_you_mean

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


def choose_trainable(transformer: nn.Module, modules: Sequence[str], without_gradient: Sequence[str] = ()) -> list[str]:
    """Freeze everything but the parameters whose name contains one of ``modules``; their names.

    ``without_gradient`` names modules whose parameters never get one in this architecture.

    Raises:
        ConfigError: a part that matches nothing, with the nearest module name.
    """
    names = [name for name, _ in transformer.named_parameters()]
    for part in modules:
        if not any(part in name for name in names):
            near = did_you_mean(part, {word for name in names for word in (name, *name.split("."))})
            raise ConfigError(
                f"trainable_modules: {part!r} is in no parameter name of the transformer.{near}",
                hint='Use "." for everything, or a part of a name such as "self_attn".',
            )
    trained = []
    for name, parameter in transformer.named_parameters():
        unreachable = any(name.startswith(f"{module}.") for module in without_gradient)
        chosen = any(part in name for part in modules) and not unreachable
        parameter.requires_grad_(chosen)
        if chosen:
            trained.append(name)
    return trained


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
