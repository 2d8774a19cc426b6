"""Weights on their way from the files to where they live: never wide as a whole; quantised ones stay on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lora_sample import load_model, model_directory, options, prepared, with_adapters
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vfun_cli.config.options import RunConfig
from vfun_cli.families.cogvideox_fun import SPEC, read_dims
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer
from vfun_cli.families.wan_s2v.transformer import WanS2VTransformer3DModel
from vfun_cli.modeling.lazy_weights import LazyWeights
from vfun_cli.modeling.weights import empty_model, read_json
from vfun_cli.training.lora import add_adapters
from vfun_cli.training.quantised import QuantisedLinear, levels_of, quantise_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("base"))


def with_late_weights(folder: Path, config: RunConfig) -> tuple[CogVideoXFunTransformer, LazyWeights]:
    lazy = LazyWeights()
    with lazy.transformer():
        transformer = load_model(folder)
    add_adapters(transformer, config, SPEC, read_dims(read_json(folder / "config.json")), lazy)
    return transformer, lazy


class WideTensors(TorchDispatchMode):
    """The most bytes of float32 tensors that were in memory at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.in_memory: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not tensor.is_meta:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.in_memory[reference.cdata] = (reference, storage.nbytes())
        self.in_memory = {key: kept for key, kept in self.in_memory.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.in_memory.values()))
        return made


@pytest.mark.parametrize(("precision", "layers"), [("bf16", 0), ("fp8", 5), ("nf4", 5)])
def test_a_frozen_model_is_never_wide_as_a_whole(precision: str, layers: int, base: Path) -> None:
    config = options(base_precision=precision, mixed_precision="bf16")
    transformer, lazy = with_late_weights(base, config)
    frozen = [parameter for parameter in transformer.parameters() if not parameter.requires_grad]
    largest = max(4 * parameter.numel() for parameter in frozen)
    assert sum(parameter.untyped_storage().nbytes() for parameter in frozen) == 4 * len(frozen)
    with WideTensors() as wide:
        model = prepared(transformer, config, Accelerator(cpu=True), lazy).model
    kept = sum(value.nbytes for value in model.parameters() if value.dtype == torch.float32)  # adapters and scales
    assert wide.most - kept <= layers * largest  # the layer that is quantised, and what is made of it on the way
    assert 4 * sum(parameter.numel() for parameter in frozen) > 10 * largest, "a layer is not much"


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"mixed_precision": "bf16"}, {"base_precision": "nf4"}])
def test_a_model_read_late_is_the_model_read_at_once(kind: dict[str, Any], base: Path) -> None:
    config = options(**kind)
    expected = dict(prepared(with_adapters(base, config), config, Accelerator(cpu=True)).model.named_parameters())
    transformer, lazy = with_late_weights(base, config)
    found = dict(prepared(transformer, config, Accelerator(cpu=True), lazy).model.named_parameters())
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        assert value.requires_grad == expected[name].requires_grad, name


def test_layers_outside_of_the_blocks_are_quantised_where_there_are_many() -> None:
    """Two blocks of Wan-S2V in its own width, with an injector after each."""
    model = empty_model(lambda: WanS2VTransformer3DModel(num_layers=2, audio_inject_layers=[0, 1]))
    model.requires_grad_(False).bfloat16()
    before = sum(parameter.nbytes for parameter in model.audio_injector.parameters())
    quantise_layers(model, "nf4", torch.device("meta"))
    wide = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert wide == [
        "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
        "head.head", "casual_audio_encoder.encoder.final_linear",
    ]  # fmt: skip
    after = sum(parameter.nbytes for parameter in model.audio_injector.parameters())
    assert before > 6e8 and after < 0.3 * before


class NothingFromTheHost(TorchDispatchMode):
    """Refuses operations by which host data enters a device, or a value of the device is waited for."""

    REFUSED = frozenset(
        {
            torch.ops.aten.lift_fresh.default,
            torch.ops.aten.scalar_tensor.default,
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_quantised_layer_takes_nothing_from_the_host(precision: str) -> None:
    linear = nn.Linear(128, 64).requires_grad_(False)
    layer = QuantisedLinear(linear, precision, levels_of(precision, CPU))
    x = torch.randn(3, 128, requires_grad=True)
    with NothingFromTheHost():
        layer(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(AssertionError, match="lift_fresh"), NothingFromTheHost():
        torch.tensor([0.5])
