"""Encoders are frozen: no gradient reaches them and an optimizer step leaves them as they were."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.encode import encode, prepared
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders, EncoderSource
from vfun_cli.modeling.encoders.placement import encoder_dtype, encoding_on
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.model import adapter_options
from vfun_cli.training.objectives import make_objective
from vfun_cli.training.precision import compute_dtype

FAMILIES = tuple(families.FAMILIES)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def encoders(value: Any, seen: set[int]) -> list[nn.Module]:
    """Every module an adapter holds beside its transformer, however deep in its helper objects."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif type(value).__module__.startswith("vfun_cli") and hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    else:
        parts = []
    return [module for part in parts for module in encoders(part, seen)]


def request(spec: FamilySpec, config: Any) -> SampleRequest:
    root = Path(config.train_data_dir)
    record = {
        "file_path": str(root / "train/00000001.mp4"),
        "control_file_path": str(root / "control/00000001.mp4"),
        "audio_path": str(root / "wav/00000001.wav"),
        "text": "a red circle moves",
        "type": "video",
    }
    fields = {field.name for field in spec.fields} | {"text", "type"}
    frames = 8 + spec.plan.first_frame_alone
    return SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=0),
        record={name: value for name, value in record.items() if name in fields},
        kind="video", frames=frames, height=64, width=64, stride=1, total_frames=40, fps=(16, 1),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_leaves_the_encoders_alone(
    family: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    spec = families.find(family)
    config = resolve("train", spec, {"mixed_precision": "no"}, demo=demo_default.make(spec), environ={}).config
    adapter: ModelAdapter = adapter_of(spec).from_pretrained(adapter_options(config, spec, torch.device("cpu")))
    adapter.encoders.load()
    frozen = encoders(adapter, {id(adapter.transformer)})
    assert len(frozen) >= 2, "at least a VAE and a text encoder"
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in frozen]

    sample = request(spec, config)
    inputs = adapter_of(spec).inputs(sample, adapter_options(config, spec, torch.device("cpu")))
    latents, conditions = encode(adapter, [prepared(inputs)], [sample.key])
    objective = make_objective(
        spec.model.objective, spec.model.objective_options, Path(config.pretrained_model_name_or_path)
    )
    corrupted = objective.corrupt(latents, [sample.key])
    mask = conditions.pop("loss_mask", None)
    optimizer = torch.optim.AdamW(adapter.transformer.parameters(), lr=1e-2)
    prediction = adapter.predict(adapter.transformer, corrupted.noisy, corrupted.timesteps, conditions)
    objective.loss(prediction, corrupted.target, mask).backward()
    optimizer.step()

    for module, state in zip(frozen, before, strict=True):
        own = [part for part in module.modules() if list(part.parameters(recurse=False))]
        assert own and not any(part.training for part in own)
        for name, parameter in module.named_parameters():
            assert not parameter.requires_grad and parameter.grad is None, name
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name
        there = torch.device("meta")
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
        tensors = [*module.parameters(), *module.buffers()]
        with encoding_on(module, there, low_vram=True):
            assert {each.device for each in (*module.parameters(), *module.buffers())} == {there}
        now = [*module.parameters(), *module.buffers()]
        assert all(one is other for one, other in zip(now, tensors, strict=True))


@pytest.mark.parametrize("low_vram", [False, True])
def test_an_encoder_is_on_its_device_before_the_next_is_loaded(low_vram: bool) -> None:
    loaded: list[nn.Module] = []

    def load() -> nn.Module:
        assert low_vram or all(module.weight.is_meta for module in loaded)
        loaded.append(nn.Linear(2, 2))
        return loaded[-1]

    sources = {name: EncoderSource(load=load, files=(), settings="") for name in ("vae", "text")}
    Encoders(sources, torch.device("meta"), low_vram=low_vram).load()
    assert [module.weight.is_meta for module in loaded] == [not low_vram] * 2


@pytest.mark.parametrize(("precision", "device", "dtype"), [
    ("bf16", "cpu", torch.float32), ("bf16", "cuda", torch.bfloat16), ("no", "cuda", torch.float32),
])  # fmt: skip
def test_encoders_compute_in_bf16_only_where_it_is_asked_for_and_fast(
    precision: str, device: str, dtype: torch.dtype
) -> None:
    config = RunConfig(pretrained_model_name_or_path=Path("model"), mixed_precision=precision)
    assert encoder_dtype(compute_dtype(config), torch.device(device)) == dtype
