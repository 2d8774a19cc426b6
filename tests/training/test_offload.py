"""What layers save goes to the host and comes back: little stays on the device, nothing waits, nothing is early.

That losses and gradients are the same to the bit: test_blocks.py.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, Inputs, LiveModel
from operations import Operations
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda import made_up_cuda
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.training import offload
from vfun_cli.training.blocks import checkpoint_blocks, compile_blocks
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import prepare_blocks
from vfun_cli.training.offload import Offload

aten = torch.ops.aten
LIVE = Callable[[str], LiveModel]
WAYS = ("none", "block", "attention", "selective")


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)


def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention in one kernel, as on a GPU; on ``meta`` torch takes it apart."""
    attended = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)
    result: Tensor = attended[0]
    return result


def with_more_blocks(live: LiveModel, more: int) -> nn.Module:
    """The demo's transformer with the first block of each stack so many times more; the last may be another kind."""
    model = live.transformer()
    for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
        if type(stack[0]).__name__ in live.spec.model.block_classes:
            for _ in range(more):
                stack.insert(0, copy.deepcopy(stack[0]))
    return model


def predicted(live: LiveModel, model: nn.Module, inputs: Inputs) -> Tensor:
    """A number that depends on everything; the loss has its target on the host."""
    return live.adapter.predict(model, inputs.noisy, inputs.timesteps, dict(inputs.conditions)).float().square().mean()


def of_each_way(family: str, how: str) -> Any:
    """One family in every way, every family in one; all others take long."""
    return pytest.param(family, how, marks=[pytest.mark.long] * (family != "wan-s2v" and how != "attention"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), [of_each_way(family, how) for family in FAMILIES for how in WAYS])
def test_what_stays_on_the_device_does_not_grow_with_the_layers_and_nothing_waits_for_it(
    family: str, how: str, live_model: LIVE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 30 layers of the smallest released model, one stays."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    live, more, growth = live_model(family), 3, dict[bool, int]()
    plan: Any = SimpleNamespace(spec=live.spec)
    inputs = live.inputs(*SMALL).enlarged(2, 2).to(torch.bfloat16)
    for moved in (False, True):
        left, weights = [], []
        config = RunConfig(strategy="ddp", gradient_checkpointing=how, activation_offload=moved, mixed_precision="bf16")
        for blocks in (0, more):
            model = with_more_blocks(live, blocks)
            prepare_blocks(config, plan, model)
            model.to("meta")
            with made_up_cuda():
                with Operations("meta") as forward:
                    loss = predicted(live, model, inputs)
                left.append(forward.left())
                weights.append(sum(weight.numel() for weight in model.parameters()))
                assert (forward.sent > 0) == moved
                if moved:
                    loss.backward()
        # Copies of weights stay where they are, 2 bytes each; what is computed again has none.
        growth[moved] = left[1] - left[0] - (2 * (weights[1] - weights[0]) if how == "none" else 0)
    assert growth[False] > 10_000 and growth[True] < 0.01 * growth[False], growth


@pytest.mark.slow
def test_a_second_step_takes_no_memory_of_the_host(live_model: LIVE) -> None:
    live = live_model("cogvideox-fun")
    model, taken = live.transformer(), list[int]()
    checkpoint_blocks(model, live.spec.model.block_classes, "none", offload=True)
    model.to("meta")
    inputs = live.inputs(*SMALL).to("meta")
    with made_up_cuda():
        for _ in range(2):
            with Operations("meta") as step:
                predicted(live, model, inputs).backward()
            taken.append(step.counts["host memory"])
    assert taken[0] > 10 and taken[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_weights_stay_where_they_are(backend: str | None, live_model: LIVE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a frozen base, too, which are saved for the gradients of what enters a layer."""
    torch._dynamo.reset()
    live, saved = live_model("cogvideox-fun"), set[int]()
    model = live.transformer()
    add_adapters(model, resolve("lora", live.spec, {}, environ={}).config, live.spec, live.dims)
    checkpoint_blocks(model, live.spec.model.block_classes, "none", compiled=backend is not None, offload=True)
    if backend is not None:
        compile_blocks(model, live.spec.model.block_classes, backend=backend)
    pack = Offload.pack

    def noting(moved: Offload, tensor: Tensor) -> Any:
        found = pack(moved, tensor)
        if not isinstance(found, Tensor):
            saved.add(tensor.untyped_storage().data_ptr())
        return found

    monkeypatch.setattr(Offload, "pack", noting)
    live.loss(model, live.inputs(*SMALL)).backward()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert len(saved) > 20 and not saved & weights


class LateStream:
    """The worst side stream there could be: what is copied on it arrives when the main stream waits for it, not before.

    Until then the place that it goes to holds no numbers, and what it is copied from must stay.
    """

    def __init__(self, device: torch.device, *, used: bool) -> None:
        self.device = device
        self.waiting: list[tuple[Tensor, StorageWeakRef, Tensor]] = []
        self.followed = False

    def follow(self) -> None:
        self.followed = True

    @contextmanager
    def context(self) -> Iterator[None]:
        assert self.followed, "the side stream would read what is not computed yet, or write what is still read"
        self.followed = False
        with _Later(self.waiting):
            yield

    def hand_over(self) -> None:
        for into, owner, source in self.waiting:
            assert not owner.expired(), "memory was let go while it was copied"
            into.copy_(source)
        self.waiting.clear()


class _Later(TorchDispatchMode):
    def __init__(self, waiting: list[Any]) -> None:
        super().__init__()
        self.waiting = waiting

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation is not aten.copy_.default:
            return operation(*arguments, **(named or {}))
        into, source = arguments[:2]
        self.waiting.append((into, StorageWeakRef(source.untyped_storage()), source))
        return into.fill_(255)  # the bytes of a NaN


@pytest.mark.slow
@pytest.mark.parametrize("how", ["block", "attention"])
def test_nothing_is_used_before_it_came_and_nothing_is_let_go_before_it_went(
    how: str, live_model: LIVE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SideStream", LateStream)
    live, found = live_model("wan-s2v"), []
    for moved in (False, True):
        model = with_more_blocks(live, 2)
        checkpoint_blocks(model, live.spec.model.block_classes, how, offload=moved)
        for _ in range(2):
            loss = live.loss(model, live.inputs(*SMALL))
            loss.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert torch.equal(*found) and found[0].isfinite().all()


LAYERS, ROWS = 8, 4096


class Layers(nn.Module):
    """Layers that save what enters them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        self.moved = Offload(self, LAYERS)

    def forward(self, x: Tensor, look: Callable[[], None] = lambda: None) -> Tensor:
        for _ in self.blocks:
            x = self.moved.run(lambda x: x.sin(), x)
            x.register_hook(lambda gradient: look())
        return x


def test_two_layers_at_most_are_on_the_device_at_a_time() -> None:
    model, x = Layers(), torch.randn(ROWS, ROWS // 16, requires_grad=True)
    looks = list[int]()
    with Operations() as operations:
        result = model(x, lambda: looks.append(operations.left() // x.nbytes))
        forward = operations.left() / x.nbytes
        result.sum().backward()
    pieces = LAYERS - 1  # on a CPU the host's memory counts too
    assert forward - pieces == 2  # what the last layer saved, and the result
    # A gradient, what the layer saved, and what the one before it saved, which was sent for early.
    assert len(looks) == LAYERS and max(looks) - pieces == 3


def test_views_of_one_storage_go_once_and_come_back_as_they_were() -> None:
    moved, x = Offload(nn.Module(), 2), torch.randn(4, 6, requires_grad=True)
    seen = list[Tensor]()

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, whole: Tensor) -> Tensor:
            ctx.save_for_backward(whole, whole.t(), whole[1:, ::2])
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            seen.extend(ctx.saved_tensors)
            return gradient, None

    with Operations() as operations:
        y = moved.run(Keeps.apply, x, torch.arange(24.0).view(4, 6) * 2)
        result = moved.run(lambda y: y.exp(), y)
    assert operations.counts["host memory"] == 1
    result.sum().backward()
    whole = torch.arange(24.0).view(4, 6) * 2
    for found, expected in zip(seen, (whole, whole.t(), whole[1:, ::2]), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
