"""A whole step of every family on a made-up CUDA device: who waits for whom, and what is computed in which type."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, SMALL, LiveModel
from torch import nn
from torch.distributed.utils import _to_kwargs
from trainer_parts import Parts, loaded

from tests.computed_types import noted
from tests.fake_cuda import made_up_cuda
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import load
from vfun_cli.families import adapter_of
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training.blocks import find_blocks, find_layers
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.model import adapter_options, prepare_blocks
from vfun_cli.training.quantised import quantise_layers
from vfun_cli.training.streaming import stream_blocks

pytestmark = pytest.mark.slow

LIVE = Callable[[str], LiveModel]
BF16 = {torch.bfloat16}


def moved_by_the_wrapper(model: nn.Module, device: torch.device) -> None:
    """As DDP and FSDP do it with whatever tensor a forward pass is given."""

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        (args,), (kwargs,) = _to_kwargs(args, kwargs, device, False)
        return args, kwargs

    model.register_forward_pre_hook(move, with_kwargs=True)


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("cogvideox-fun", "lora", {"base_precision": "fp8"}),
    ("cogvideox-fun", "lora", {"base_precision": "nf4"}),
    ("cogvideox-fun", "lora", {"base_precision": "nf4", "stream_blocks": 0}),
    ("wan-s2v", "lora", {"stream_blocks": 1, "gradient_checkpointing": "selective"}),
    (
        "cogvideox-fun",
        "train",
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": "selective", "use_ema": True},
    ),
    ("wan-s2v", "train", {"train_batch_size": 2}),  # the second one drops its motion, the first does not
]


@pytest.mark.parametrize(
    ("family", "command", "options"),
    [
        *[(family, "lora", {}) for family in FAMILIES],
        *[pytest.param(family, "train", {}, marks=pytest.mark.slow) for family in FAMILIES],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in OPTIONS],
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device_and_computes_in_the_types_of_fsdp_and_zero(
    family: str, command: str, options: dict[str, Any], live_model: LIVE, tmp_path: Path, device_restored: None
) -> None:
    """Those have weights in bf16 wherever they are used. Whatever the strategy, gradients of masters are float32."""
    live = live_model(family)
    options = {"gradient_checkpointing": "block", "mixed_precision": "bf16", **options}
    config = RunConfig(strategy="ddp", **options)
    clips = [live.cached(*SMALL, dropped=number % 2 == 1) for number in range(config.train_batch_size)]
    micro_batch = loaded(0, *zip(*clips, strict=True))
    model = live.transformer()
    if command == "lora":
        add_adapters(model, resolve("lora", live.spec, {}, environ={}).config, live.spec, live.dims)
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
    if config.base_precision != "bf16":
        quantise_layers(model, config.base_precision, torch.device("cpu"))
    model.to("meta")
    in_bf16 = copy.deepcopy(model)
    for weight in in_bf16.parameters():
        weight.data = weight.data.bfloat16() if weight.requires_grad else weight.data
    plan: Any = SimpleNamespace(spec=live.spec, dims=live.dims)
    prepare_blocks(config, plan, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = set[torch.dtype]()
    for weight in trained:
        weight.register_post_accumulate_grad_hook(lambda each: gradients.add(each.grad.dtype))
    with made_up_cuda() as device:
        adapter: Any = copy.copy(live.adapter)
        adapter.encoders = Encoders({}, device)
        if config.stream_blocks is not None:  # what is quantised is so already
            stream_blocks(find_layers(model, live.spec.model.block_classes), config.stream_blocks, "bf16", device)
        moved_by_the_wrapper(model, device)
        given = list[Any]()
        model.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
        types, expected = noted(model), noted(in_bf16)
        parts = Parts(tmp_path, model, live, adapter, live.objective, **options)
        pending = parts.trainer.enqueue(0, [micro_batch] * config.gradient_accumulation_steps)
        assert pending.ranks.device == device and pending.ranks.shape == (1, 12)
        with torch.no_grad():
            in_bf16(*given[0][0], **given[0][1])
    assert gradients == {torch.float32} == {weight.dtype for weight in trained}
    names = {module: name for name, module in model.named_modules()}
    blocks = [names[block] for block in find_blocks(model, live.spec.model.block_classes)]
    assert len(blocks) >= 2
    for name, calls in expected.items():  # what is computed again for its gradients comes after these
        assert types[name][: len(calls)] == calls, name
        assert name not in blocks or all(leaving == BF16 for _, leaving in types[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_beside_the_step_and_what_they_add_to_the_cache_never_wait_for_the_device(
    family: str, live_model: LIVE, tmp_path: Path, device_restored: None
) -> None:
    live = live_model(family)
    kind, request = adapter_of(live.spec), live.request(0, *SMALL)
    cache = Cache.for_encoders(tmp_path / "cache", live.adapter.encoders)
    sample = load(kind, request, adapter_options(live.config, live.spec, torch.device("cpu")), cache)
    adapter: Any = copy.copy(live.adapter)
    adapter.encoders = copy.copy(live.adapter.encoders)
    live.adapter.encoders.load()
    adapter.encoders.loaded = {
        name: copy.deepcopy(encoder).to("meta") for name, encoder in live.adapter.encoders.loaded.items()
    }
    model = live.transformer().to("meta")
    with made_up_cuda() as device:
        adapter.encoders.device = device
        parts = Parts(tmp_path, model, live, adapter, live.objective, cache=cache)
        pending = parts.trainer.enqueue(0, [loaded(0, [request], [sample])])
    assert set(pending.entries) == set(sample.keys.values()) and len(sample.keys) >= 2
