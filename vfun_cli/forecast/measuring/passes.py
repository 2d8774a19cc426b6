"""What a forward and a backward pass of a model hold, beside its weights and their gradients."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.measuring.gpu import Device, made_up_gpu
from vfun_cli.forecast.measuring.layers import directions
from vfun_cli.forecast.measuring.model import blank_model
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.forecast.request import Batch
from vfun_cli.imports import uncollected
from vfun_cli.modeling.adapter import Conditions, ModelAdapter, cast
from vfun_cli.training.forward import MASK, error_of
from vfun_cli.training.objectives import Corrupted, FlowMatching
from vfun_cli.training.precision import compute_dtype

ON_DEVICE = 2
"""Layers whose activations ``training.offload`` has on the device at a time: one computes, one is on its way."""
OBJECTIVE = FlowMatching(shift=1.0)
"""For its loss, which all objectives have alike."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a pass holds of a device; weights, their gradients and what the strategy gathers are not counted."""

    saved: int
    """Between the passes: what the forward pass keeps for the backward pass."""
    forward: int
    """The most in the forward pass, with what it keeps."""
    backward: int
    """The most in the backward pass, with what is kept."""
    last: int
    """The most in the backward pass where its last layers are left, and with them what is kept for these alone."""
    offloaded: int = 0
    """What waits on the host between the passes, and is not in any of these."""

    def __add__(self, other: "Held") -> "Held":
        return Held(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def __sub__(self, other: "Held") -> "Held":
        return Held(**{each.name: getattr(self, each.name) - getattr(other, each.name) for each in fields(self)})

    def __mul__(self, times: int) -> "Held":
        return Held(**{each.name: getattr(self, each.name) * times for each in fields(self)})


def measure(
    spec: FamilySpec,
    config: RunConfig,
    stated: Mapping[str, Any],
    batch: Batch,
    *,
    lora: bool,
    alike: bool = True,
    on: Device = made_up_gpu,
) -> Held:
    """A step of one micro-batch, of the model that ``stated`` (its ``config.json``) describes.

    A model of a few layers of each kind is run, and one with a layer more of each: what a layer adds counts as often as
    the model has it.

    Args:
        alike: ``layers_alike``; where they are not, the whole model is run, and nothing of it is taken to be offloaded.
        on: one without values.
    """
    stays = replace(config, activation_offload=False)

    def held(settings: Mapping[str, Any]) -> Held:
        return run(blank_model(spec, stays, settings, lora=lora), batch, compute_dtype(config), on)

    found = directions(spec, stated) if alike else None
    if found is None:
        return held(stated)
    total = few = held(found.few)
    layers = list[tuple[Held, int]]()
    for more, times, count in found.more:
        layer = held(more) - few
        layers.append((layer, count))
        total = total + layer * times
    total = replace(total, last=few.backward)
    return _offloaded(total, layers) if config.activation_offload else total


def _offloaded(total: Held, layers: Sequence[tuple[Held, int]]) -> Held:
    """Of what layers keep, that of ``ON_DEVICE`` is there at a time: of the kind that keeps most."""
    heaviest = max(layer.saved for layer, _ in layers)
    gone = sum(layer.saved * count for layer, count in layers)
    left = max(0, gone - ON_DEVICE * heaviest)
    return Held(
        saved=total.saved - left, forward=total.forward - left, backward=total.backward - left,
        last=min(total.last, total.backward - left), offloaded=gone,
    )  # fmt: skip


def predict_peak(spec: FamilySpec, config: RunConfig, stated: Mapping[str, Any], batch: Batch, *, lora: bool) -> int:
    """The most in a pass without gradients on one clip; layers come one after the other, however many there are."""
    found = directions(spec, stated)
    adapter = blank_model(spec, config, stated if found is None else found.few, lora=lora)
    with made_up_gpu() as device, uncollected(), torch.no_grad(), Tracker() as tracker:
        latents = torch.empty(1, *adapter.latent_shape(batch), device=device, dtype=compute_dtype(config))
        conditions = {name: each for name, each in adapter.blank_conditions(latents).items() if name != MASK}
        adapter.predict(adapter.transformer, latents, torch.empty(1, device=device), cast(conditions, latents.dtype))
    return tracker.peak


def run(
    adapter: ModelAdapter, batch: Batch, dtype: torch.dtype, on: Device = made_up_gpu, *, gradients: bool = False
) -> Held:
    """One pass there and back on a micro-batch of which nothing but its shape is known; see ``follow``."""
    with on() as device:
        latents = torch.empty(batch.clips, *adapter.latent_shape(batch), device=device)
        corrupted = Corrupted(
            noisy=latents, timesteps=torch.empty(batch.clips, device=device), target=torch.empty_like(latents)
        )
        return follow(adapter, corrupted, adapter.blank_conditions(latents), dtype, gradients=gradients)


def follow(
    adapter: ModelAdapter,
    corrupted: Corrupted,
    conditions: Conditions,
    dtype: torch.dtype,
    counter: type[Any] = Tracker,
    *,
    gradients: bool = False,
) -> Held:
    """One pass there and back, all layers one after another, wherever its inputs and weights lie.

    What cycles of references hold is let go at any time, here at none.

    Args:
        counter: one that counts as ``Tracker`` does.
        gradients: whether those of weights stay, and count; else the strategy counts them, which decides how many of
            them a rank keeps.
    """
    _forget_tables(adapter.transformer)
    weights = [] if gradients else [weight for weight in adapter.transformer.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(_forget) for weight in weights]
    with uncollected(), counter() as taken:
        error = error_of(adapter, OBJECTIVE, adapter.transformer, corrupted, conditions, dtype)
        saved, forward = taken.bytes, taken.mark()
        torch.autograd.backward(error)
        backward = taken.mark()
    for hook in hooks:
        hook.remove()
    return Held(saved=saved, forward=forward, backward=backward, last=backward)


def _forget_tables(transformer: nn.Module) -> None:
    """What a model keeps for its next pass on the same shape, tables of positions, counts in each that is followed."""
    for value in vars(sys.modules[type(transformer).__module__]).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _forget(weight: torch.Tensor) -> None:
    weight.grad = None
