"""Whether a GPU can hold what a process has of a model of which nothing is sharded: from below, before a launch.

Counted are the transformer's weights with their gradients and optimizer state, from the headers of its files.
Activations, encoders and buckets come on top.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vfun_cli import devices
from vfun_cli.config.optimizers import state_bytes
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import CheckpointError
from vfun_cli.families.spec import FamilySpec

ASSUMED_MEMORY = 80 * 10**9
"""Bytes of a GPU that is not here."""
TRAINED_BYTES = 8
"""Of a trained weight: its float32 master and the gradient; what the optimizer keeps comes on top."""
FROZEN_BYTES: Mapping[str, float] = {"bf16": 2, "fp8": 1, "nf4": 0.5}
"""Of a frozen weight, by ``base_precision``; without bf16 it is float32."""


@dataclass(frozen=True, kw_only=True)
class WholeState:
    """What each process holds."""

    weights: int
    needed: int
    """Bytes, at least."""
    memory: int | None
    """Bytes of the smallest GPU; None where none is known."""

    @property
    def fits(self) -> bool:
        """Whether it may fit: what comes on top decides."""
        return self.needed <= (self.memory or ASSUMED_MEMORY)

    def __str__(self) -> str:
        has = (
            "80 GB are assumed for a GPU" if self.memory is None else f"the smallest GPU has {self.memory / 1e9:.3g} GB"
        )
        return (
            f"unsharded, {self.weights / 1e9:.3g} billion weights and their training state take at least "
            f"{self.needed / 1e9:.3g} GB of each GPU, and {has}"
        )


def whole_state(config: RunConfig, spec: FamilySpec, *, lora: bool) -> WholeState | None:
    """Of a run on GPUs; None where the model is not there or not whole, which who loads it has to say.

    Raises:
        ConfigError: ``trainable_modules`` names nothing.
    """
    from vfun_cli.config.trainable import choose, parameter_shapes  # with numpy

    if config.pretrained_model_name_or_path is None:
        return None
    try:
        shapes = parameter_shapes(config.pretrained_model_name_or_path, spec)
    except CheckpointError:
        return None
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    chosen = [] if lora else choose(config.trained_modules, sizes, spec.export.names["same"]).names
    weights, trained = sum(sizes.values()), sum(sizes[name] for name in chosen)
    frozen = FROZEN_BYTES[config.base_precision] if config.bf16 else 4
    kept = state_bytes(config, [shapes[name] for name in chosen])
    needed = int(trained * TRAINED_BYTES + kept + (weights - trained) * frozen)
    return WholeState(weights=weights, needed=needed, memory=devices.smallest_gpu())
