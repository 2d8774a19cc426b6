"""The moving average of a live state, under every strategy: in the place of the weights, by name, from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vfun_cli.checkpoints.reader import CheckpointReader
from vfun_cli.checkpoints.tensors import elements_of
from vfun_cli.errors import CheckpointError
from vfun_cli.training.state.ema import WeightAverage
from vfun_cli.training.state.gather import refresh_compute_copies
from vfun_cli.training.state.live import TrainedState, let_go, master_weights, require_names, trained_parameters
from vfun_cli.training.state.parts import parts_of, shape_of


@contextmanager
def average_in_place(state: TrainedState) -> Iterator[None]:
    """The average in the place of the weights that a forward pass uses; then they are again what they were, to the bit.

    Average and masters change places, so that no rank needs memory for another model, nor for the whole of this one.
    All ranks enter and leave together, with nothing gathered of sharded weights (``let_go``). Only an ``Exception`` may
    be this rank's own, with which its run ends: masters and average are put back then, but not the copies of ZeRO-2,
    which takes all ranks.
    """
    let_go(state)
    average, masters, alone = _of(state), master_weights(state), False
    average.exchange(masters)
    try:
        refresh_compute_copies(state)
        yield
    except Exception:
        alone = True
        raise
    finally:
        average.exchange(masters)
        refresh_compute_copies(state, alone=alone)


def average_by_parameter(state: TrainedState) -> dict[str, Tensor]:
    """The average as each parameter is: whole, or FSDP's shards; not of DeepSpeed, whose masters are of many."""
    found = dict[str, Tensor]()
    for (name, parameter), shadow in zip(trained_parameters(state).items(), _of(state).shadow, strict=True):
        if isinstance(parameter, DTensor):
            found[name] = DTensor.from_local(
                shadow, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                stride=parameter.stride(),
            )  # fmt: skip
        else:
            found[name] = shadow
    return found


def average_of_rank(state: TrainedState) -> dict[str, Tensor]:
    """What this rank has of each parameter's average, flattened; the parts of all ranks follow each other by rank."""
    shadow = _of(state).shadow
    return {name: part.inside(shadow[part.master]) for name, part in parts_of(state).items()}


def load_average(state: TrainedState, checkpoint: CheckpointReader) -> None:
    """Go on from the average of a checkpoint that any strategy wrote; each rank reads its own parts, and no more.

    Raises:
        CheckpointError: it holds none, or that of other weights.
    """
    if not checkpoint.ema:
        raise CheckpointError(
            f"{checkpoint.path} holds no moving average of the weights.", hint="Resume without --use-ema."
        )
    parameters = trained_parameters(state)
    require_names(set(parameters), set(checkpoint.ema), checkpoint.path)
    mine = average_of_rank(state)
    for name, part in parts_of(state).items():
        stored, shape = checkpoint.ema[name], tuple(shape_of(parameters[name]))
        if stored.shape != shape:
            raise CheckpointError(f"{checkpoint.path}: the average of {name} has shape {stored.shape}, not {shape}.")
        mine[name].copy_(torch.from_numpy(elements_of(stored, part.offset, part.count).read()))


def _of(state: TrainedState) -> WeightAverage:
    assert state.average is not None
    return state.average
