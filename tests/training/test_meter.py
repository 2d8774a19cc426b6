"""The meter: FLOPs as torch counts them on the live models, and peaks of devices by their names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, TALL, Inputs, LiveModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.families.spec import ModelDims
from vfun_cli.plan.flops import Costs, peak_of
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.meter import peak_flops, trained_share

LIVE = Callable[[str], LiveModel]
LAYERS = {"train": 16, "lora": 40}
"""Of the counted models: in the demos' two, the gradient of the inputs, which nobody computes, is up to 8 %. Below the
first adapters nothing is computed backwards at all, which is a layer's share of a LoRA; released models have 40."""


def grown(live: LiveModel, command: str) -> tuple[nn.Module, ModelDims]:
    """The demo's transformer with more layers, without weights."""
    small: Any = live.transformer()
    layers = LAYERS[command]
    changes: dict[str, Any] = {"num_layers": layers}
    if live.spec.name == "wan-s2v":
        changes["audio_inject_layers"] = list(range(0, layers, 2))
    config = {name: value for name, value in small.config.items() if not name.startswith("_")} | changes
    own = {"has_reference": True} if live.spec.name == "wan-fun-control" else {}
    with torch.device("meta"):
        model = type(small)(**config, **own)
    released = {"dim": live.dims.dim, "ffn_dim": live.dims.ffn_dim, "in_dim": 48, "add_ref_conv": True, "image_dim": 32}
    dims = live.spec.model.read_dims(
        {**config, **(released | changes if own else {}), "text_dim": config.get("text_dim")}
    )
    return model.train(), dims


def counted(live: LiveModel, model: nn.Module, inputs: Inputs) -> float:
    """FLOPs of forward and backward. The fused CPU attention has no entry in torch's counter, its parts have."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        live.adapter.predict(model, inputs.noisy, inputs.timesteps, dict(inputs.conditions)).float().mean().backward()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "high", "wide"),
    [(TALL, 1, 2), *(pytest.param(SMALL, *times, marks=pytest.mark.long) for times in [(1, 1), (2, 4)])],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_training_are_those_of_the_live_model(
    family: str, shape: tuple[int, int, int], high: int, wide: int, live_model: LIVE
) -> None:
    live = live_model(family)
    inputs = live.inputs(*shape).enlarged(high, wide)
    model, dims = grown(live, "train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(live.spec.model.modules_without_gradient(dims)))
    share = trained_share(model)
    cost = Costs(spec=live.spec, dims=dims, share=share).of(
        inputs.shape.frames, inputs.shape.height, inputs.shape.width
    )
    assert cost.flops == pytest.approx(counted(live, model, inputs), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=[pytest.mark.long] * (family not in ("wan-s2v", "cogvideox-fun", "hunyuanvideo-i2v"))
        )
        for family in FAMILIES
    ],
)
def test_flops_of_lora_training_leave_out_the_frozen_weights_gradients(family: str, live_model: LIVE) -> None:
    live = live_model(family)
    inputs = live.inputs(*SMALL).enlarged(16, 16)  # as many tokens against the text's as 512 x 512 pixels have
    model, dims = grown(live, "lora")
    targets = resolve("lora", live.spec, {}, demo=None, environ={}).config.target_name
    with torch.device("meta"):
        add_adapters(model, RunConfig(rank=4, network_alpha=4.0, target_name=targets), live.spec, dims)
    share = trained_share(model)
    assert 0 < share.trained == share.added < share.base
    cost = Costs(spec=live.spec, dims=dims, share=share).of(
        inputs.shape.frames, inputs.shape.height, inputs.shape.width
    )
    assert cost.flops == pytest.approx(counted(live, model, inputs), rel=0.02)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H800 NVL", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_known_by_its_name_or_has_no_peak(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_stated_peak_goes_before_the_table_and_a_cpu_has_none() -> None:
    assert peak_flops(torch.device("cpu"), 1.5) == 1.5e12
    assert peak_flops(torch.device("cpu"), None) is None
