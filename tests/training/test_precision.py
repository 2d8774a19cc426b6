"""Float32 weights that are used as copies in bf16 compute what bf16 weights compute, and keep their gradients."""

from collections.abc import Callable

import pytest
import torch
from live_models import FAMILIES, SMALL, LiveModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vfun_cli.training.blocks import checkpoint_blocks
from vfun_cli.training.precision import use_in

LIVE = Callable[[str], LiveModel]


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[pytest.mark.slow] if each != "cogvideox-fun" else []) for each in FAMILIES]
)
def test_masters_train_as_bf16_weights_do_to_the_bit(family: str, live_model: LIVE) -> None:
    """The masters' blocks are computed again for their gradients, when the forward pass of the model is over."""
    live = live_model(family)
    inputs = live.inputs(*SMALL).to(torch.bfloat16)
    low, masters = live.transformer(), live.transformer()
    for weight in (*low.parameters(), *(each for each in masters.parameters() if not each.requires_grad)):
        weight.data = weight.data.bfloat16()
    before = dict(masters.named_parameters())
    use_in(torch.bfloat16, masters)
    checkpoint_blocks(masters, live.spec.model.block_classes, "block")
    losses = [live.loss(model, inputs) for model in (low, masters)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    after = dict(masters.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is weight for name, weight in before.items())
    for name, weight in low.named_parameters():
        if weight.requires_grad:
            gradient = after[name].grad
            assert gradient is not None and gradient.dtype == torch.float32, name
            assert torch.equal(gradient, weight.grad.float()), name  # type: ignore[union-attr]


class Casts(TorchDispatchMode):
    """The elements of float32 tensors that were rounded to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation: object, types: object, args: tuple = (), kwargs: dict | None = None):  # type: ignore[no-untyped-def,type-arg]
        if "_to_copy" in str(operation) and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.elements += args[0].numel() * (args[0].dtype == torch.float32)
        return operation(*args, **(kwargs or {}))  # type: ignore[operator]


class Layers(nn.Module):
    """A stem, and two layers of which one call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, index: int) -> torch.Tensor:
        assert self.stem.weight.dtype == torch.bfloat16
        return self.layers[index](self.stem(x))


def test_only_what_is_used_is_copied_and_an_error_leaves_the_masters_in_place() -> None:
    model = Layers()
    use_in(torch.bfloat16, model)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with Casts() as casts:
        model(x, 1)
    assert casts.elements == 2 * 20
    with pytest.raises(IndexError):
        model(x, 2)
    assert all(type(weight) is nn.Parameter and weight.dtype == torch.float32 for weight in model.parameters())
    assert len(list(model.parameters())) == 6
