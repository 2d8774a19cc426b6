"""What an optimizer keeps, as named tensors: whatever it is, of one process, DDP and FSDP2.

A name is what the optimizer calls it. What is made of several tensors (8-bit codes and their scales) has theirs behind
it, and what each rank has for itself the number of its shard: ``exp_avg.rank1.codes``. Numbers of Python's are tensors
of one number, in types that tell them from the optimizers' own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vfun_cli.errors import CheckpointError, RunError
from vfun_cli.modeling.shards import shard_here
from vfun_cli.training.optim import RATE_SHARE, set_learning_rate
from vfun_cli.training.state.live import TrainedState, inner_optimizer, stepping_optimizer, trained_parameters

Kept = Mapping[str, Mapping[str, Tensor]]
"""By parameter and name."""

_CONSTANT = frozenset({"qmap"})
"""Tensors inside of others that are the same in every one: the numbers that torchao's 8-bit codes stand for."""
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
_RANK = re.compile(r"\.rank(\d+)(?:\.|$)")


def kept(state: TrainedState) -> dict[str, dict[str, Tensor]]:
    """All of it: DTensors where the ranks have shards of one whole. Nothing before the first step.

    Raises:
        RunError: under FSDP, a class keeps something that is not cut as its parameter is.
    """
    optimizer, found = inner_optimizer(state.optimizer), {}
    for name, parameter in trained_parameters(state).items():
        values = optimizer.state.get(parameter, {})
        found[name] = {f"{key}{part}": tensor for key, value in values.items() for part, tensor in _parts(value, state)}
        for key, tensor in found[name].items():
            if isinstance(parameter, DTensor) and state.kind.converts and not _fits(parameter, tensor):
                raise RunError(
                    f"optimizer {state.kind.name} keeps {key} of {name} in shape {list(tensor.shape)}, beside a "
                    f"parameter of {list(parameter.shape)}; that cannot be saved where both are sharded.",
                    hint="Use it under --ddp.",
                )
    return found


def counts(state: TrainedState) -> dict[str, Tensor]:
    """What the optimizer counts or estimates for a group of parameters, as ``<group>.<name>``: what it has changed."""
    optimizer = stepping_optimizer(state)
    return {
        f"{index}.{name}": _tensor(value)
        for index, group in enumerate(optimizer.param_groups if state.kind.counts else ())
        for name, value in group.items()
        if type(value) in _NUMBERS and _counted(optimizer, name, value)
    }


def place_counts(state: TrainedState, counted: Mapping[str, Tensor]) -> None:
    """The inverse of ``counts``, which may come with all other numbers of a group."""
    optimizer = stepping_optimizer(state)
    for key in counted if state.kind.counts else ():
        (index, _, name), value = key.partition("."), _number(counted[key])
        if int(index) < len(optimizer.param_groups) and _counted(optimizer, name, value):
            optimizer.param_groups[int(index)][name] = value


def _counted(optimizer: torch.optim.Optimizer, name: str, value: Any) -> bool:
    return name not in ("lr", RATE_SHARE) and value != optimizer.defaults.get(name)


def place(state: TrainedState, moments: Kept) -> None:
    """The inverse of ``kept``, into an optimizer that has not stepped yet.

    Where the ranks have shards of one whole, full tensors are taken, too.

    Raises:
        CheckpointError: it is not what this optimizer keeps of these parameters.
    """
    optimizer = inner_optimizer(state.optimizer)
    if state.kind.in_blocks and any(moments.values()):
        _step_nowhere(optimizer)  # makes tensors that only the optimizer knows how to make
    for name, parameter in trained_parameters(state).items():
        found = moments.get(name, {})
        if found and state.kind.in_blocks:
            _fill(state, name, parameter, found)
        elif found:
            optimizer.state[parameter] = {key: _placed(optimizer, parameter, key, found[key]) for key in found}


def of_a_rank(name: str) -> int | None:
    """The shard whose own it is; None for what all ranks have together."""
    match = _RANK.search(name)
    return int(match[1]) if match else None


def _parts(value: Any, state: TrainedState) -> Iterator[tuple[str, Tensor]]:
    """A value as plain tensors, with what is added to its name; empty ones are left out."""
    where = ""
    if isinstance(value, DTensor) and state.kind.in_blocks:
        value, where = value.to_local(), f".rank{shard_here(value)}"
    if not isinstance(value, Tensor):
        yield where, _tensor(value)
    elif hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
        for inner in value.__tensor_flatten__()[0]:
            if inner not in _CONSTANT:
                yield f"{where}.{inner}", getattr(value, inner).detach()
    elif value.numel() or not where:
        yield where, value.detach()


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=_NUMBERS[type(value)])


def _number(value: Tensor) -> Any:
    """A number of Python's where it was one."""
    return value.item() if value.dim() == 0 and value.dtype in _NUMBERS.values() else value


def _fits(parameter: DTensor, tensor: Tensor) -> bool:
    return tensor.dim() == 0 or (isinstance(tensor, DTensor) and tensor.shape == parameter.shape)


def _placed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> Any:
    """Where the optimizer works with it, sharded as its parameter is."""
    if value.dim() == 0:
        # Optimizers keep their step count on the CPU unless they are fused.
        group = next(group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
        with_host = key == "step" and not (group.get("fused") or group.get("capturable"))
        return _number(value if with_host else value.to(parameter.device))
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value.to(parameter.device)
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"the optimizer's {key}, of shape {list(value.shape)}, cannot be cut as its parameter of "
            f"{list(parameter.shape)} is.",
            hint="Resume under the strategy that saved the checkpoint.",
        )
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _step_nowhere(optimizer: torch.optim.Optimizer) -> None:
    """A step at the rate zero along a gradient of zeros; the trainer sets the rate before each step of its own."""
    set_learning_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _fill(state: TrainedState, name: str, parameter: nn.Parameter, found: Mapping[str, Tensor]) -> None:
    for key, value in inner_optimizer(state.optimizer).state[parameter].items():
        for part, tensor in _parts(value, state):
            stored = found.get(f"{key}{part}")
            if stored is None or stored.shape != tensor.shape:
                raise CheckpointError(
                    f"the checkpoint does not hold {key}{part} of {name} in shape {list(tensor.shape)}.",
                    hint="Resume with the --optimizer-args, the strategy and the processes of the run that wrote it.",
                )
            tensor.copy_(stored)
