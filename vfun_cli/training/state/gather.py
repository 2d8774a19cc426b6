"""Trained weights and optimizer moments as full tensors, gathered from and put back into any strategy.

LoRA checkpoints use it: adapters are small, so one file holds full tensors, whatever sharded them in training.
Every function here is collective: all ranks call it, in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vfun_cli.training.state.live import MOMENTS, TrainedState, inner_optimizer, trained_parameters

STEP = "step"


def collect(state: TrainedState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights by name, and moments as ``<name>.<moment>``, on the CPU of rank 0; empty elsewhere.

    Before the first step there are no moments.
    """
    keep = state.accelerator.is_main_process
    weights, moments = {}, {}
    read = _read_partitioned if _engine(state) else _read
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
        if _engine(state):
            _write_partitioned(state, weights, moments)
        else:
            _write(state, weights, moments)


def _engine(state: TrainedState) -> bool:
    return hasattr(state.model, "zero_optimization_stage")


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


def _read_partitioned(state: TrainedState, parameter: nn.Parameter, key: str | None) -> Tensor | None:
    zero = cast(Any, state.model).optimizer
    moments = zero.optimizer.state
    if key is not None and not any(key in kept for kept in moments.values()):
        return None
    piece = _piece(zero, parameter)
    device = state.accelerator.device  # not DeepSpeed's: with offload that is the CPU, where NCCL sums nothing
    if key == STEP:
        count = torch.zeros((), device=device)
        if piece is not None:
            count += moments[piece.master][key].to(count.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=zero.dp_process_group)
        return count
    full = torch.zeros(_numel(parameter), device=device)
    if piece is not None:
        source = piece.master if key is None else moments[piece.master][key]
        full.narrow(0, piece.offset, piece.count).copy_(piece.inside(source.detach()))
    dist.all_reduce(full, group=zero.dp_process_group)
    return full.reshape(_shape(parameter))


def _write_partitioned(state: TrainedState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    zero = cast(Any, state.model).optimizer
    kept = zero.optimizer.state
    for name, parameter in trained_parameters(state).items():
        piece = _piece(zero, parameter)
        if piece is None:
            continue
        part = slice(piece.offset, piece.offset + piece.count)
        piece.inside(piece.master.data).copy_(weights[name].flatten()[part])
        for key, value in moments_of(name, moments).items():
            if key == STEP:
                # Where the master is, as fused AdamW needs it; each master its own, for the optimizer counts in place.
                kept[piece.master][key] = value.clone().to(piece.master.device)
                continue
            if kept[piece.master].get(key) is None:
                kept[piece.master][key] = torch.zeros_like(piece.master.data)
            piece.inside(kept[piece.master][key]).copy_(value.flatten()[part])
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
