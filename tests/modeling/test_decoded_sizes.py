"""What the plan says that a clip takes decoded, against what the adapters decode."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vfun_cli import families
from vfun_cli.families import adapter_of
from vfun_cli.modeling import inputs as lazy
from vfun_cli.modeling.adapter import AdapterOptions, SampleRequest
from vfun_cli.modeling.pixels import Pieces
from vfun_cli.modeling.randomness import SampleKey

SIZE, FRAMES = 128, 16


def read_frames(path: str, indices: Sequence[int], height: int, width: int) -> Tensor:
    return torch.empty(len(indices), 3, height, width, dtype=torch.uint8)


def read_audio(path: str, start: Fraction, duration: Fraction, rate: int) -> Any:
    return np.zeros(round(duration * rate), np.float32)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.parts if isinstance(value, Pieces) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_clip_takes_at_most_what_its_family_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = families.find(family)
    monkeypatch.setattr(lazy, "read_frames", read_frames)
    monkeypatch.setattr(lazy, "read_audio", read_audio)
    frames = spec.plan.frame_rule.round_down(FRAMES)
    taken = []
    for mode, row in product(spec.train_modes or (None,), range(4)):  # drops and histories are drawn
        options = AdapterOptions(
            model_dir=Path(), compute_dtype=torch.float32, device=torch.device("cpu"), train_mode=mode,
            model_settings=dict.fromkeys(spec.model.input_settings, True),
        )  # fmt: skip
        request = SampleRequest(
            key=SampleKey(seed=0, epoch=0, row=row), kind="video", frames=frames, height=SIZE, width=SIZE, stride=1,
            record={field.name: "file" for field in spec.fields}, total_frames=300, fps=(16, 1),
        )  # fmt: skip
        made = adapter_of(spec).inputs(request, options)
        values = lazy.load_inputs({name: each.lazy for name, each in made.items()})
        taken.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors(list(values.values()))))
    said = spec.plan.decoded_frames(frames) * 3 * SIZE**2
    assert 0.8 * said < max(taken) <= said
