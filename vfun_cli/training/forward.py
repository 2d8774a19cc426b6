"""One forward pass of the transformer: what it is given, in the compute type, and how far off it is."""

import torch
from torch import Tensor, nn

from vfun_cli.modeling.adapter import Conditions, ModelAdapter, cast
from vfun_cli.training.objectives import Corrupted, Objective

MASK = "loss_mask"
"""The condition that says which elements count; the model does not see it."""


def error_of(
    adapter: ModelAdapter,
    objective: Objective,
    model: nn.Module,
    corrupted: Corrupted,
    conditions: Conditions,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of a micro-batch, scalar. Noise and error are float32; the model sees ``dtype``."""
    seen = {name: value for name, value in conditions.items() if name != MASK}
    prediction = adapter.predict(model, corrupted.noisy.to(dtype), corrupted.timesteps, cast(seen, dtype))
    return objective.loss(prediction, corrupted.target, conditions.get(MASK), corrupted.weights)
