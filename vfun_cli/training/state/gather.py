"""Trained weights, their average and what the optimizer keeps, as full tensors, gathered from and put back into any
strategy.

LoRA checkpoints use it: adapters are small, so one file holds full tensors, whatever sharded them in training.
Every function here is collective: all ranks call it, in the same order.
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vfun_cli.checkpoints.naming import PARAMETER_GROUPS
from vfun_cli.modeling.shards import shard_group
from vfun_cli.training.state.live import (
    TrainedState,
    is_partitioned,
    master_weights,
    stepping_optimizer,
    trained_parameters,
)
from vfun_cli.training.state.moments import Kept, counts, kept, of_a_rank, place, place_counts
from vfun_cli.training.state.parts import Part, numel_of, parts_of, shape_of
from vfun_cli.training.waiting import gather_all


def collect(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights by name, and what the optimizer keeps as ``<name>.<moment>``, on the CPU of rank 0; empty
    elsewhere.

    Before the first step there are no moments.
    """
    weights, moments = _collect_partitioned(state) if is_partitioned(state) else _collect(state)
    moments |= {f"{PARAMETER_GROUPS}{key}": value for key, value in counts(state).items()}
    return (weights, moments) if state.accelerator.is_main_process else ({}, {})


def restore(state: TrainedState, weights: Mapping[str, Tensor], moments: Kept, counted: Mapping[str, Tensor]) -> None:
    """The inverse of ``collect``, into a state that has not stepped yet; every rank passes all tensors.

    Args:
        moments: by parameter and name.
        counted: what the optimizer keeps for groups of parameters.

    Raises:
        CheckpointError: the moments are not what this optimizer keeps.
    """
    with torch.no_grad():
        if is_partitioned(state):
            _write_partitioned(state, weights, moments)
        else:
            for name, parameter in trained_parameters(state).items():
                parameter.copy_(_like(parameter, weights[name]))
            place(state, moments)
        place_counts(state, counted)


def collect_average(state: TrainedState) -> dict[str, Tensor]:
    """The moving average by name, on the CPU of rank 0; empty elsewhere."""
    assert state.average is not None
    parts, found = parts_of(state), {}
    for name, parameter in trained_parameters(state).items():
        part = parts.get(name)
        whole = _whole(state, parameter, part, None if part is None else state.average.shadow[part.master])
        if state.accelerator.is_main_process:
            found[name] = whole.cpu()
    return found


def _whole(state: TrainedState, parameter: nn.Parameter, part: Part | None, flat: Tensor | None) -> Tensor:
    """A tensor of the parameter's shape, of which each rank has its part in what is laid out as its master is."""
    # Not on DeepSpeed's device: with offload that is the CPU, where NCCL sums nothing.
    full = torch.zeros(numel_of(parameter), device=state.accelerator.device)
    if part is not None and flat is not None:
        full.narrow(0, part.offset, part.count).copy_(part.inside(flat.detach()))
    if is_partitioned(state):
        dist.all_reduce(full)
    elif isinstance(parameter, DTensor):
        dist.all_reduce(full, group=shard_group(parameter))
    return full.reshape(shape_of(parameter))


# One process, DDP and FSDP2 ------------------------------------------------------------------------------------------


def _collect(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, moments, own = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, parameter in trained_parameters(state).items():
        weights[name] = _full(parameter).float()
    for name, found in kept(state).items():
        for key, value in found.items():
            (moments if of_a_rank(key) is None else own)[f"{name}.{key}"] = _full(value)
    if state.kind.in_blocks:
        moments |= ChainMap(*gather_all(own))
    return weights, moments


def _full(value: Tensor) -> Tensor:
    """The whole of it, on the CPU."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The full value on the parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# DeepSpeed ZeRO ------------------------------------------------------------------------------------------------------


def _collect_partitioned(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    masters, parts = master_weights(state), parts_of(state)
    found = stepping_optimizer(state).state
    # By name, whether it is one number for all that a master holds.
    keys = {key: torch.as_tensor(value).dim() == 0 for of_one in found.values() for key, value in of_one.items()}
    weights, moments = {}, {}
    for name, parameter in trained_parameters(state).items():
        part = parts.get(name)
        master = None if part is None else masters[part.master]
        weights[name] = _whole(state, parameter, part, master).cpu()
        for key, scalar in keys.items():
            value = None if master is None else found[master][key]
            whole = _number(state, value) if scalar else _whole(state, parameter, part, value)
            moments[f"{name}.{key}"] = whole.cpu()
    return weights, moments


def _number(state: TrainedState, value: Any) -> Tensor:
    """One number, which some ranks have."""
    number = torch.zeros((), device=state.accelerator.device)
    if value is not None:
        number += torch.as_tensor(value).to(number.device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number


def _write_partitioned(state: TrainedState, weights: Mapping[str, Tensor], moments: Kept) -> None:
    masters, stepping = master_weights(state), stepping_optimizer(state).state
    for name, part in parts_of(state).items():
        master, mine = masters[part.master], slice(part.offset, part.offset + part.count)
        part.inside(master.data).copy_(weights[name].flatten()[mine])
        found = moments.get(name, {})
        for key in found:
            value = found[key]
            if value.dim() == 0:
                # Where the master is, as fused AdamW needs it; each master its own, for the optimizer counts in place.
                stepping[master][key] = value.clone().to(master.device)
                continue
            if stepping[master].get(key) is None:
                stepping[master][key] = torch.zeros_like(master.data)
            part.inside(stepping[master][key]).copy_(value.flatten()[mine])
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
