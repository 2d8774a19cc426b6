"""Weights left in their files: nothing in memory before sharding, and then each rank's own rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import CheckpointError
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import AdapterOptions
from vfun_cli.modeling.lazy_weights import LazyWeights, load_shards
from vfun_cli.modeling.weights import empty_model, load_weights

WORLD, RANK = 4, 2
CPU = torch.device("cpu")


class Model(nn.Module):
    """Rows that four ranks share evenly, unevenly, and not at all; one tied weight; one persistent buffer."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(3, 8)
        self.uneven = nn.Linear(8, 10)
        self.single = nn.Parameter(torch.zeros(1, 5))
        self.tied = nn.Linear(3, 8, bias=False)
        self.tied.weight = self.even.weight
        self.register_buffer("table", torch.zeros(3))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    names = {name: value for name, value in Model().state_dict().items() if name != "tied.weight"}
    tensors = {name: torch.randn(value.shape).bfloat16() for name, value in names.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@pytest.fixture
def third_of_four() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


def bytes_of(model: nn.Module) -> int:
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("spec", families.FAMILIES.values(), ids=lambda spec: spec.name)
def test_a_rank_holds_no_weights_before_they_are_sharded(
    spec: FamilySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(demo_default.make(spec)["pretrained_model_name_or_path"])
    options = AdapterOptions(
        model_dir=folder,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        train_mode=str(spec.defaults.train.get("train_mode") or ""),
    )
    lazy = LazyWeights()
    with lazy.transformer():
        transformer = adapter_of(spec).from_pretrained(options).transformer
    assert bytes_of(transformer) <= 4 * len(list(transformer.parameters()))
    lazy.to_meta(transformer)
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in transformer.parameters())
    loaded = adapter_of(spec).from_pretrained(options).transformer
    for name, parameter in transformer.named_parameters():
        assert torch.equal(lazy.value(parameter, CPU), loaded.get_parameter(name))
    for name, buffer in transformer.named_buffers():
        assert torch.equal(buffer, loaded.get_buffer(name))


def test_each_rank_reads_its_own_rows(stored: tuple[Path, dict[str, torch.Tensor]], third_of_four: None) -> None:
    path, tensors = stored
    lazy, model = LazyWeights(), empty_model(Model)
    with lazy.transformer():
        load_weights(model, [path], where=str(path), transformer=True)
    assert torch.equal(model.table, tensors["table"].float())
    lazy.to_meta(model)
    model.uneven.weight.data = model.uneven.weight.data.to(torch.bfloat16)  # as the frozen ones of a run in bf16
    files = lazy.by_name(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    load_shards(model, files, CPU)
    shards = {name: value.to_local() for name, value in model.named_parameters() if isinstance(value, DTensor)}
    assert torch.equal(shards["even.weight"], tensors["even.weight"][4:6].float())
    assert torch.equal(shards["uneven.weight"], tensors["uneven.weight"][6:9])
    assert torch.equal(shards["uneven.bias"], tensors["uneven.bias"][6:9].float())
    assert shards["single"].shape == (0, 5)
    assert model.tied.weight is model.even.weight


def test_whole_weights_come_one_at_a_time_in_their_type(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    lazy, model = LazyWeights(), empty_model(Model)
    with lazy.transformer():
        load_weights(model, [path], where=str(path), transformer=True)
    lazy.to_meta(model)
    model.even.weight.data = model.even.weight.data.to(torch.bfloat16)
    waiting = [sum(parameter.is_meta for parameter in model.parameters()) for _ in lazy.placed(model, CPU)]
    assert waiting == [4, 3, 2, 1, 0]
    assert model.tied.weight is model.even.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), tensors[name].float())
        assert parameter.dtype == (torch.bfloat16 if name == "even.weight" else torch.float32)


def test_a_module_is_lent_its_weights(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    lazy, model = LazyWeights(), empty_model(Model)
    with lazy.transformer():
        load_weights(model, [path], where=str(path), transformer=True)
    with lazy.materialized(model.even, CPU):
        assert torch.equal(model.even.weight, tensors["even.weight"].float())
    assert model.even.weight in lazy.stored


def test_a_missing_tensor_is_told_before_anything_is_read(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    del tensors["single"]
    save_file(tensors, path)
    with LazyWeights().transformer(), pytest.raises(CheckpointError, match="1 missing: single"):
        load_weights(empty_model(Model), [path], where=str(path), transformer=True)


def test_encoders_are_loaded_whole(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    model = empty_model(Model)
    with LazyWeights().transformer():
        load_weights(model, [path], where=str(path))
    assert torch.equal(model.single, tensors["single"].float())
