"""Which elements of a trained parameter lie on this rank, and where, under every strategy."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from vfun_cli.modeling.shards import rows_before
from vfun_cli.training.state.live import TrainedState, is_partitioned, trained_parameters


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of elements of a flattened parameter, inside one of this rank's ``master_weights``."""

    master: int
    """Which of them."""
    start: int
    """First element within the flattened master."""
    count: int
    offset: int
    """First element within the parameter."""

    def inside(self, master: Tensor) -> Tensor:
        """These elements of the master, or of a tensor that is laid out as it is: a view, [count]."""
        return master.view(-1).narrow(0, self.start, self.count)


def parts_of(state: TrainedState) -> dict[str, Part]:
    """What this rank has of each trained parameter, by name; without those of which it has nothing."""
    parameters = trained_parameters(state)
    if is_partitioned(state):
        zero = cast(Any, state.model).optimizer
        found = {name: partition_of(zero, parameter) for name, parameter in parameters.items()}
    else:
        found = {name: _rows(number, parameter) for number, (name, parameter) in enumerate(parameters.items())}
    return {name: part for name, part in found.items() if part is not None}


def partition_of(zero: Any, parameter: Any) -> Part | None:
    """Where DeepSpeed's optimizer keeps this rank's part of a parameter. None if it has none."""
    if hasattr(parameter, "ds_id"):  # stage 3: every parameter is cut into one equal, padded part a rank
        group, start, count = zero.grad_position[zero.get_param_id(parameter)]
        offset = count * dist.get_rank(zero.dp_process_group)
        count = min(count, parameter.ds_numel - offset)
        return Part(master=group, start=start, count=count, offset=offset) if count > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Part(master=mapping.param_group_index, start=here.start, count=here.numel, offset=there.start)


def _rows(number: int, parameter: Tensor) -> Part | None:
    """Of a whole parameter everything, of FSDP2's shards the rows of this rank's."""
    if not isinstance(parameter, DTensor):
        return Part(master=number, start=0, count=parameter.numel(), offset=0)
    count = parameter.to_local().numel()
    offset = rows_before(parameter) * math.prod(parameter.shape[1:])
    return Part(master=number, start=0, count=count, offset=offset) if count else None


def numel_of(parameter: Any) -> int:
    """Elements of a parameter as a whole."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def shape_of(parameter: Any) -> torch.Size:
    """Its shape as a whole."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
