"""Trained weights, their average and optimizer moments as full tensors, gathered from and put back into any strategy.

LoRA checkpoints use it: adapters are small, so one file holds full tensors, whatever sharded them in training.
Every function here is collective: all ranks call it, in the same order.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vfun_cli.training.state.live import (
    MOMENTS,
    TrainedState,
    inner_optimizer,
    is_partitioned,
    master_weights,
    trained_parameters,
)
from vfun_cli.training.state.parts import Part, numel_of, partition_of, parts_of, shape_of

STEP = "step"


def collect(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights by name, and moments as ``<name>.<moment>``, on the CPU of rank 0; empty elsewhere.

    Before the first step there are no moments.
    """
    keep = state.accelerator.is_main_process
    weights, moments = {}, {}
    read = _read_partitioned if is_partitioned(state) else _read
    for name, parameter in trained_parameters(state).items():
        for key in (None, *MOMENTS):
            value = read(state, parameter, key)
            if value is None or not keep:
                continue
            if key is None:
                weights[name] = value.float().cpu()
            else:
                moments[f"{name}.{key}"] = value.float().cpu()
    return weights, moments


def restore(state: TrainedState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """The inverse of ``collect``, into a state that has not stepped yet; every rank passes all tensors."""
    with torch.no_grad():
        if is_partitioned(state):
            _write_partitioned(state, weights, moments)
        else:
            _write(state, weights, moments)


def collect_average(state: TrainedState) -> dict[str, Tensor]:
    """The moving average by name, on the CPU of rank 0; empty elsewhere."""
    assert state.average is not None
    parts, found = parts_of(state), {}
    for name, parameter in trained_parameters(state).items():
        part = parts.get(name)
        values = None if part is None else part.inside(state.average.shadow[part.master])
        whole = _whole(state, parameter, part, values)
        if state.accelerator.is_main_process:
            found[name] = whole.cpu()
    return found


def _whole(state: TrainedState, parameter: nn.Parameter, part: Part | None, values: Tensor | None) -> Tensor:
    """A tensor of the parameter's shape, of which each rank has the values of its part."""
    # Not on DeepSpeed's device: with offload that is the CPU, where NCCL sums nothing.
    full = torch.zeros(numel_of(parameter), device=state.accelerator.device)
    if part is not None and values is not None:
        full.narrow(0, part.offset, part.count).copy_(values)
    if is_partitioned(state) or isinstance(parameter, DTensor):
        dist.all_reduce(full)
    return full.reshape(shape_of(parameter))


def moments_of(name: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments of one parameter, without its name."""
    return {key: moments[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in moments}


# One process, DDP and FSDP2 ------------------------------------------------------------------------------------------


def _read(state: TrainedState, parameter: nn.Parameter, key: str | None) -> Tensor | None:
    value = parameter if key is None else inner_optimizer(state.optimizer).state.get(parameter, {}).get(key)
    if value is None:
        return None
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _write(state: TrainedState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    optimizer = inner_optimizer(state.optimizer)
    # AdamW keeps its step count on the CPU unless it is fused.
    on_device = bool(optimizer.defaults["fused"])
    for name, parameter in trained_parameters(state).items():
        parameter.copy_(_like(parameter, weights[name]))
        found = moments_of(name, moments)
        if found:
            optimizer.state[parameter] = {
                key: (value.to(parameter.device) if on_device else value) if key == STEP else _like(parameter, value)
                for key, value in found.items()
            }


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The full value on the parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# DeepSpeed ZeRO ------------------------------------------------------------------------------------------------------


def _read_partitioned(state: TrainedState, parameter: nn.Parameter, key: str | None) -> Tensor | None:
    zero = cast(Any, state.model).optimizer
    moments = zero.optimizer.state
    if key is not None and not any(key in kept for kept in moments.values()):
        return None
    part = partition_of(zero, parameter)
    master = None if part is None else master_weights(state)[part.master]
    if key == STEP:
        count = torch.zeros((), device=state.accelerator.device)
        if master is not None:
            count += moments[master][key].to(count.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return count
    if part is None or master is None:
        return _whole(state, parameter, None, None)
    source = master if key is None else moments[master][key]
    return _whole(state, parameter, part, part.inside(source.detach()))


def _write_partitioned(state: TrainedState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    zero, masters = cast(Any, state.model).optimizer, master_weights(state)
    kept = zero.optimizer.state
    for name, parameter in trained_parameters(state).items():
        part = partition_of(zero, parameter)
        if part is None:
            continue
        master, mine = masters[part.master], slice(part.offset, part.offset + part.count)
        part.inside(master.data).copy_(weights[name].flatten()[mine])
        for key, value in moments_of(name, moments).items():
            if key == STEP:
                # Where the master is, as fused AdamW needs it; each master its own, for the optimizer counts in place.
                kept[master][key] = value.clone().to(master.device)
                continue
            if kept[master].get(key) is None:
                kept[master][key] = torch.zeros_like(master.data)
            part.inside(kept[master][key]).copy_(value.flatten()[mine])
    refresh_compute_copies(state)


def refresh_compute_copies(state: TrainedState, *, alone: bool = False) -> None:
    """Make anew the copies of the masters that DeepSpeed computes with, in bf16 or in another buffer.

    Args:
        alone: other ranks may not call it. Then ZeRO-2's stay as they are: each rank has the whole model's, made of the
            parts of all ranks.
    """
    if not is_partitioned(state):
        return
    zero = cast(Any, state.model).optimizer
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        if not alone:
            zero.update_lp_params()
        return
    for master, flat, group in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    ):
        flat.data.copy_(master.data)
        for part, value in zip(group, zero.unflatten(flat, group), strict=True):
            part.data = value.data
