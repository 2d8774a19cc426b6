"""What a pass is forecast to hold is what the passes of live models are seen to hold."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from live_models import FAMILIES, SMALL, TALL, WIDE, Inputs, LiveModel
from torch import Tensor

from vfun_cli import families
from vfun_cli.config.options import RunConfig, options
from vfun_cli.config.resolve import resolve
from vfun_cli.forecast.measuring.gpu import made_up_cpu
from vfun_cli.forecast.measuring.model import blank_model
from vfun_cli.forecast.measuring.passes import Held, follow, measure, run
from vfun_cli.forecast.request import Batch
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.model import adapter_options, choose_weights, load_adapter, prepare_blocks, prepare_state
from vfun_cli.training.objectives import Corrupted
from vfun_cli.training.precision import compute_dtype
from vfun_cli.training.strategy import make_accelerator

COMMANDS = ("train", "lora")
CHECKPOINTING = options()["gradient_checkpointing"][2].choices
CLOSE = 0.03


def config_of(live: LiveModel, command: str, checkpointing: str, precision: str) -> RunConfig:
    given = {
        "pretrained_model_name_or_path": live.folder,
        "gradient_checkpointing": checkpointing,
        "mixed_precision": precision,
        "strategy": "single",
        "device": "cpu",
    }
    return resolve(command, live.spec, given, demo={}, environ={}).config


def as_a_run_makes_it(live: LiveModel, config: RunConfig, *, lora: bool) -> ModelAdapter:
    """With the demo's model; of encoders that compute in bf16 on every processor."""
    given = adapter_options(config, live.spec, live.adapter.options.device)
    adapter, lazy = load_adapter(live.spec, replace(given, compute_dtype=compute_dtype(config)))
    plan: Any = SimpleNamespace(spec=live.spec, dims=live.dims)
    choose_weights(config, plan, adapter.transformer, lazy, lora=lora, fresh=True)
    prepare_blocks(config, plan, adapter.transformer)
    adapter.transformer = prepare_state(config, live.spec, adapter, make_accelerator(config), lazy).model
    return adapter


def seen(adapter: ModelAdapter, inputs: Inputs, dtype: torch.dtype) -> Held:
    """Of a live pass. What the model uploads to its device is a copy, as if that were not the host."""
    corrupted = Corrupted(noisy=inputs.noisy, timesteps=inputs.timesteps, target=inputs.target)
    conditions = inputs.conditions if inputs.mask is None else {**inputs.conditions, "loss_mask": inputs.mask}
    as_encoded = adapter.blank_conditions(inputs.noisy)
    conditions = {
        name: value.to(as_encoded[name].dtype) if isinstance(value, Tensor) else value
        for name, value in conditions.items()
    }
    code = sys.modules[type(adapter.transformer).__module__]
    with mock.patch.object(code, "upload", partial(Tensor.to, copy=True), create=True):
        return follow(adapter, corrupted, conditions, dtype).held


def different(live: LiveModel, command: str, checkpointing: str, precision: str, *shapes: Any) -> dict[Any, float]:
    """By how much of it a measurement is off what is seen, where that is more than ``CLOSE``."""
    config, lora = config_of(live, command, checkpointing, precision), command == "lora"
    stated = read_json(live.folder / live.spec.model.config_file)
    adapter, found = as_a_run_makes_it(live, config, lora=lora), {}
    for shape in shapes:
        inputs = live.inputs(*shape)
        batch = Batch(frames=inputs.shape.frames, height=inputs.shape.height, width=inputs.shape.width)
        expected = seen(adapter, inputs, compute_dtype(config))
        measured = measure(live.spec, config, stated, batch, lora=lora, on=made_up_cpu)
        for name in ("saved", "forward", "backward"):
            found[shape, name] = getattr(measured, name) / getattr(expected, name) - 1
    return {where: off for where, off in found.items() if abs(off) > CLOSE}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_pass_holds_what_that_of_the_live_model_does(
    family: str, live_model: Callable[[str], LiveModel], no_accelerator: None
) -> None:
    assert not different(live_model(family), "train", "block", "bf16", SMALL)


SOME = [
    (family, COMMANDS[number % 2], CHECKPOINTING[number % len(CHECKPOINTING)], ("bf16", "no")[number // 2 % 2])
    for number, family in enumerate(FAMILIES)
]
"""Of all that follows from here on, in each value of each."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "command", "checkpointing", "precision"), SOME)
def test_so_it_does_for_some_adapters_and_checkpointing_at_every_shape(
    family: str, command: str, checkpointing: str, precision: str, live_model: Callable[[str], LiveModel],
    no_accelerator: None,
) -> None:  # fmt: skip
    assert not different(live_model(family), command, checkpointing, precision, SMALL, TALL, WIDE)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_does_for_adapters_every_checkpointing_and_every_shape(
    family: str, command: str, checkpointing: str, precision: str, live_model: Callable[[str], LiveModel],
    no_accelerator: None,
) -> None:  # fmt: skip
    assert not different(live_model(family), command, checkpointing, precision, SMALL, TALL, WIDE)


LARGE = (80, 640, 640), (48, 512, 512), (16, 512, 896)


def by_extrapolation(family: str, command: str, checkpointing: str, *shapes: tuple[int, int, int]) -> dict[Any, float]:
    """By how much the released model is off when all its layers are run, where that is more than ``CLOSE``."""
    spec, lora = families.find(family), command == "lora"
    given = {"gradient_checkpointing": checkpointing, "mixed_precision": "bf16", "strategy": "single"}
    config = resolve(command, spec, given | {"pretrained_model_name_or_path": "none"}, demo={}, environ={}).config
    whole, found = blank_model(spec, config, spec.model.released, lora=lora), {}
    for frames, height, width in shapes:
        batch = Batch(frames=frames + spec.plan.first_frame_alone, height=height, width=width)
        expected = run(whole, batch, compute_dtype(config)).held
        measured = measure(spec, config, spec.model.released, batch, lora=lora)
        for name in ("saved", "forward", "backward"):
            found[batch, name] = getattr(measured, name) / getattr(expected, name) - 1
        assert 0 < measured.last < measured.backward
    return {where: off for where, off in found.items() if abs(off) > EXTRAPOLATED}


EXTRAPOLATED = 0.002


@pytest.mark.slow
def test_few_layers_tell_of_all() -> None:
    assert not by_extrapolation("cogvideox-fun", "train", "block", LARGE[0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "command", "checkpointing", "precision"), SOME)
def test_so_they_do_of_every_family_for_some(family: str, command: str, checkpointing: str, precision: str) -> None:
    assert not by_extrapolation(family, command, checkpointing, LARGE[0])


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_of_every_family_for_adapters_every_checkpointing_and_every_shape(
    family: str, command: str, checkpointing: str
) -> None:
    assert not by_extrapolation(family, command, checkpointing, *LARGE)
