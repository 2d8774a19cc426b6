"""Trained weights and what the optimizer keeps, as full tensors, gathered from and put back into any strategy.

LoRA checkpoints use it: adapters are small, so one file holds full tensors, whatever sharded them in training.
Every function here is collective: all ranks call it, in the same order.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vfun_cli.checkpoints.naming import PARAMETER_GROUPS
from vfun_cli.training.state.live import TrainedState, trained_parameters
from vfun_cli.training.state.moments import Kept, counts, kept, of_a_rank, place, place_counts
from vfun_cli.training.waiting import gather_all


def collect(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights by name, and what the optimizer keeps as ``<name>.<moment>``, on the CPU of rank 0; empty
    elsewhere.

    Before the first step there are no moments.
    """
    weights, moments = _collect_partitioned(state) if _engine(state) else _collect(state)
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
        if _engine(state):
            _write_partitioned(state, weights, moments)
        else:
            for name, parameter in trained_parameters(state).items():
                parameter.copy_(_like(parameter, weights[name]))
            place(state, moments)
        place_counts(state, counted)


def _engine(state: TrainedState) -> bool:
    return hasattr(state.model, "zero_optimization_stage")


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


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The part of a parameter that lies on this rank: elements of the flat parameter, inside a flat master tensor."""

    master: Tensor
    """This rank's flat float32 weights of one group; the key of its moments in the optimizer."""
    start: int
    """First element within the master."""
    count: int
    offset: int
    """First element within the parameter."""

    def inside(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.start, self.count)


def _piece(zero: Any, parameter: Any) -> _Piece | None:
    """Where this rank keeps its part of a parameter. None if it has none."""
    if hasattr(parameter, "ds_id"):  # stage 3: every parameter is cut into one equal, padded part a rank
        group, start, count = zero.grad_position[zero.get_param_id(parameter)]
        offset = count * dist.get_rank(zero.dp_process_group)
        count = min(count, parameter.ds_numel - offset)
        if count <= 0:
            return None
        return _Piece(master=zero.fp32_partitioned_groups_flat[group], start=start, count=count, offset=offset)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Piece(master=master, start=here.start, count=here.numel, offset=there.start)


def _collect_partitioned(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights, moments = {}, {}
    groups = cast(Any, state.model).optimizer.optimizer.state.values()
    # By name, whether it is one number for all that a master holds.
    keys = {key: torch.as_tensor(value).dim() == 0 for group in groups for key, value in group.items()}
    for name, parameter in trained_parameters(state).items():
        weights[name] = _read_partitioned(state, parameter, None).float().cpu()
        for key, scalar in keys.items():
            read = _read_number if scalar else _read_partitioned
            moments[f"{name}.{key}"] = read(state, parameter, key).cpu()
    return weights, moments


def _read_number(state: TrainedState, parameter: nn.Parameter, key: str) -> Tensor:
    zero = cast(Any, state.model).optimizer
    piece = _piece(zero, parameter)
    number = torch.zeros((), device=state.accelerator.device)
    if piece is not None:
        number += torch.as_tensor(zero.optimizer.state[piece.master][key]).to(number.device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=zero.dp_process_group)
    return number


def _read_partitioned(state: TrainedState, parameter: nn.Parameter, key: str | None) -> Tensor:
    zero = cast(Any, state.model).optimizer
    moments = zero.optimizer.state
    piece = _piece(zero, parameter)
    device = state.accelerator.device  # not DeepSpeed's: with offload that is the CPU, where NCCL sums nothing
    full = torch.zeros(_numel(parameter), device=device)
    if piece is not None:
        source = piece.master if key is None else moments[piece.master][key]
        full.narrow(0, piece.offset, piece.count).copy_(piece.inside(source.detach()))
    dist.all_reduce(full, group=zero.dp_process_group)
    return full.reshape(_shape(parameter))


def _write_partitioned(state: TrainedState, weights: Mapping[str, Tensor], moments: Kept) -> None:
    zero = cast(Any, state.model).optimizer
    groups = zero.optimizer.state
    for name, parameter in trained_parameters(state).items():
        piece = _piece(zero, parameter)
        if piece is None:
            continue
        part = slice(piece.offset, piece.offset + piece.count)
        piece.inside(piece.master.data).copy_(weights[name].flatten()[part])
        found = moments.get(name, {})
        for key in found:
            value = found[key]
            if value.dim() == 0:
                # Where the master is, as fused AdamW needs it; each master its own, for the optimizer counts in place.
                groups[piece.master][key] = value.clone().to(piece.master.device)
                continue
            if groups[piece.master].get(key) is None:
                groups[piece.master][key] = torch.zeros_like(piece.master.data)
            piece.inside(groups[piece.master][key]).copy_(value.flatten()[part])
    _refresh_compute_copies(zero)


def _refresh_compute_copies(zero: Any) -> None:
    """DeepSpeed computes with copies of the masters, in bf16 or in another buffer."""
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
        return
    for master, flat, group in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    ):
        flat.data.copy_(master.data)
        for part, value in zip(group, zero.unflatten(flat, group), strict=True):
            part.data = value.data


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
