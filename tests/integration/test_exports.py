"""Exported directories load where people load them and predict what was trained, rounded to bf16."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.integration.matrix import memorised, straight
from vfun_cli import families
from vfun_cli.checkpoints.export import export
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.demo import default as demo_default
from vfun_cli.families.spec import FamilySpec, unchanged
from vfun_cli.resolve import resolve
from vfun_cli.rundir import RunDir
from vfun_cli.runplan import load_plan
from vfun_cli.training.adapter import ModelAdapter
from vfun_cli.training.data import batch_keys
from vfun_cli.training.encoding import encode, prepared
from vfun_cli.training.session import adapter_of, adapter_options, load_options
from vfun_cli.training.stream import micro_batches

pytestmark = pytest.mark.slow

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
    base = Path("vfun-demo") / spec.name / "model" / Path(spec.config_file).parent
    export(
        checkpoint,
        output,
        base_dir=base,
        names=spec.export_names["same"],
        output_names=unchanged if form == "same" else spec.export_names[form],
        overwrite=True,
    )


def model_directory_with_the_export(spec: FamilySpec, folder: Path) -> Path:
    """A copy of the released directory whose transformer files are those of the export."""
    target = folder / "model"
    shutil.copytree(Path("vfun-demo") / spec.name / "model", target)
    transformer = target / Path(spec.config_file).parent
    for old in transformer.glob("*.safetensors*"):
        old.unlink()
    export_to(folder / "export", spec, "same")
    for new in (folder / "export").iterdir():
        shutil.copy2(new, transformer / new.name)
    return target


def adapter_from(spec: FamilySpec, model_dir: Path) -> tuple[ModelAdapter, Any]:
    given = {**memorised(spec.name), "mixed_precision": "no", "pretrained_model_name_or_path": model_dir}
    config = resolve("train", spec, given, demo=demo_default.make(spec), environ={}).config
    return adapter_of(spec).from_pretrained(adapter_options(config, torch.device("cpu"))), config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_predicts_like_the_trained_weights(
    family: str, trained: Callable[[str], None], tmp_path: Path
) -> None:
    trained("single")
    spec = families.find(family)
    run = RunDir(straight(family, "single").folder)
    loaded, config = adapter_from(spec, model_directory_with_the_export(spec, tmp_path))
    live, _ = adapter_from(spec, Path("vfun-demo") / family / "model")
    weights = open_checkpoint(straight(family, "single").last_checkpoint()).weights
    with torch.no_grad():
        for name, parameter in live.transformer.named_parameters():
            source = weights[name].read() if name in weights else parameter.numpy()  # frozen ones are in no checkpoint
            parameter.copy_(rounded(source))

    plan = load_plan(config, spec, run.read_run())
    batch = next(micro_batches(plan, rank=0, first_step=0))
    samples = [prepared(adapter_of(spec).inputs(each, load_options(config, spec))) for each in batch.requests]
    predictions = []
    for adapter in (live, loaded):
        with torch.no_grad():
            latents, conditions = encode(adapter, samples, batch_keys(batch.requests))
            conditions.pop("loss_mask", None)
            predictions.append(adapter.predict(adapter.transformer, latents, torch.tensor([500]), conditions))
    torch.testing.assert_close(predictions[1], predictions[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", sorted(DIFFUSERS_CLASSES))
def test_the_export_loads_with_diffusers(family: str, trained: Callable[[str], None], tmp_path: Path) -> None:
    trained("single")
    spec = families.find(family)
    export_to(tmp_path / "export", spec, "diffusers")
    kind = getattr(importlib.import_module("diffusers"), DIFFUSERS_CLASSES[family])
    model, report = kind.from_pretrained(tmp_path / "export", output_loading_info=True, low_cpu_mem_usage=False)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weights = open_checkpoint(straight(family, "single").last_checkpoint()).weights
    found = dict(model.named_parameters())
    assert len(set(weights) & set(found)) > 0.9 * len(weights)
    for name in set(weights) & set(found):
        torch.testing.assert_close(found[name].float(), rounded(weights[name].read()), rtol=0, atol=0)
