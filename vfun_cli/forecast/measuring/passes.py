"""What a forward and a backward pass of a model hold, beside its weights and their gradients."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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


Peaks = Mapping[str, int]
"""The most while a pass is in a part of the model, by the name of that child of the transformer, or ``REST``."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a pass there and back goes. The most of all is no sum of what layers add: with few layers it may lie in
    another part than with many. The most of each part is.
    """

    saved: int
    forward: Peaks
    backward: Peaks

    @property
    def held(self) -> Held:
        """The most of all parts."""
        backward = max(self.backward.values())
        return Held(saved=self.saved, forward=max(self.forward.values()), backward=backward, last=backward)

    def longer(self, few: "Course", more: "Course", times: int) -> "Course":
        """With so many times what ``more`` has beyond ``few``."""

        def added(here: Peaks, fewer: Peaks, other: Peaks) -> Peaks:
            return {part: peak + (other[part] - fewer[part]) * times for part, peak in here.items()}

        return Course(
            saved=self.saved + (more.saved - few.saved) * times,
            forward=added(self.forward, few.forward, more.forward),
            backward=added(self.backward, few.backward, more.backward),
        )

    def without(self, gone: int, few: "Course") -> "Course":
        """Where so much of what is kept is elsewhere; of what the passes of ``few`` layers hold nothing is."""

        def left(here: Peaks, fewer: Peaks) -> Peaks:
            return {part: peak - min(gone, max(0, peak - fewer[part])) for part, peak in here.items()}

        return Course(
            saved=self.saved - gone,
            forward=left(self.forward, few.forward),
            backward=left(self.backward, few.backward),
        )


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

    def course(settings: Mapping[str, Any]) -> Course:
        return run(blank_model(spec, stays, settings, lora=lora), batch, compute_dtype(config), on)

    found = directions(spec, stated) if alike else None
    if found is None:
        return course(stated).held
    total = few = course(found.few)
    offloaded, heaviest = 0, 0
    for more, times, count in found.more:
        longer = course(more)
        total = total.longer(few, longer, times)
        offloaded += (longer.saved - few.saved) * count
        heaviest = max(heaviest, longer.saved - few.saved)
    if not config.activation_offload:
        return replace(total.held, last=few.held.backward)
    stay = min(offloaded, ON_DEVICE * heaviest)
    held = total.without(offloaded - stay, few).held
    return replace(held, last=min(few.held.backward, held.backward), offloaded=offloaded)


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
) -> Course:
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
) -> Course:
    """One pass there and back, all layers one after another, wherever its inputs and weights lie.

    What cycles of references hold is let go at any time, here at none.

    Args:
        counter: one that counts as ``Tracker`` does.
        gradients: whether those of weights stay, and count; else the strategy counts them, which decides how many of
            them a rank keeps.
    """
    transformer = adapter.transformer
    _forget_tables(transformer)
    with uncollected(), counter() as taken:

        def note(peaks: dict[str, int], part: str) -> None:
            peaks[part] = max(peaks.get(part, 0), taken.mark())

        forward, backward = dict[str, int](), dict[str, int]()
        with _hooks(
            layer.register_forward_hook(lambda *_, part=part: note(forward, part))
            for part, child in transformer.named_children()
            for layer in (child if isinstance(child, nn.ModuleList) else (child,))
        ):
            error = error_of(adapter, OBJECTIVE, transformer, corrupted, conditions, dtype)
        saved = taken.bytes
        note(forward, REST)

        def arrived(weight: Tensor, part: str) -> None:
            note(backward, part)
            if not gradients:
                weight.grad = None

        with _hooks(
            weight.register_post_accumulate_grad_hook(partial(arrived, part=name.partition(".")[0]))
            for name, weight in transformer.named_parameters()
            if weight.requires_grad
        ):
            torch.autograd.backward(error)
        note(backward, REST)
    return Course(saved=saved, forward=forward, backward=backward)


REST = ""
"""The part of a pass after its last layer, or after the last gradient of a weight."""


@contextmanager
def _hooks(made: Iterable[Any]) -> Iterator[None]:
    """There inside."""
    handles = list(made)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forget_tables(transformer: nn.Module) -> None:
    """What a model keeps for its next pass on the same shape, tables of positions, counts in each that is followed."""
    for value in vars(sys.modules[type(transformer).__module__]).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
