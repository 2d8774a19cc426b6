"""Frozen blocks that wait in host memory: the same losses and gradients to the bit, few of them on the device."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from live_models import FAMILIES, SMALL, TALL, LiveModel
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.training.blocks import find_layers
from vfun_cli.training.frozen import FrozenLinear
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import prepare_blocks
from vfun_cli.training.quantised import quantise_layers
from vfun_cli.training.streaming import RING, BlockStream, spread, stream_blocks

LIVE = Callable[[str], LiveModel]
CPU = torch.device("cpu")
PRECISIONS = ("bf16", "fp8", "nf4")
HOW = ("none", "block", "selective")


def with_adapters(live: LiveModel, how: str = "block", **options: Any) -> nn.Module:
    """A transformer in bf16 whose adapters have an effect."""
    model = live.transformer()
    config = resolve("lora", live.spec, {"rank": 4, **options}, environ={}).config
    add_adapters(model, config, live.spec, live.dims)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
        if ".lora_B" in name:
            weight.data.normal_(std=0.05)
    plan: Any = SimpleNamespace(spec=live.spec)
    prepare_blocks(RunConfig(strategy="single", gradient_checkpointing=how, mixed_precision="bf16"), plan, model)
    return model


def streamed(live: LiveModel, model: nn.Module, resident: int, precision: str) -> BlockStream:
    blocks = find_layers(model, live.spec.model.block_classes)
    return stream_blocks(blocks, resident, precision, CPU)


def steps(live: LiveModel, model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of passes with and without a gradient, among one another, and the sums of the gradients."""
    losses = []
    for shape, trains in ((SMALL, True), (TALL, False), (TALL, False), (TALL, True), (SMALL, True)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(trains):
            loss = live.loss(model, live.inputs(*shape).to(torch.bfloat16))
        if trains:
            loss.backward()
        losses.append(loss.detach())
    return losses, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def require_same(found: tuple[list[Tensor], dict[str, Tensor]], expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True)), (found, expected)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_blocks_give_the_same_losses_and_gradients_to_the_bit(family: str, how: str, live_model: LIVE) -> None:
    live = live_model(family)
    expected = steps(live, with_adapters(live, how))
    model = with_adapters(live, how)
    stream = streamed(live, model, 0, "bf16")
    assert len(stream.blocks) == live.spec.model.blocks(live.dims)
    require_same(steps(live, model), expected)
