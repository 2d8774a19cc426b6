"""A whole step of every family on a made-up CUDA device: who waits for whom, and what is computed in which type."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, LiveModel
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from torch.utils._pytree import tree_leaves
from trainer_parts import Parts, loaded

from tests.fake_cuda import made_up_cuda
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training.blocks import find_blocks
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import prepare_blocks

LIVE = Callable[[str], LiveModel]
Types = dict[str, list[set[torch.dtype]]]


def moved_by_the_wrapper(model: nn.Module, device: torch.device) -> None:
    """As DDP and FSDP do it with whatever tensor a forward pass is given."""

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        (args,), (kwargs,) = _to_kwargs(args, kwargs, device, False)
        return args, kwargs

    model.register_forward_pre_hook(move, with_kwargs=True)


def noted(model: nn.Module) -> Types:
    """By each module's name, the floating types that enter and leave it, call by call."""
    types: Types = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [each for each in tree_leaves((args, kwargs, output)) if isinstance(each, Tensor)]
            floating = {each.dtype for each in tensors if each.is_floating_point()}
            types.setdefault(name, []).append(floating)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name), with_kwargs=True)
    return types


@pytest.mark.parametrize("command", ["train", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device_and_computes_in_the_types_of_fsdp_and_zero(
    family: str, command: str, live_model: LIVE, tmp_path: Path, device_restored: None
) -> None:
    """Those have weights in bf16 wherever they are used, and leave inputs alone."""
    live = live_model(family)
    request, sample = live.cached(*SMALL)
    model = live.transformer()
    if command == "lora":
        add_adapters(model, resolve("lora", live.spec, {}, environ={}).config, live.spec, live.dims)
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
    model.to("meta")
    in_bf16 = copy.deepcopy(model)
    for weight in in_bf16.parameters():
        weight.data = weight.data.bfloat16()
    config = RunConfig(strategy="ddp", gradient_checkpointing="block", mixed_precision="bf16")
    plan: Any = SimpleNamespace(spec=live.spec, dims=live.dims)
    prepare_blocks(config, plan, model)
    with made_up_cuda() as device:
        adapter: Any = copy.copy(live.adapter)
        adapter.encoders = Encoders({}, device)
        moved_by_the_wrapper(model, device)
        types, seen = noted(model), list[Any]()
        model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        parts = Parts(tmp_path, model, live, adapter, live.objective, mixed_precision="bf16")
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = set[torch.dtype]()
        for weight in trained:
            weight.register_post_accumulate_grad_hook(lambda each: gradients.add(each.grad.dtype))
        pending = parts.trainer.enqueue(0, [loaded(0, [request], [sample])])
        assert pending.ranks.device == device and pending.ranks.shape == (1, 12)
        recomputed = types
        expected = noted(in_bf16)
        with torch.no_grad():
            in_bf16(*seen[0][0], **seen[0][1])
    for name, calls in expected.items():
        assert recomputed[name][: len(calls)] == calls, name
    assert gradients == {torch.float32} and {weight.dtype for weight in trained} == {torch.float32}
    for name, module in model.named_modules():
        if module in find_blocks(model, live.spec.model.block_classes):
            assert torch.bfloat16 in types[name][0]
