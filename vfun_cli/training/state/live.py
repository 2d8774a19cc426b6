"""The live objects that a checkpoint holds, and how their parts are reached under every strategy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vfun_cli.config.optimizers import OPTIMIZERS, Optimizer
from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.shards import shards_of
from vfun_cli.training.optim import trainable
from vfun_cli.training.state.ema import WeightAverage


@dataclass(kw_only=True)
class TrainedState:
    """The live objects that a checkpoint holds."""

    accelerator: Accelerator
    model: nn.Module
    """The transformer as the strategy wrapped it."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    kind: Optimizer = OPTIMIZERS["adamw"]
    """What the optimizer is, and how what it keeps can be saved."""
    moments_bytes: int | None = None
    """What it will keep of all parameters, on all ranks; None: as much as two float32 numbers for each of theirs."""

    @property
    def transformer(self) -> nn.Module:
        """The transformer as its family built it: DDP and DeepSpeed have it inside of them, FSDP changes it in place.

        accelerate's ``unwrap_model`` imports deepspeed for every strategy: 0.5 s of the start of each rank.
        """
        wrapped = isinstance(self.model, DistributedDataParallel) or is_partitioned(self)
        return cast(nn.Module, self.model.module) if wrapped else self.model


def trained_parameters(state: TrainedState) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, as the strategy keeps them."""
    return trainable(state.transformer)


def is_partitioned(state: TrainedState) -> bool:
    """Whether DeepSpeed trains it: it cuts the masters into parts by rules of its own."""
    return hasattr(state.model, "zero_optimization_stage")


def cut_over(state: TrainedState) -> int:
    """Over how many ranks each parameter is cut, or would be: under hybrid sharding, over a group of them."""
    shards = (shards_of(each) for each in trained_parameters(state).values() if isinstance(each, DTensor))
    return next(shards, state.accelerator.num_processes)


def master_weights(state: TrainedState) -> list[Tensor]:
    """The float32 weights that the optimizer changes, as far as they lie on this rank.

    DeepSpeed's are flat tensors of many parameters; others are one a parameter, in the order of ``trained_parameters``.
    """
    if is_partitioned(state):
        zero = cast(Any, state.model).optimizer
        third = hasattr(zero, "fp32_partitioned_groups_flat")
        return list(zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups)
    mine = [parameter.detach() for parameter in trained_parameters(state).values()]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in mine]


def fingerprint(state: TrainedState) -> Tensor:
    """Numbers that change with this rank's master weights; one pass over them, on the device."""
    device = state.accelerator.device
    sums = [weight.sum(dtype=torch.float64).to(device) for weight in master_weights(state)]
    return torch.stack(sums) if sums else torch.zeros(0, device=device)


def let_go(state: TrainedState) -> None:
    """Give back what forward passes without a backward pass have gathered of sharded weights.

    FSDP keeps its root whole for the backward pass, and what accelerate wraps of a model's end, ZeRO-3 what it fetched
    ahead; the small weights that ZeRO-3 always keeps whole go with it, and come back with the next forward pass.
    """
    model: Any = state.model
    if isinstance(model, FSDPModule):
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    elif is_partitioned(state) and model.zero_optimization_stage() == 3:
        model.empty_partition_cache()


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def stepping_optimizer(state: TrainedState) -> torch.optim.Optimizer:
    """The same inside DeepSpeed's, which gives it flat parts of the parameters."""
    inner: Any = inner_optimizer(state.optimizer)
    stepping: torch.optim.Optimizer = inner.optimizer if is_partitioned(state) else inner
    return stepping


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
