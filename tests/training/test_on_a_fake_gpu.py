"""A whole step of every family on a made-up CUDA device: host and device never wait for each other."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, LiveModel
from torch import nn
from torch.distributed.utils import _to_kwargs
from trainer_parts import Parts, loaded

from tests.fake_cuda import HostTraffic, made_up_cuda
from vfun_cli.config.resolve import resolve
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training.lora import add_adapters

LIVE = Callable[[str], LiveModel]


def moved_by_the_wrapper(model: nn.Module, device: torch.device) -> None:
    """As DDP and FSDP do it with whatever tensor a forward pass is given."""

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        (args,), (kwargs,) = _to_kwargs(args, kwargs, device, False)
        return args, kwargs

    model.register_forward_pre_hook(move, with_kwargs=True)


@pytest.mark.parametrize("command", ["train", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device(
    family: str, command: str, live_model: LIVE, tmp_path: Path, device_restored: None
) -> None:
    live = live_model(family)
    request, sample = live.cached(*SMALL)
    model = live.transformer()
    if command == "lora":
        add_adapters(model, resolve("lora", live.spec, {}, environ={}).config, live.spec, live.dims)
    model.to("meta")
    with made_up_cuda() as device:
        moved_by_the_wrapper(model, device)
        adapter: Any = copy.copy(live.adapter)
        adapter.encoders = Encoders({}, device)
        parts = Parts(tmp_path, model, live, adapter, live.objective)
        pending = parts.trainer.enqueue(0, [loaded(0, [request], [sample])])
        assert pending.ranks.device == device and pending.ranks.shape == (1, 12)
        with pytest.raises(HostTraffic):
            pending.ranks.cpu()
