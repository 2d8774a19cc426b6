"""git-lfs pointers in the place of a model's or a LoRA's files are called that, wherever such a file is opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfun_cli.checkpoints.lora_files import read_adapter
from vfun_cli.checkpoints.released import check_weights, read_index
from vfun_cli.errors import CheckpointError
from vfun_cli.families import find
from vfun_cli.families.detect import read_dims
from vfun_cli.lfs import START
from vfun_cli.modeling.weights import load_pth, read_json, safetensors_files


def dims(file: Path) -> Any:
    return read_dims(find("wan-s2v"), file.parent)


OPENED: list[tuple[str, Callable[[Path], Any]]] = [
    ("diffusion_pytorch_model.safetensors", lambda file: safetensors_files(file.parent)),
    ("lora.safetensors", read_adapter),
    ("model.safetensors.index.json", read_index),
    ("Wan2.1_VAE.pth", load_pth),
    ("config.json", read_json),
    ("config.json", dims),
    *((name, lambda file: check_weights(file.parent)) for name in ("a.safetensors", "a.pth", "spiece.model", "a.txt")),
]


@pytest.mark.parametrize(("name", "opening"), OPENED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(OPENED)])
def test_a_pointer_is_called_that(name: str, opening: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(START + b"\noid sha256:0\nsize 12345678\n")
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer") as caught:
        opening(tmp_path / name)
    assert "git lfs pull in" in (caught.value.hint or "")


def test_pointers_of_pictures_beside_a_model_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "example.mp4").write_bytes(START)
    assert check_weights(tmp_path) == 0
