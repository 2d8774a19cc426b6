"""What only an accelerator can show; skipped without one."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import LiveModel
from trainer_parts import Parts, loaded

from vfun_cli.training.data.encoding import load
from vfun_cli.training.model import adapter_of, adapter_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 4


@pytest.mark.parametrize("family", ["wan-s2v", "cogvideox-fun"])
def test_encoders_that_work_beside_the_step_give_the_losses_of_those_that_work_before_it(
    family: str, live_model: Callable[[str], LiveModel], tmp_path: Path, device_restored: None
) -> None:
    """``low_vram`` is what makes them wait; every step has another clip, so a late or reused tensor shows."""
    live, device, losses = live_model(family), torch.device("cuda"), {}
    kind, options = adapter_of(live.spec), adapter_options(live.config, live.spec, torch.device("cpu"))
    for low_vram in (False, True):
        setting = replace(adapter_options(live.config, live.spec, device), low_vram=low_vram)
        adapter: Any = copy.copy(live.adapter)
        adapter.encoders, adapter.options = kind.encoders_of(setting), setting
        folder = tmp_path / str(low_vram)
        folder.mkdir()
        model = live.transformer().to(device)
        parts = Parts(folder, model, live, adapter, live.objective, low_vram=low_vram)
        assert (parts.trainer.side_stream.stream is None) == low_vram
        requests = [live.request(row, 4, 64, 64) for row in range(STEPS)]
        parts.trainer.total_steps = STEPS
        parts.trainer.train(
            iter(loaded(step, [request], [load(kind, request, options)]) for step, request in enumerate(requests)),
            0,
        )
        losses[low_vram] = [line["loss"] for line in parts.lines()]
    assert losses[False] == pytest.approx(losses[True], rel=1e-4)
