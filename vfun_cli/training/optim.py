"""The trainable parameters, their optimizer, and its learning rate as a function of the step."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.config import optimizers
from vfun_cli.config.optimizers import LOW_RATE, OPTIMIZERS, Arguments, constructor_arguments
from vfun_cli.config.options import RunConfig
from vfun_cli.config.trainable import choose
from vfun_cli.errors import ConfigError, first_line
from vfun_cli.imports import named, named_installed
from vfun_cli.training.blocks import require_compiler

FUSED = ("cuda", "cpu")
"""Devices for which torch has AdamW in one pass over each tensor."""

RATE_SHARE = "rate_share"
"""In a parameter group: at what share of the run's learning rate it trains."""

POLYNOMIAL_END = 1e-7
"""The rate to which polynomial falls at least, as transformers and diffusers have it (``lr_end``)."""


def learning_rate(step: int, config: RunConfig, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0), the schedules of transformers.get_scheduler.

    A function of the step alone, so nothing has to be saved or replayed to resume.
    """
    warmup = 0 if config.lr_scheduler == "constant" else config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape, end = _SHAPES[config.lr_scheduler](progress, config), config.lr_min_ratio * config.learning_rate
    if config.lr_scheduler == "polynomial":
        end = min(config.learning_rate, max(end, POLYNOMIAL_END))
    return end + (config.learning_rate - end) * shape


def _restarts(progress: float, config: RunConfig) -> float:
    return 0.0 if progress == 1 else _cosine((config.lr_num_cycles * progress) % 1)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


_SHAPES: Mapping[str, Callable[[float, RunConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "constant_with_warmup": lambda progress, config: 1.0,
    "linear": lambda progress, config: 1 - progress,
    "cosine": lambda progress, config: _cosine(progress),
    "cosine_with_restarts": _restarts,
    "polynomial": lambda progress, config: (1 - progress) ** config.lr_power,
}
"""From the end of the warm-up (0) to that of the run (1): how far above its end a rate is, of the way to the peak."""


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


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def slow_names(config: RunConfig, parameters: Iterable[str], released: Callable[[str], str] = unchanged) -> set[str]:
    """Those of the parameters that ``trainable_modules_low_learning_rate`` means.

    Raises:
        ConfigError: a part that matches nothing.
    """
    parts = config.trainable_modules_low_learning_rate
    return set(choose(parts, parameters, released).names) if parts else set()


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: RunConfig, device: torch.device, *, slow: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The run's optimizer over these parameters, which may be on the meta device or fake: no value is read.

    What it will keep of them is told by :func:`vfun_cli.config.optimizers.state_bytes` without a step.

    Args:
        slow: names of those that train at ``LOW_RATE``.

    Raises:
        ConfigError: it does not take its arguments, or there is no such class.
        EnvironmentFault: no compiler where one is needed.
    """
    optimizer = optimizers.find(config.optimizer)
    arguments = optimizers.parse_arguments(config.optimizer_args)
    made = []
    for kind, named_arguments, taken in (
        (optimizer, arguments, [name for name in parameters if optimizer.others is None or parameters[name].ndim == 2]),
        (OPTIMIZERS.get(optimizer.others or ""), {}, [name for name in parameters if parameters[name].ndim != 2]),
    ):
        if kind is not None and taken:
            groups = _groups({name: parameters[name] for name in taken}, config.learning_rate, slow)
            made.append(_made(kind, groups, config, named_arguments, device))
    return made[0] if len(made) == 1 else Together(made)


def _groups(parameters: Mapping[str, nn.Parameter], rate: float, slow: Collection[str]) -> list[dict[str, Any]]:
    """Parameter groups, one for each learning rate."""
    shares = {name: LOW_RATE if name in slow else 1.0 for name in parameters}
    return [
        {"params": [parameters[name] for name in parameters if shares[name] == share], "lr": rate * share,
         RATE_SHARE: share}
        for share in sorted(set(shares.values()), reverse=True)
    ]  # fmt: skip


def _made(
    kind: optimizers.Optimizer,
    groups: list[dict[str, Any]],
    config: RunConfig,
    arguments: Arguments,
    device: torch.device,
) -> torch.optim.Optimizer:
    given = constructor_arguments(kind, config, arguments)
    if kind.fused:
        given = {"fused": device.type in FUSED, **given}
    make = named(kind.place) if kind.arguments is not None else named_installed(kind.place, "--optimizer")
    try:
        made = make(groups, lr=config.learning_rate, **given)
    except (TypeError, ValueError, AssertionError) as error:
        words = ", ".join(f"{name}={value!r}" for name, value in {"lr": config.learning_rate, **given}.items())
        raise ConfigError(f"optimizer {kind.name} does not take {words}: {first_line(error)}.") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"--optimizer {kind.name} is no torch.optim.Optimizer.")
    if kind.compiled and device.type == "cuda":
        require_compiler(f"--optimizer {kind.name}")
    elif kind.compiled:
        made.step = partial(_uncompiled, made.step)  # type: ignore[method-assign]
    return made


def _uncompiled(step: Callable[..., Any], *given: Any, **named_given: Any) -> Any:
    """Off a GPU nothing is compiled: it takes seconds for each shape, more than the demo trains for."""
    with torch.compiler.set_stance("force_eager"):
        return step(*given, **named_given)


class Together(torch.optim.Optimizer):
    """Several optimizers, each over groups of its own, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = [(part, len(part.param_groups)) for part in parts]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each. Groups and state are here, where they are saved and restored; the parts work on them."""
        start = 0
        for part, count in self.parts:
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            part.step()
            start += count


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate, its share of this one; wrappers of accelerate and DeepSpeed share the groups."""
    for group in optimizer.param_groups:
        own = rate * group.get(RATE_SHARE, 1.0)
        if isinstance(group["lr"], Tensor):  # a number would be compiled into the step
            group["lr"].fill_(own)
        else:
            group["lr"] = own
