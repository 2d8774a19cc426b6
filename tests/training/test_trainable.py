"""Which parameters --trainable-modules means: the same before a launch, from files, and in the run, from the model."""

from collections.abc import Callable

import pytest
from torch import nn

from tests.training.live_models import LiveModel
from vfun_cli.config.resolve import resolve
from vfun_cli.config.trainable import Chosen, adapter_shapes, choose, choose_from_files, choose_layers
from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES
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
