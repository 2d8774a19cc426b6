"""A released model directory of full size that takes no disk: sparse files of real headers."""

import json
from pathlib import Path
from typing import Any

import torch

from vfun_cli import families
from vfun_cli.families import adapter_of
from vfun_cli.modeling.adapter import AdapterOptions


def write_released(family: str, folder: Path, **changed: Any) -> Path:
    """The transformer of the largest release, its weights all zero bytes that no disk holds."""
    spec = families.find(family)
    stated = {**spec.model.released, **changed}
    options = AdapterOptions(model_dir=folder, compute_dtype=torch.bfloat16, device=torch.device("cpu"))
    blank = adapter_of(spec).blank(stated, options).transformer
    entries, end = {}, 0
    for name, weight in blank.named_parameters():
        size = 2 * weight.numel()
        entries[spec.export.names["same"](name)] = {
            "dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    header = json.dumps(entries).encode()
    config = folder / spec.model.config_file
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(stated))
    with (config.parent / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder
