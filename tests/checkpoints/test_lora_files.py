"""How strong a LoRA file says it is, in every style that programs write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vfun_cli.checkpoints.lora_files import read_adapter
from vfun_cli.errors import CheckpointError

LAYERS = ("blocks.0.to_q", "blocks.1.to_q")
RANK = 4


def write(file: Path, prefix: str, *, words: tuple[str, str] = ("lora_A", "lora_B"), **metadata: Any) -> Path:
    tensors = {
        f"{prefix}{layer}.{word}.weight": np.ones(shape, np.float32)
        for layer in LAYERS
        for word, shape in zip(words, ((RANK, 8), (8, RANK)), strict=True)
    }
    save_file(tensors, file, metadata)
    return file


def scales(file: Path) -> list[float | None]:
    adapter = read_adapter(file)
    return [adapter.scale(adapter.pairs[layer]) for layer in LAYERS]


def test_what_diffusers_writes_into_the_header_counts(tmp_path: Path) -> None:
    stated = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {}})
    file = write(tmp_path / "pytorch_lora_weights.safetensors", "transformer.", lora_adapter_metadata=stated)
    assert scales(file) == [0.5, 0.5]


@pytest.mark.parametrize("stated", ["{", "[]", '{"transformer.r": 4}'])
def test_a_damaged_statement_in_the_header_is_an_error(stated: str, tmp_path: Path) -> None:
    file = write(tmp_path / "pytorch_lora_weights.safetensors", "transformer.", lora_adapter_metadata=stated)
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is damaged"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("transformer.", ("lora_A", "lora_B")),
        ("diffusion_model.", ("lora_A", "lora_B")),
        ("diffusion_model.", ("lora_down", "lora_up")),
    ],
)
def test_without_an_alpha_diffusers_and_comfyui_take_one(prefix: str, words: tuple[str, str], tmp_path: Path) -> None:
    assert scales(write(tmp_path / "any.safetensors", prefix, words=words)) == [1.0, 1.0]


def test_a_peft_file_without_its_configuration_does_not_say(tmp_path: Path) -> None:
    assert scales(write(tmp_path / "any.safetensors", "base_model.model.")) == [None, None]


@pytest.mark.parametrize(("rslora", "expected"), [(False, [1.0, 2.0]), (True, [2.0, 4.0])])
def test_layers_of_another_alpha_have_their_own(rslora: bool, expected: list[float], tmp_path: Path) -> None:
    file = write(tmp_path / "adapter_model.safetensors", "base_model.model.")
    content = {"lora_alpha": 4, "use_rslora": rslora, "alpha_pattern": {"1.to_q": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert scales(file) == expected
