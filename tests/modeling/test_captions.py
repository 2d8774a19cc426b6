"""What the text encoders get of a row's text, and how much of it they read."""

import importlib
from typing import Any

import pytest
import torch

from vfun_cli.families import FAMILIES
from vfun_cli.modeling.adapter import AdapterOptions, Inputs, SampleRequest
from vfun_cli.modeling.randomness import SampleKey

FILES = {name: f"{name}.mp4" for name in ("file_path", "control_file_path", "audio_path")}


def adapter(family: str) -> Any:
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(importlib.import_module(module), name)


def inputs(family: str, epoch: int, **text: str) -> Inputs:
    request = SampleRequest(
        key=SampleKey(0, epoch, 0), record={**FILES, **text}, kind="video", frames=5, height=64, width=64, stride=1,
        total_frames=20, fps=(8, 1),
    )  # fmt: skip
    options = AdapterOptions(
        model_dir=None, compute_dtype=torch.float32, device=torch.device("cpu"),
        model_settings={"add_noise_in_inpaint_model": False},
    )  # fmt: skip
    found: Inputs = adapter(family).inputs(request, options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_text_trains_with_an_empty_caption(family: str) -> None:
    assert all(inputs(family, epoch) == inputs(family, epoch, text="") for epoch in range(4))
    assert any(inputs(family, epoch) != inputs(family, epoch, text="A dog.") for epoch in range(4))
