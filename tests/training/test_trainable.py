"""Which parameters --trainable-modules means: the same before a launch, from files, and in the run, from the model."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from tests.training.live_models import LiveModel
from vfun_cli.checkpoints.lora_files import released_layer
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.config.trainable import Chosen, adapter_shapes, choose, choose_from_files, choose_layers
from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES
from vfun_cli.families.detect import read_config
from vfun_cli.forecast.measuring.model import weights_of
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.optim import choose_trainable

WAN, EASY = "wan-fun-control", "easyanimate-v5.1-control"

LiveModels = Callable[[str], LiveModel]


def before_launch(live: LiveModel, *parts: str) -> Chosen:
    return choose_from_files(parts, live.folder, live.spec, live.dims)[0]


def released(live: LiveModel, *parts: str) -> set[str]:
    return set(map(live.spec.export.names["same"], before_launch(live, *parts).names))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_point_is_everything_that_can_learn_and_is_known_before_the_launch(
    family: str, live_model: LiveModels
) -> None:
    live = live_model(family)
    idle = live.spec.model.modules_without_gradient(live.dims)
    model = live.adapter.transformer
    in_the_run = choose_trainable(model, (".",), idle, live.spec.export.names["same"])
    chosen, shapes = choose_from_files((".",), live.folder, live.spec, live.dims)
    every = dict(model.named_parameters())
    files = dict(zip(chosen.names, shapes, strict=True))
    assert files == {name: tuple(every[name].shape) for name in in_the_run}
    assert {name for name in every if not name.startswith(tuple(f"{module}." for module in idle))} == set(in_the_run)
    assert all(parameter.requires_grad == (name in in_the_run) for name, parameter in every.items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_adapters_is_known_before_the_launch(family: str, dora: bool, live_model: LiveModels) -> None:
    live = live_model(family)
    config = resolve("lora", live.spec, {"rank": 3, "use_dora": dora, "strategy": "ddp"}, environ={}).config
    linear = {name: each for name, each in live.adapter.transformer.named_modules() if isinstance(each, nn.Linear)}
    idle = live.spec.model.modules_without_gradient(live.dims)
    adapted = choose_layers(list(linear), config.target_name, live.spec.export.names["same"], idle)
    expected: list[tuple[int, ...]] = []
    for layer in (linear[name] for name in adapted):
        expected += [(3, layer.in_features), (layer.out_features, 3), *([(layer.out_features,)] if dora else [])]
    assert sorted(adapter_shapes(config, live.folder, live.spec, live.dims)) == sorted(expected) != []


def parts_of(names: Mapping[str, str]) -> tuple[str, str]:
    """Of the layers, by their own names: the first block as the model calls it, and a released word of only some."""
    block = next(name[: name.index(".0.") + 3] for name in names if ".0." in name)
    words = (word for name in names.values() for word in name.split("."))
    return block, next(word for word in words if not all(word in each or word in names[each] for each in names))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_to_skip_get_no_adapter_by_the_name_of_either_spelling(family: str, live_model: LiveModels) -> None:
    live = live_model(family)
    spelling = live.spec.export.names["same"]
    every = set(add_adapters(deepcopy(live.adapter.transformer), lora_of(live), live.spec, live.dims))
    for part in parts_of({layer: released_layer(layer, spelling) for layer in every}):
        config, model = lora_of(live, lora_skip_name=part), deepcopy(live.adapter.transformer)
        left = add_adapters(model, config, live.spec, live.dims)
        skipped = {layer for layer in every if part in layer or part in released_layer(layer, spelling)}
        assert skipped
        assert set(left) == every - skipped != set()
        adapted = {name.partition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad}
        assert adapted == set(left)
        trained = [tuple(weight.shape) for weight in model.parameters() if weight.requires_grad]
        assert sorted(adapter_shapes(config, live.folder, live.spec, live.dims)) == sorted(trained)
        weights = weights_of(live.spec, config, read_config(live.folder, live.spec), lora=True)
        assert sorted(weight.shape for weight in weights if weight.trained) == sorted(trained)


def lora_of(live: LiveModel, **options: Any) -> RunConfig:
    return resolve("lora", live.spec, {"rank": 2, **options}, environ={}).config


def test_what_skips_nothing_or_everything_is_refused_with_a_way_out(live_model: LiveModels) -> None:
    live = live_model(WAN)
    with pytest.raises(ConfigError, match=r"'crossattn' is in the name of none of the \d+ layers") as caught:
        adapter_shapes(lora_of(live, lora_skip_name="ffn,crossattn"), live.folder, live.spec, live.dims)
    assert "Did you mean 'cross_attn'" in caught.value.message
    with pytest.raises(ConfigError, match="modulation") as caught:  # there is one, without an adapter
        adapter_shapes(lora_of(live, lora_skip_name="modulation"), live.folder, live.spec, live.dims)
    assert caught.value.option == "--lora-skip-name"
    with pytest.raises(ConfigError, match=r"all \d+ layers that target_name chooses are skipped"):
        adapter_shapes(lora_of(live, lora_skip_name="blocks"), live.folder, live.spec, live.dims)


@pytest.mark.parametrize(
    ("family", "part", "said"),
    [
        (WAN, "self_attn", None),
        (WAN, "head.modulation", None),
        (WAN, "norm2", "no released name"),
        (WAN, "scale_shift_table", "no released name"),
        (EASY, "attn1", "not trained"),
        (EASY, "attn2", None),
    ],
)
def test_a_part_means_the_released_names_and_says_so_where_only_others_hold_it(
    family: str, part: str, said: str | None, live_model: LiveModels
) -> None:
    live = live_model(family)
    names, notices = released(live, part), before_launch(live, part).notices
    every = released(live, ".")
    by_release = {name for name in every if part in name}
    assert names and names == (by_release or names)
    assert bool(by_release) == (said != "no released name")
    assert [said in notice for notice in notices] == ([True] if said else [])
    idle = live.spec.model.modules_without_gradient(live.dims)
    in_the_run = choose_trainable(live.adapter.transformer, (part,), idle, live.spec.export.names["same"])
    assert set(map(live.spec.export.names["same"], in_the_run)) == names


def test_what_chooses_nothing_is_refused_with_the_nearest_name(live_model: LiveModels) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'self_attn'"):
        before_launch(live_model(WAN), "selfattn")
    with pytest.raises(ConfigError, match="ever gets a gradient"):
        choose(("txt",), ["txt.weight", "img.weight"], without_gradient=("txt",))
