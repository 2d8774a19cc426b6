"""From the strategy's name to a prepared accelerator, and the proof that it is the strategy that runs.

On a machine without an accelerator, ``accelerate launch`` quietly turns FSDP and DeepSpeed runs into plain DDP. The
set-up here keeps the real strategies on gloo, and ``assert_strategy`` refuses anything else.
"""

import os
import resource
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vfun_cli.children import SHARE_CORES
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.devices import cpu_cores
from vfun_cli.errors import RunError
from vfun_cli.modeling.encoders.sharding import ranks_here
from vfun_cli.modeling.shards import shard_group
from vfun_cli.training.precision import compute_dtype
from vfun_cli.training.waiting import COLLECTIVE_LIMIT

OPEN_FILES = 65_536
"""As many as a rank may ask for. A gloo group takes a connection to each other rank, and there are two or three of them
beside NCCL's: the usual 1,024 are not enough for 500 ranks."""


def make_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of one worker process, as the launcher's environment and the strategy ask for.

    Raises:
        RunError: the environment asks for something else than the run.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    _require("processes", started, config.num_processes)  # before all that would wait for the others
    accelerator = _accelerator(config)
    _require("processes", accelerator.num_processes, config.num_processes)
    return accelerator


def _require(what: str, found: int, asked: int | None) -> None:
    if asked not in (found, None):
        raise RunError(
            f"the run asks for {asked} {what}, but the environment of this process makes it {found}.",
            hint="Start the run by vfun, or with exactly the command that --dry-run shows: it unsets ACCELERATE_*, "
            "WORLD_SIZE and the like.",
        )


def _accelerator(config: RunConfig) -> Accelerator:
    wrapper, device = STRATEGIES[config.strategy].wrapper, config.device
    # A micro-batch of FSDP that is not reduced at once leaves whole float32 gradients on every rank: 60.7 GiB of
    # Wan-S2V, where a shard of them is 7.6 on 8 ranks. DeepSpeed partitions by itself.
    accumulation = GradientAccumulationPlugin(config.gradient_accumulation_steps, sync_each_batch=wrapper == "fsdp")
    handlers: list[KwargsHandler] = []
    settings: dict[str, Any] = {"gradient_accumulation_plugin": accumulation, "kwargs_handlers": handlers}
    if wrapper != "none":
        backend = "nccl" if device == "cuda" else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_LIMIT))
    if wrapper == "deepspeed":
        if device == "cpu":
            use_gloo_alone()
        return Accelerator(**settings)
    settings["mixed_precision"] = "no"  # no autocast: training/precision.py
    if wrapper == "fsdp":
        if device == "cpu":
            # accelerate takes the FSDP branch only for a non-CPU state; gloo and the CPU serve FSDP2 just as well.
            state = PartialState(cpu=True, timeout=COLLECTIVE_LIMIT)
            state.distributed_type = DistributedType.MULTI_GPU
            state._cpu = False
        return Accelerator(**settings, fsdp_plugin=_fsdp_plugin(config), parallelism_config=_groups(config))
    if wrapper == "ddp":
        handlers.append(_ddp_settings())
    return Accelerator(**settings, cpu=device == "cpu")


def _ddp_settings() -> DistributedDataParallelKwargs:
    """DDP that sums the gradients of every step in the same order, and keeps no second copy of them (4 bytes a weight).

    Unless it looks for weights without a gradient, DDP lays its buckets out anew after the first step of a launch. More
    than two ranks sum by place in a bucket, so that the first step of a resumed run would be another than the same step
    of one that was not stopped, by rounding. To look takes a walk over the graph of a step's operations.
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=True)


def use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: gloo does the same without a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _fsdp_plugin(config: RunConfig) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launch file says (through accelerate's environment), with a precision policy of our own.

    accelerate's policy casts every float input of the forward pass, which rounds the timestep 999 to 1000 in bf16:
    18 % relative error of a tiny Wan-S2V prediction against 0.9 % without. It also reduces gradients in bf16, which
    here has to be asked for.
    """
    dtype = compute_dtype(config) if config.bf16 else None
    reduced = torch.bfloat16 if config.fsdp_reduce_dtype == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _groups(config: RunConfig) -> ParallelismConfig | None:
    """Hybrid sharding: groups of consecutive ranks, each with all weights. None: all ranks are one group.

    It is said here and not in the launch file, so that no environment takes part in it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    size = config.parts_of(ranks)
    return None if size == ranks else ParallelismConfig(dp_replicate_size=ranks // size, dp_shard_size=size)


def prefetch_blocks(blocks: Sequence[nn.Module], ahead: int) -> None:
    """Let FSDP gather the weights of ``ahead`` blocks early: the following ones forward, the earlier ones backward."""
    sharded: list[Any] = [block for block in blocks if isinstance(block, FSDPModule)]
    for index, block in enumerate(sharded):
        block.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + ahead])
        block.set_modules_to_backward_prefetch(sharded[max(0, index - ahead) : index][::-1])


def sum_over_groups(config: RunConfig, model: nn.Module, *, last: bool) -> None:
    """Under hybrid sharding, let the groups sum their gradients after the next backward pass, or after a later one.

    Within a group each micro-batch is summed at once, so that a rank keeps a shard of it; between groups, which is
    between machines, a step's sum is sent once. Not so in bf16, in which sums of several micro-batches would round.

    Args:
        last: whether the next micro-batch is the last one of its step.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last or config.fsdp_reduce_dtype == "bf16")


def prepare_environment(device: str) -> None:
    """Settings that must be in place before torch starts threads or a process group.

    A user's OMP_NUM_THREADS holds. Otherwise the ranks of a machine share its cores, beside GPUs too: there AdamW works
    on the processor where the optimizer is offloaded.
    """
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(usual, min(most, OPEN_FILES)), most))
    if device == "cpu":
        os.environ.setdefault("ACCELERATE_USE_CPU", "false")
    if SHARE_CORES in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // ranks_here()))


def assert_strategy(name: str, model: nn.Module) -> None:
    """Refuse to train under another strategy than the one asked for.

    Raises:
        RunError: accelerate prepared something else, naming both.
    """
    strategy, found = STRATEGIES[name], running_wrapper(model)
    if found != (strategy.wrapper, strategy.zero_stage):
        prepared = " stage ".join(str(part) for part in found if part is not None)
        raise RunError(
            f"strategy {name} was asked for, but accelerate prepared {prepared} ({type(model).__name__}).",
            hint="Check the accelerate file in the run's launch directory and ACCELERATE_* variables.",
        )


def assert_shards(config: RunConfig, model: nn.Module) -> None:
    """Refuse to train where FSDP cuts weights over other groups of ranks than was asked for.

    Raises:
        RunError: it does, naming both.
    """
    for name, weight in model.named_parameters() if isinstance(model, FSDPModule) else ():
        assert isinstance(weight, DTensor)
        ranks = dist.get_process_group_ranks(shard_group(weight))
        size = config.parts_of(dist.get_world_size())
        first = dist.get_rank() // size * size
        if ranks != list(range(first, first + size)):
            raise RunError(
                f"{name} is cut over the ranks {', '.join(map(str, ranks))}, and the run asks for the {size} from "
                f"{first} on.",
                hint="This is a fault of vfun or of accelerate; please report it.",
            )


def assert_accumulation(config: RunConfig, model: nn.Module) -> None:
    """Refuse to train where DeepSpeed, which counts by itself, accumulates otherwise than was asked for.

    Raises:
        RunError: it does.
    """
    counted = getattr(model, "gradient_accumulation_steps", None)
    if counted is not None and running_wrapper(model)[0] == "deepspeed":
        _require("micro-batches a step", counted(), config.gradient_accumulation_steps)


def running_wrapper(model: nn.Module) -> tuple[str, int | None]:
    """What a prepared model is really wrapped in, and DeepSpeed's stage; compare with a ``Strategy``."""
    if isinstance(model, DistributedDataParallel):
        return "ddp", None
    if isinstance(model, FSDPModule):
        return "fsdp", None
    stage = getattr(model, "zero_optimization_stage", None)
    return ("none", None) if stage is None else ("deepspeed", stage())
