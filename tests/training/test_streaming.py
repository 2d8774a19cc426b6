"""Frozen blocks that wait in host memory: the same losses and gradients to the bit, few of them on the device."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, TALL, LiveModel
from torch import Tensor, nn
from torch.nn import functional as F

from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.errors import FitError
from vfun_cli.training.blocks import find_blocks, find_layers
from vfun_cli.training.frozen import FrozenLinear, WholeLinear
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import prepare_blocks
from vfun_cli.training.quantised import quantise_layers
from vfun_cli.training.streaming import RING, BlockStream, spread, stream_blocks

LIVE = Callable[[str], LiveModel]
Found = tuple[list[Tensor], dict[str, Tensor]]
CPU = torch.device("cpu")
ADDED = 3
"""Blocks: the demos have two of a kind, as many as the ring has slots."""


def with_adapters(live: LiveModel, how: str = "block", **options: Any) -> nn.Module:
    """A deeper transformer in bf16, no block like another, whose adapters have an effect."""
    model = live.transformer()
    torch.manual_seed(0)
    for name, blocks in list(model.named_children()):
        if isinstance(blocks, nn.ModuleList) and type(blocks[0]).__name__ in live.spec.model.block_classes:
            added = [copy.deepcopy(blocks[0]) for _ in range(ADDED)]
            setattr(model, name, nn.ModuleList([*added, *blocks]))
            for weight in (weight for block in added for weight in block.parameters()):
                weight.data += 0.02 * torch.randn(weight.shape)
    config = resolve("lora", live.spec, {"rank": 4, **options}, environ={}).config
    add_adapters(model, config, live.spec, replace(live.dims, num_layers=live.dims.num_layers + ADDED))
    for name, weight in model.named_parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
        if ".lora_B" in name:
            weight.data.normal_(std=0.05)
    plan: Any = SimpleNamespace(spec=live.spec)
    prepare_blocks(RunConfig(strategy="single", gradient_checkpointing=how, mixed_precision="bf16"), plan, model)
    return model


def streamed(live: LiveModel, model: nn.Module, resident: int = 0, precision: str = "bf16") -> BlockStream:
    return stream_blocks(find_layers(model, live.spec.model.block_classes), resident, precision, CPU)


def steps(live: LiveModel, model: nn.Module) -> Found:
    """Losses of passes with and without a gradient, among one another, and the sums of the gradients."""
    losses = []
    for shape, trains in ((SMALL, True), (TALL, False), (TALL, False), (SMALL, True)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(trains):
            loss = live.loss(model, live.inputs(*shape).to(torch.bfloat16))
        if trains:
            loss.backward()
        losses.append(loss.detach())
    return losses, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def require_same(found: Found, expected: Found) -> None:
    assert [loss.item() for loss in found[0]] == [loss.item() for loss in expected[0]]
    assert found[1].keys() == expected[1].keys() and any(each.any() for each in expected[1].values())
    assert not [name for name, gradient in expected[1].items() if not torch.equal(found[1][name], gradient)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "block", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_blocks_give_the_same_losses_and_gradients_to_the_bit(family: str, how: str, live_model: LIVE) -> None:
    live = live_model(family)
    expected = steps(live, with_adapters(live, how))
    model = with_adapters(live, how)
    stream = streamed(live, model)
    assert len(stream.blocks) >= live.spec.model.blocks(live.dims) + ADDED > len(stream.slots) == RING
    require_same(steps(live, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@pytest.mark.parametrize("family", ["wan-s2v", "hunyuanvideo-t2v"])
def test_quantised_blocks_are_streamed_as_codes_and_scales(family: str, precision: str, live_model: LIVE) -> None:
    live = live_model(family)
    model = with_adapters(live)
    quantise_layers(model, precision, CPU)
    expected = steps(live, model)
    model = with_adapters(live)
    stream = streamed(live, model, 1, precision)
    quantise_layers(model, precision, CPU)
    assert {place.dtype for block in stream.blocks for place in block.places} == {torch.uint8, torch.float32}
    require_same(steps(live, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_dora": True, "lora_dropout": 0.2}, {"lora_dropout": 0.2}]
)
@pytest.mark.parametrize("how", ["none", "block"])
def test_dora_and_dropout_see_the_weights_of_their_block(how: str, options: dict[str, Any], live_model: LIVE) -> None:
    live = live_model("cogvideox-fun")
    expected = steps(live, with_adapters(live, how, **options))
    model = with_adapters(live, how, **options)
    streamed(live, model)
    require_same(steps(live, model), expected)


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_most_the_blocks_that_stay_and_those_of_the_ring_are_on_the_device(
    family: str, resident: int, live_model: LIVE, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model(family)
    model = with_adapters(live, "none")
    blocks = find_layers(model, live.spec.model.block_classes)
    before = [frozen_matrices(modules) for modules in blocks]
    stream = streamed(live, model, resident)
    asked, there = list[int](), list[set[int]]()
    parts = FrozenLinear.parts

    def noted(layer: FrozenLinear) -> Any:
        found = parts(layer)
        memories = [slot.memory.untyped_storage().data_ptr() for slot in stream.slots]
        assert all(part.untyped_storage().data_ptr() in memories for part in found)
        asked.append(stream.slots[-1].block or 0)
        there.append({slot.block for slot in stream.slots if slot.block is not None})
        return found

    monkeypatch.setattr(FrozenLinear, "parts", noted)
    steps(live, model)
    assert set(asked) == set(range(len(blocks) - resident)) and max(map(len, there)) == RING
    on_device = [frozen_matrices(modules) for modules in blocks]
    assert sum(size > 0 for size in on_device) == resident  # as parameters
    assert stream.ring_bytes <= RING * (max(before) + 256 * len(list(model.modules())))
    assert stream.host_bytes >= sum(before) - sum(on_device)


def frozen_matrices(modules: tuple[nn.Module, ...]) -> int:
    """Bytes of the frozen weights of linear layers."""
    linear = (each for module in modules for each in module.modules() if isinstance(each, (nn.Linear, FrozenLinear)))
    weights = (weight for each in linear for weight in each.parameters(recurse=False) if weight.dim() == 2)
    return sum(weight.nbytes for weight in weights if not weight.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_keeps_on_the_device_of_its_frozen_weights_is_little(family: str, live_model: LIVE) -> None:
    """Of the widths that are released: here a norm is large beside a matrix."""
    live = live_model(family)
    model = with_adapters(live)
    streamed(live, model)
    for block in find_blocks(model, live.spec.model.block_classes):
        kept = [weight for weight in block.parameters() if not weight.requires_grad]
        assert max(weight.numel() / max(weight.shape) for weight in kept) <= 6, "norms, biases, a table of six rows"


def layers(count: int, width: int = 8) -> list[tuple[nn.Module, ...]]:
    torch.manual_seed(0)
    return [(nn.Sequential(nn.Linear(width, width).requires_grad_(False)),) for _ in range(count)]


def orders(stream: BlockStream, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Each block that is sent for, with the one that computes meanwhile; None where all wait for it."""
    found = list[tuple[int, int | None]]()
    fetch = BlockStream._fetch

    def noted(self: BlockStream, number: int) -> Any:
        found.append((number, self.now))
        return fetch(self, number)

    monkeypatch.setattr(BlockStream, "_fetch", noted)
    return found


def test_from_the_second_step_on_blocks_are_sent_for_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layers(5)
    stream = stream_blocks(made, 0, "bf16", CPU)
    fetched = orders(stream, monkeypatch)
    x = torch.ones(1, 8, requires_grad=True)

    def step() -> list[tuple[int, int | None]]:
        fetched.clear()
        y = x
        for (module,) in made:
            y = torch.tanh(module(y))
        y.sum().backward()
        return list(fetched)

    assert [now for _, now in step()[:5]] == [None] * 5, "nothing is known of the first pass"
    step()
    forward, backward = [(2, 1), (3, 2), (4, 3)], [(2, 3), (1, 2), (0, 1)]
    assert step() == forward + backward


def test_one_order_after_another_is_right_and_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layers(6)
    weights = [module[0].weight.detach().clone() for (module,) in made]  # type: ignore[index]
    stream = stream_blocks(made, 0, "bf16", CPU)
    fetched = orders(stream, monkeypatch)
    generator = torch.Generator().manual_seed(3)
    for order in [*(torch.randperm(6, generator=generator).tolist() for _ in range(20)), *[[3, 0, 5, 1]] * 3]:
        fetched.clear()
        for index in order:
            layer = made[index][0][0]  # type: ignore[index]
            assert isinstance(layer, WholeLinear) and torch.equal(layer.weight, weights[index])
    assert [block for block, now in fetched if now is None] == [], "all were there or on their way"


def test_a_weight_that_autograd_keeps_is_noticed_when_its_slot_is_used_again() -> None:
    made = layers(4)
    stream_blocks(made, 0, "bf16", CPU)
    x = torch.ones(1, 8, requires_grad=True)
    kept = F.linear(x, made[0][0][0].parts()[0]).sum()  # type: ignore[index]
    for (module,) in made[1:]:
        module(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_a_pass_that_ended_in_its_middle_leaves_nothing_wrong() -> None:
    made = layers(5)
    expected = nn.Sequential(*copy.deepcopy([module for (module,) in made]))
    stream_blocks(made, 1, "bf16", CPU)
    model, x = nn.Sequential(*(module for (module,) in made)), torch.ones(2, 8, requires_grad=True)
    (whole,) = torch.autograd.grad(expected(x).sum(), x)
    for _ in range(2):
        model[:3](x)
        (found,) = torch.autograd.grad(model(x).sum(), x)
        assert torch.equal(found, whole)


def test_host_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made, empty = layers(3), torch.empty

    def short(size: int, *given: Any, **options: Any) -> Tensor:
        if "pin_memory" in options:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, *given, **options)

    monkeypatch.setattr(torch, "empty", short)
    with pytest.raises(FitError, match=r"no more host memory can be pinned after 0\.0 GB: CUDA error"):
        stream_blocks(made, 0, "bf16", CPU)


def test_blocks_that_stay_are_spread_evenly() -> None:
    assert [sorted(spread(some, 40)) for some in (0, 1, 2, 4)] == [[], [20], [10, 30], [5, 15, 25, 35]]
    assert all(len(spread(some, of)) == some for of in range(1, 60) for some in range(of))
