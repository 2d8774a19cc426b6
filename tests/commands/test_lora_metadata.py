"""The header of exported LoRA files, as other programs read it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.commands.conftest import Vfun
from vfun_cli import families
from vfun_cli.checkpoints import manifest

FORMS = tuple(families.find("wan-fun-control").export.lora_formats)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A LoRA of one layer at step 300, of a model in a folder whose path is nobody's business."""
    folder = tmp_path / "run" / "checkpoint-300"
    (folder / "model").mkdir(parents=True)
    layer = "base_model.model.blocks.0.attn1.to_q.lora_{}.weight"
    save_file(
        {layer.format("A"): torch.ones(4, 8), layer.format("B"): torch.ones(8, 4)},
        folder / "model/adapter_model.safetensors",
    )
    (folder / "model/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    config = {
        "pretrained_model_name_or_path": "/home/someone/secret/Wan2.1-Fun-V1.1-14B-Control", "num_processes": 1,
        "gradient_accumulation_steps": 1, "max_train_steps": 500, "seed": 43, "learning_rate": 1e-4,
    }  # fmt: skip
    state = {"schema": 1, "family": "wan-fun-control", "kind": "lora", "step": 300, "strategy": "single",
             "world_size": 1, "run_config": config}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    manifest.write_manifest(folder)
    return folder


def exported(vfun: Vfun, checkpoint: Path, output: Path, *more: str) -> Path:
    said = vfun("export-bf16", str(checkpoint), "--output", str(output), *more)
    assert said.code == 0, said.err
    return next(output.glob("*.safetensors"))


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("form", FORMS)
def test_every_format_says_what_it_is(form: str, checkpoint: Path, tmp_path: Path, vfun: Vfun) -> None:
    file = exported(vfun, checkpoint, tmp_path / "one", "--format", form)
    said = header(file)
    assert said["format"] == "pt"
    assert said["modelspec.sai_model_spec"] == "1.0.0" and said["modelspec.architecture"] == "wan2.1/lora"
    assert said["ss_sd_model_name"] == "Wan2.1-Fun-V1.1-14B-Control"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_steps"]) == ("4", "2", "300")
    saved = (checkpoint / "state.json").stat().st_mtime
    assert float(said["ss_training_finished_at"]) == int(saved) and said["modelspec.date"].endswith("Z")
    raw = file.read_bytes()
    content = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert (said["modelspec.hash_sha256"], said["sshs_model_hash"]) == (f"0x{content}", content)
    assert not any("secret" in value or "/home" in value for value in said.values())
    again = exported(vfun, checkpoint, tmp_path / "two", "--format", form)
    assert again.read_bytes() == raw


def test_it_can_be_left_out(checkpoint: Path, tmp_path: Path, vfun: Vfun) -> None:
    file = exported(vfun, checkpoint, tmp_path / "out", "--format", "comfyui", "--no-lora-metadata")
    assert header(file) == {"format": "pt"}
