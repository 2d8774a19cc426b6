"""Weights instead of a model directory's own: taken as people have them, and only if every tensor fits."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.live_models import SMALL, LiveModel
from vfun_cli.checkpoints.released import weight_files
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.encoding.cache import Cache
from vfun_cli.errors import CheckpointError
from vfun_cli.families import FAMILIES, adapter_of
from vfun_cli.families.given import require_given
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.lazy_weights import LazyWeights
from vfun_cli.modeling.weights import load_pth
from vfun_cli.training.model import adapter_options
from vfun_cli.training.optim import choose_trainable

LiveModels = Callable[[str], LiveModel]
Weights = dict[str, Tensor]
CPU = torch.device("cpu")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def changed(weights: Mapping[str, Tensor]) -> Weights:
    """The same a little otherwise: as after some training."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }


def own_transformer(live: LiveModel) -> Weights:
    """By the released names."""
    folder = live.spec.model.transformer_dir(live.folder)
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def own_vae(live: LiveModel) -> Weights:
    place = live.folder / live.spec.model.vae
    return (
        load_pth(place)
        if place.is_file()
        else {n: v for file in weight_files(place) for n, v in load_file(file).items()}
    )


def as_file(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "any name.safetensors")
    return folder / "any name.safetensors"


def as_folder(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def as_model(weights: Weights, folder: Path) -> Path:
    for part in ("transformer", "vae"):
        (folder / part).mkdir()
        save_file(weights, folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def as_pickle(weights: Weights, folder: Path) -> Path:
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, folder / "w.pth")
    return folder / "w.pth"


def as_wrapped(weights: Weights, folder: Path) -> Path:
    return as_file({f"model.{name}": value for name, value in weights.items()}, folder)


def as_deepspeed(weights: Weights, folder: Path) -> Path:
    torch.save({"module": weights, "iteration": 3}, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt"


def as_comfyui(weights: Weights, folder: Path) -> Path:
    return as_file({f"model.diffusion_model.{name}": value for name, value in weights.items()}, folder)


FORMS = (as_file, as_folder, as_model, as_pickle, as_wrapped, as_deepspeed, as_comfyui)


def loaded(live: LiveModel, **paths: Path | None) -> ModelAdapter:
    config = replace(live.config, **paths)  # type: ignore[arg-type]
    return adapter_of(live.spec).from_pretrained(adapter_options(config, live.spec, CPU))


def directory_with(
    live: LiveModel, folder: Path, *, transformer: Weights | None = None, vae: Weights | None = None
) -> Path:
    """A model directory that has other weights itself."""
    model = folder / "model"
    shutil.copytree(live.folder, model)
    if transformer is not None:
        _replace(weight_files(live.spec.model.transformer_dir(model)), transformer)
    place = model / live.spec.model.vae
    if vae is not None and place.is_file():
        torch.save(vae, place)
    elif vae is not None:
        _replace(weight_files(place), vae)
    return model


def _replace(files: list[Path], weights: Weights) -> None:
    for file in files:
        save_file({name: weights[name] for name in load_file(file)}, file)


def losses(live: LiveModel, adapter: ModelAdapter, steps: int = 2) -> list[float]:
    """Of some steps on one clip."""
    model = adapter.transformer
    choose_trainable(model, (".",), live.spec.model.modules_without_gradient(live.dims))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    found = []
    for _ in range(steps):
        loss = live.loss(model, live.inputs(*SMALL))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_given_weights_is_training_from_a_directory_that_has_them(
    family: str, live_model: LiveModels, tmp_path: Path
) -> None:
    live = live_model(family)
    weights = changed(own_transformer(live))
    form = FORMS[list(FAMILIES).index(family) % len(FORMS)]
    (tmp_path / "given").mkdir()
    place = form(weights, tmp_path / "given")
    model = directory_with(live, tmp_path, transformer=weights)
    expected = losses(live, loaded(live, pretrained_model_name_or_path=model))
    assert losses(live, loaded(live, transformer_path=place)) == expected
    assert losses(live, loaded(live)) != expected
    lazy = LazyWeights()
    with lazy.transformer():
        late = loaded(live, transformer_path=place).transformer
    now = dict(loaded(live, transformer_path=place).transformer.named_parameters())
    assert now.keys() == {name for name, _ in late.named_parameters()}
    for name, parameter in late.named_parameters():
        assert torch.equal(lazy.value(parameter, CPU), now[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_clips_are_encoded_with_the_given_vae(family: str, live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model(family)
    weights = changed(own_vae(live))
    form = FORMS[(list(FAMILIES).index(family) + 2) % len(FORMS)]
    (tmp_path / "given").mkdir()
    place = form(weights, tmp_path / "given")
    require_given(live.spec, live.folder, replace(live.config, vae_path=place).given_weights)
    model = directory_with(live, tmp_path, vae=weights)
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for paths in ({"vae_path": place}, {"pretrained_model_name_or_path": model}, {}):
        vae: Any = loaded(live, **paths).encoders.sources["vae"].load()
        found.append(vae.encode(pixels))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_a_cache_knows_which_vae_filled_it(live_model: LiveModels, tmp_path: Path) -> None:
    for family in ("wan-fun-control", "cogvideox-fun"):
        live = live_model(family)
        (tmp_path / family).mkdir()
        place = as_file(changed(own_vae(live)), tmp_path / family)
        keys = [
            Cache.for_encoders(tmp_path / "cache", loaded(live, vae_path=given).encoders).encoders
            for given in (None, place)
        ]
        assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"vae"}


def lacking(weights: Weights) -> Weights:
    return dict(list(weights.items())[1:])


def with_more(weights: Weights) -> Weights:
    return weights | {"transformer_blocks.99.more": torch.zeros(2)}


def misshapen(weights: Weights) -> Weights:
    name = next(name for name, value in weights.items() if value.dim() == 2)
    return weights | {name: weights[name][:-1].contiguous()}


WRONG = {"1 missing": lacking, "1 unexpected: transformer_blocks.99.more": with_more, "1 of another shape": misshapen}


@pytest.mark.slow
@pytest.mark.parametrize("said", WRONG)
@pytest.mark.parametrize("family", ["wan-fun-control", "easyanimate-v5.1-control", "hunyuanvideo-t2v"])
def test_a_tensor_that_does_not_fit_is_refused_before_the_launch_and_in_the_run(
    family: str, said: str, live_model: LiveModels, tmp_path: Path
) -> None:
    live = live_model(family)
    place = as_file(WRONG[said](own_transformer(live)), tmp_path)
    given = replace(live.config, transformer_path=place)
    refused: tuple[Callable[[], Any], ...] = (
        lambda: require_given(live.spec, live.folder, given.given_weights),
        lambda: loaded(live, transformer_path=place),
    )
    for attempt in refused:
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            attempt()
        assert f"--transformer-path {place}" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("said", WRONG)
@pytest.mark.parametrize("family", ["wan-s2v", "cogvideox-fun", "easyanimate-v5-control"])
def test_a_vae_that_does_not_fit_is_refused_too(family: str, said: str, live_model: LiveModels, tmp_path: Path) -> None:
    live = live_model(family)
    weights = own_vae(live)
    if said == "1 of another shape":
        name = next(name for name, value in weights.items() if value.dim() == 5)
        place = as_file(weights | {name: weights[name][:-1].contiguous()}, tmp_path)
    else:
        place = as_pickle(WRONG[said](weights), tmp_path)
    given = replace(live.config, vae_path=place)
    for attempt in (
        lambda: require_given(live.spec, live.folder, given.given_weights),
        lambda: loaded(live, vae_path=place).encoders.sources["vae"].load(),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            attempt()
        assert f"--vae-path {place}" in caught.value.message


def absent(place: Path) -> Path:
    return place / "nothing"


def empty(place: Path) -> Path:
    return place


def own_checkpoint(place: Path) -> Path:
    (place / STATE_FILE).write_text("{}")
    return place


def pointer(place: Path) -> Path:
    (place / "w.safetensors").write_bytes(POINTER)
    return place / "w.safetensors"


def truncated(place: Path) -> Path:
    save_file({"a": torch.zeros(1000)}, place / "w.safetensors")
    (place / "w.safetensors").write_bytes((place / "w.safetensors").read_bytes()[:-9])
    return place / "w.safetensors"


def truncated_pickle(place: Path) -> Path:
    torch.save({"a": torch.zeros(1000)}, place / "w.pth")
    (place / "w.pth").write_bytes((place / "w.pth").read_bytes()[:-200])
    return place / "w.pth"


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this was run",)


def planted(place: Path) -> Path:
    torch.save({"state_dict": {"a": Planted()}}, place / "w.ckpt")
    return place / "w.ckpt"


def no_state_dict(place: Path) -> Path:
    torch.save({"epoch": 3, "model": {"a": torch.zeros(2)}}, place / "w.pt")
    return place / "w.pt"


def a_lora(place: Path) -> Path:
    return as_file({"blocks.0.q.lora_A.weight": torch.zeros(2, 4)}, place)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (absent, "no such file or folder"),
        (empty, "no weights in"),
        (own_checkpoint, "is a checkpoint"),
        (pointer, "git-lfs"),
        (truncated, "truncated"),
        (truncated_pickle, "not a whole torch file"),
        (planted, "asks for __builtin__.print"),
        (no_state_dict, "not a state dict"),
        (a_lora, "1 unexpected"),
    ],
)
def test_what_holds_no_model_is_refused_by_the_name_of_the_option(
    make: Callable[[Path], Path], said: str, live_model: LiveModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = live_model("cogvideox-fun")
    place = make(tmp_path)
    for option, path in (("--transformer-path", "transformer_path"), ("--vae-path", "vae_path")):
        given = replace(live.config, **{path: place}).given_weights  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=said) as caught:
            require_given(live.spec, live.folder, given)
        assert option in caught.value.message
        assert caught.value.hint
    assert "this was run" not in capsys.readouterr().out
