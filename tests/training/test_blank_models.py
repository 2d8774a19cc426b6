"""What a model's configuration alone says of it is what its files say."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, LiveModel
from torch import Tensor

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.families import adapter_of
from vfun_cli.forecast.measuring.model import blank_model, weights_of
from vfun_cli.modeling.weights import read_json
from vfun_cli.training.model import adapter_options

CPU = torch.device("cpu")
WEIGHTS = {  # as published, but for Wan-Fun's
    "wan-s2v": 16_295_755_609,
    "wan-fun-control": 16_395_124_544,
    "hunyuanvideo-t2v": 12_821_012_544,
    "hunyuanvideo-i2v": 12_821_012_544,
    "easyanimate-v5.1-control": 11_799_450_176,
    "easyanimate-v5-control": 11_797_680_192,
    "cogvideox-fun": 5_570_491_968,
}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_model_has_the_weights_and_conditions_of_the_one_in_the_files(
    family: str, live_model: Callable[[str], LiveModel]
) -> None:
    live = live_model(family)
    options = adapter_options(live.config, live.spec, CPU)
    blank = adapter_of(live.spec).blank(read_json(live.folder / live.spec.model.config_file), options)
    assert shapes(blank.transformer.state_dict()) == shapes(live.adapter.transformer.state_dict())
    assert all(weight.is_meta for weight in blank.transformer.parameters())

    inputs = live.inputs(*SMALL)
    conditions = blank.blank_conditions(inputs.noisy)
    conditions.pop("loss_mask", None)

    def described(value: Any) -> Any:
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    assert {name: described(value) for name, value in conditions.items()} == {
        name: described(value) for name, value in inputs.conditions.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_released_model_has_as_many_weights_as_are_known_of_it(
    family: str, live_model: Callable[[str], LiveModel]
) -> None:
    spec, live = families.find(family), live_model(family)
    blank = adapter_of(spec).blank(spec.model.released, adapter_options(live.config, spec, CPU))
    assert sum(weight.numel() for weight in blank.transformer.parameters()) == WEIGHTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_released_model_fsdp_keeps_little_gathered(family: str) -> None:
    """All but a tenth of a billion weights are in blocks and in other units, each at most half a billion."""
    spec = families.find(family)
    units = dict[str, int]()
    for weight in weights_of(spec, RunConfig(), spec.model.released, lora=False):
        units[weight.block] = units.get(weight.block, 0) + weight.numel
    assert 0 < units.pop("") < 0.1e9
    assert len(units) >= spec.model.blocks(spec.model.dims) + len(spec.model.unit_classes)
    assert max(units.values()) < 0.5e9


@pytest.mark.slow
def test_what_trains_at_a_lower_rate_is_forecast_to_train(live_model: Callable[[str], LiveModel]) -> None:
    live = live_model("cogvideox-fun")
    chosen = {"trainable_modules": ("proj_out",), "trainable_modules_low_learning_rate": ("blocks.0.attn1",)}
    config = replace(live.config, **chosen)
    stated = read_json(live.folder / live.spec.model.config_file)
    weights = weights_of(live.spec, config, stated, lora=False)
    trained, slow = ({each.name for each in weights if getattr(each, kind)} for kind in ("trained", "slow"))
    assert slow == {name for name in trained if name.startswith("transformer_blocks.0.attn1.")} != set()
    assert trained - slow == {name for name in trained if name.startswith("proj_out.")} != set()
    blank = blank_model(live.spec, config, stated, lora=False).transformer
    assert trained == {name for name, weight in blank.named_parameters() if weight.requires_grad}
