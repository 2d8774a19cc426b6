"""The loss of rows that are never trained on, at fixed timesteps with fixed noise.

Every number in it is a function of the weights and the row alone. The ranks share the rows, and what they find is added
up in the order of the rows: any number of ranks comes to the same bits. Nothing of the training is touched: no random
state, no gradient, no weight, and no memory beside what the encoders gave of the rows, which stays on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Sample, encode, outputs_of, shared_call_counts
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest
from vfun_cli.plan.held_out import QUANTILES
from vfun_cli.sampling.films import moved
from vfun_cli.training.agreement import all_or_none
from vfun_cli.training.forward import error_of
from vfun_cli.training.looking import evaluating, go_on, weights_of
from vfun_cli.training.objectives import Objective
from vfun_cli.training.signals import StopFlag
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.waiting import gather_all


@dataclass(kw_only=True)
class HeldOutLoss:
    """Computes it; all ranks together."""

    accelerator: Accelerator
    adapter: ModelAdapter
    state: TrainedState
    objective: Objective
    """The training's, whose timesteps these losses are at."""
    dtype: torch.dtype
    """What the model computes in."""
    requests: Sequence[SampleRequest]
    """Of all held-out rows, in their order; no condition of them is left out."""
    load: Callable[[SampleRequest], Sample]
    """Decodes a clip. Raises MetadataError where it cannot."""
    cache: Cache | None
    stop: StopFlag
    encoded: list[Sample] = field(default_factory=list)
    """What the encoders gave of this rank's clips, on the host."""

    @property
    def places(self) -> range:
        """This rank's passes. With sharded weights each is one of all ranks, so that all make equally many: those past
        the last row compute one of the first again, which counts for nothing.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        return range(rank, -(-len(self.requests) // ranks) * ranks, ranks)

    def compute(self) -> dict[str, list[list[float]]]:
        """The loss of each row at each of QUANTILES, for the trained weights and, where there is one, their average.

        Raises:
            MetadataError: a row cannot be decoded; on all ranks.
            Stopped: the run was asked to stop; at most one forward pass came after that.
        """
        self._encode()
        return {weights: self._losses(weights) for weights in weights_of(self.state)}

    def _encode(self) -> None:
        """Once a launch: the encoders are frozen. docs/numerics.md says how much stays on the host."""
        names = self.adapter.encoders.shared
        for place in self.places[len(self.encoded) :]:
            with all_or_none():
                sample = self.load(self.requests[place % len(self.requests)])
            calls = go_on(self.stop, shared_call_counts(self.adapter.encoders, [sample]))
            add = None if self.cache is None else self.cache.write
            [outputs] = outputs_of(self.adapter.encoders, [sample], add, dict(zip(names, calls, strict=True)))
            found = moved(outputs, torch.device("cpu"))
            self.encoded.append(Sample(inputs=sample.inputs, values={}, found=found))

    def _losses(self, weights: str) -> list[list[float]]:
        mine: dict[int, list[float]] = {}
        indices = [self.objective.at_quantile(quantile) for quantile in QUANTILES]
        objective = self.objective.plain()  # so that runs that weigh otherwise can be compared
        with evaluating(self.state, weights) as transformer:
            for place, sample in zip(self.places, self.encoded, strict=True):
                keys = [self.requests[place % len(self.requests)].key]
                latents, conditions = encode(self.adapter, [sample], keys)
                losses = []
                for index in indices:
                    go_on(self.stop)
                    corrupted = objective.corrupt_at(latents, keys, [index])
                    error = error_of(self.adapter, objective, transformer, corrupted, conditions, self.dtype)
                    losses.append(error.item())  # waits for the device, so that a request to stop is heard in time
                if place < len(self.requests):
                    mine[place] = losses
        of_all: dict[int, list[float]] = {}
        for part in gather_all(mine):
            of_all |= part
        return [losses for _, losses in sorted(of_all.items())]


def records(step: int, losses: Mapping[str, Sequence[Sequence[float]]], seconds: float) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` says of the losses of a step, by weights; means are added up in row order, in float64."""
    found = []
    for weights, rows in losses.items():
        by_quantile = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        found.append(
            {
                "event": "held-out",
                "step": step,
                "weights": weights,
                "loss": sum(by_quantile) / len(by_quantile),
                "by_quantile": by_quantile,
                "quantiles": list(QUANTILES),
                "rows": len(rows),
                "seconds": round(seconds, 3),
            }
        )
    return found
