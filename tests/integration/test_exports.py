"""Exported directories load where people load them and predict what was trained, rounded to bf16."""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.integration.matrix import memorised, straight
from tests.jobs import vfun_here
from vfun_cli import families
from vfun_cli.checkpoints.export import export
from vfun_cli.checkpoints.lora_export import open_adapter
from vfun_cli.checkpoints.lora_files import released_layer
from vfun_cli.checkpoints.naming import LayerLocation, unchanged
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.encode import encode, prepared
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.plan.run_plan import load_plan
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import batch_keys
from vfun_cli.training.data.stream import micro_batches, row_reader
from vfun_cli.training.model import adapter_options

pytestmark = [pytest.mark.slow, pytest.mark.strategy("single")]

FAMILIES = tuple(families.FAMILIES)
DIFFUSERS_CLASSES = {
    "hunyuanvideo-t2v": "HunyuanVideoTransformer3DModel",
    "hunyuanvideo-i2v": "HunyuanVideoTransformer3DModel",
    "easyanimate-v5.1-control": "EasyAnimateTransformer3DModel",
    "easyanimate-v5-control": "EasyAnimateTransformer3DModel",
    "cogvideox-fun": "CogVideoXTransformer3DModel",
}


def rounded(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().float()


def export_to(output: Path, spec: FamilySpec, form: str) -> None:
    checkpoint = straight(spec.name, "single").last_checkpoint()
    base = Path("vfun-demo") / spec.name / "model" / Path(spec.model.config_file).parent
    export(
        checkpoint,
        output,
        base_dir=base,
        names=spec.export.names["same"],
        output_names=unchanged if form == "same" else spec.export.names[form],
        overwrite=True,
    )


def model_directory_with_the_export(spec: FamilySpec, folder: Path) -> Path:
    """A copy of the released directory whose transformer files are those of the export."""
    target = folder / "model"
    shutil.copytree(Path("vfun-demo") / spec.name / "model", target)
    transformer = target / Path(spec.model.config_file).parent
    for old in transformer.glob("*.safetensors*"):
        old.unlink()
    export_to(folder / "export", spec, "same")
    for new in (folder / "export").iterdir():
        shutil.copy2(new, transformer / new.name)
    return target


def adapter_from(spec: FamilySpec, model_dir: Path) -> ModelAdapter:
    given = {**memorised(spec.name), "mixed_precision": "no", "pretrained_model_name_or_path": model_dir}
    config = resolve("train", spec, given, demo=demo_default.make(spec), environ={}).config
    return adapter_of(spec).from_pretrained(adapter_options(config, spec, torch.device("cpu")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_predicts_like_the_trained_weights(
    family: str, trained: Callable[[str], None], tmp_path: Path
) -> None:
    trained("single")
    spec = families.find(family)
    run = RunDir(straight(family, "single").folder)
    loaded = adapter_from(spec, model_directory_with_the_export(spec, tmp_path))
    live = adapter_from(spec, Path("vfun-demo") / family / "model")
    weights = open_checkpoint(straight(family, "single").last_checkpoint()).weights
    with torch.no_grad():
        for name, parameter in live.transformer.named_parameters():
            source = weights[name].read() if name in weights else parameter.numpy()  # frozen ones are in no checkpoint
            parameter.copy_(rounded(source))

    expected = prediction_of(live, live.transformer, spec, run)
    torch.testing.assert_close(prediction_of(loaded, loaded.transformer, spec, run), expected, rtol=0, atol=1e-6)


def prediction_of(
    adapter: ModelAdapter,
    transformer: Any,
    spec: FamilySpec,
    run: RunDir,
    reshape: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """What a transformer says of the run's first clip, its latents reshaped."""
    described = run.read_run()
    config = RunConfig.from_json(described["config"])
    plan = load_plan(config, spec, described)
    batch = next(micro_batches(plan, row_reader(config, spec), rank=0, first_step=0))
    options = adapter_options(config, spec, torch.device("cpu"))
    samples = [prepared(adapter_of(spec).inputs(each, options)) for each in batch.requests]
    with torch.no_grad():
        latents, conditions = encode(adapter, samples, batch_keys(batch.requests))
        conditions.pop("loss_mask", None)
        conditions = {name: reshape(value) for name, value in conditions.items()}
        return adapter.predict(transformer, reshape(latents), torch.tensor([500]), conditions)


def through_peft(transformer: Any, folder: Path, spec: FamilySpec) -> Any:
    return PeftModel.from_pretrained(transformer, str(folder)).base_model.model


def through_diffusers(transformer: Any, folder: Path, spec: FamilySpec) -> Any:
    transformer.load_lora_adapter(load_file(folder / "pytorch_lora_weights.safetensors"), prefix="transformer")
    return transformer


def by_key(transformer: Any, folder: Path, spec: FamilySpec) -> Any:
    """What ComfyUI and the originals' inference do: W + alpha / rank B A, of a joint layer its rows."""
    tensors = load_file(next(folder.glob("*.safetensors")))
    comfyui = any(key.startswith("diffusion_model.") for key in tensors)
    dims = spec.model.read_dims(
        json.loads((Path("vfun-demo") / spec.name / "model" / spec.model.config_file).read_text())
    )
    used = set()
    for layer, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        location = LayerLocation(name=released_layer(layer, spec.export.names["same"]))
        if comfyui and spec.export.comfyui_location is not None and "blocks." in layer:
            location = spec.export.comfyui_location(layer, dims)
        name = f"diffusion_model.{location.name}" if comfyui else f"lora_unet__{location.name.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            used.add(name)
            rows = slice(location.first_row, location.first_row + module.out_features)
            up, down = tensors[f"{name}.lora_up.weight"].float(), tensors[f"{name}.lora_down.weight"].float()
            module.weight.data += tensors[f"{name}.alpha"] / len(down) * up[rows] @ down
    assert used == {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    return transformer


READERS = {"peft": through_peft, "diffusers": through_diffusers, "comfyui": by_key, "original": by_key}
LORA_FORMATS = [(spec.name, form) for spec in families.FAMILIES.values() for form in spec.export.lora_formats]


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA of the matrix, and what its model predicts."""

    checkpoint: Path
    expected: Tensor


@pytest.fixture(scope="module")
def trained_lora(trained: Callable[[str], None]) -> Callable[[str], TrainedLora]:
    """Of a family, with W + alpha / rank B A by hand in every layer; rank 64, alpha 32."""

    @cache
    def of(family: str) -> TrainedLora:
        trained("single")
        spec, run = families.find(family), straight(family, "single", "lora")
        live = adapter_from(spec, Path("vfun-demo") / family / "model")
        untrained = prediction_of(live, live.transformer, spec, RunDir(run.folder))
        pairs = open_adapter(run.last_checkpoint()).pairs
        for layer, pair in pairs.items():
            update = 0.5 * rounded(pair.up.read()) @ rounded(pair.down.read())
            live.transformer.get_submodule(layer).weight.data += update
        expected = prediction_of(live, live.transformer, spec, RunDir(run.folder))
        assert len(pairs) > 5 and (expected - untrained).abs().max() > 1e-3
        return TrainedLora(run.last_checkpoint(), expected)

    return of


@pytest.mark.parametrize(("family", "form"), LORA_FORMATS)
def test_a_trained_lora_predicts_the_same_in_every_format(
    family: str, form: str, trained_lora: Callable[[str], TrainedLora], tmp_path: Path
) -> None:
    spec, lora = families.find(family), trained_lora(family)
    argv = ["export-bf16", str(lora.checkpoint), "--format", form, "--output", str(tmp_path / "out"), "--json"]
    done = vfun_here(*argv)
    assert done.code == 0, done.err
    adapter = adapter_from(spec, Path("vfun-demo") / family / "model")
    transformer = READERS[form](adapter.transformer, tmp_path / "out", spec)
    found = prediction_of(adapter, transformer, spec, RunDir(lora.checkpoint.parent))
    torch.testing.assert_close(found, lora.expected, rtol=0, atol=1e-5)


def native_size(values: Tensor) -> Tensor:
    """Latents of 60 x 90: the size at which diffusers' own positions of CogVideoX and EasyAnimate are right too."""
    return nn.functional.interpolate(values, (values.shape[2], 60, 90)) if values.dim() == 5 else values


def as_ours(family: str, theirs: Any) -> Any:
    """diffusers' model under the call that the family's adapter makes."""
    if family != "cogvideox-fun":
        return theirs
    return lambda latents, text, timesteps: theirs(latents, text, timesteps, return_dict=False)[0]


@pytest.mark.parametrize("family", sorted(DIFFUSERS_CLASSES))
def test_the_export_loads_with_diffusers_and_predicts_the_same(
    family: str, trained: Callable[[str], None], tmp_path: Path
) -> None:
    trained("single")
    spec = families.find(family)
    export_to(tmp_path / "export", spec, "diffusers")
    kind = getattr(importlib.import_module("diffusers"), DIFFUSERS_CLASSES[family])
    theirs, report = kind.from_pretrained(tmp_path / "export", output_loading_info=True, low_cpu_mem_usage=False)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weights = open_checkpoint(straight(family, "single").last_checkpoint()).weights
    loaded, released, renamed = (
        dict(theirs.named_parameters()),
        spec.export.names["same"],
        spec.export.names["diffusers"],
    )
    assert len(weights) > 20
    for name, source in weights.items():
        torch.testing.assert_close(loaded[renamed(released(name))].float(), rounded(source.read()), rtol=0, atol=0)

    run = RunDir(straight(family, "single").folder)
    adapter = adapter_from(spec, model_directory_with_the_export(spec, tmp_path))
    expected = prediction_of(adapter, adapter.transformer, spec, run, native_size)
    found = prediction_of(adapter, as_ours(family, theirs.float().eval()), spec, run, native_size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
