"""The moving average of a whole model under FSDP2 and ZeRO with two processes: each rank keeps and writes its part."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_sample import predict
from safetensors.torch import load_file
from sharded_worker import ROUNDS_ALIKE, STEPS, WHOLE, load_whole, start_whole

from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.export import export
from vfun_cli.checkpoints.reader import CheckpointReader, open_checkpoint
from vfun_cli.checkpoints.tensors import elements_of
from vfun_cli.errors import CheckpointError
from vfun_cli.training.looking import evaluating
from vfun_cli.training.state.averaged import load_average

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray[Any, Any]]


def path(folder: Path, strategy: str, name: str = "trained", step: int = STEPS) -> Path:
    return folder / "whole" / strategy / name / f"checkpoint-{step}"


def average(checkpoint: CheckpointReader) -> Arrays:
    return {name: tensor.read() for name, tensor in checkpoint.ema.items()}


def everything(checkpoint: CheckpointReader) -> Arrays:
    found = {f"average.{name}": values for name, values in average(checkpoint).items()}
    found |= {name: tensor.read() for name, tensor in checkpoint.weights.items()}
    for name, moments in checkpoint.moments.items():
        found |= {f"{name}.{key}": array.read() for key, array in moments.arrays.items()}
    return found


def same(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys() and len(one) > 100
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def told(folder: Path, strategy: str) -> list[dict[str, Any]]:
    """What each rank said."""
    files = sorted((folder / "whole" / strategy).glob("told-*.json"))
    assert len(files) == 2
    return [json.loads(file.read_text()) for file in files]


def distance(one: Arrays, other: Arrays) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum(float(np.square(one[name] - other[name], dtype=np.float64).sum()) for name in one))


@pytest.mark.parametrize("strategy", WHOLE)
def test_the_average_is_that_of_one_process(strategy: str, sharded: Path) -> None:
    alone, shared = (open_checkpoint(path(sharded, name)) for name in ("single", strategy))
    one, two = average(alone), average(shared)
    weights = {name: tensor.read() for name, tensor in alone.weights.items()}
    other_weights = {name: tensor.read() for name, tensor in shared.weights.items()}
    assert 0 < distance(one, two) <= distance(weights, other_weights)
    assert distance(two, other_weights) > 1.5 * distance(one, two), "it is another than the weights"


@pytest.mark.parametrize("strategy", WHOLE)
def test_it_averages_the_float32_masters_of_every_step(strategy: str, sharded: Path) -> None:
    noted = load_file(sharded / "whole" / strategy / "noted.safetensors")
    found = average(open_checkpoint(path(sharded, strategy)))
    assert distance({name: values.numpy() for name, values in noted.items()}, found) < 1e-5


@pytest.mark.parametrize("strategy", WHOLE)
def test_a_resumed_run_has_the_average_of_the_straight_one(strategy: str, sharded: Path) -> None:
    straight, again = (
        everything(open_checkpoint(path(sharded, strategy, name, STEPS + 1))) for name in ("continued", "resumed")
    )
    same(straight, again)
    before = everything(open_checkpoint(path(sharded, strategy)))
    assert all(before[name].tobytes() != again[name].tobytes() for name in again if name.startswith("average."))


@pytest.mark.parametrize("before", ["single", *WHOLE])
def test_the_next_strategy_restores_it_without_loss(before: str, sharded: Path) -> None:
    strategy = [*WHOLE, WHOLE[0]][["single", *WHOLE].index(before)]
    found = open_checkpoint(path(sharded, strategy, f"restored-{before}"))
    same(everything(open_checkpoint(path(sharded, before))), everything(found))


@pytest.mark.parametrize("strategy", WHOLE)
def test_one_process_restores_it_and_predicts_with_it_as_the_ranks_did(strategy: str, sharded: Path) -> None:
    state = start_whole("single", sharded)
    load_whole(state, "single", path(sharded, strategy))
    looks = load_file(sharded / "whole" / strategy / "looks.safetensors")
    for weights, made in looks.items():
        with evaluating(state, weights) as transformer:
            alone = predict(transformer, torch.bfloat16).float()
        bound = 0 if strategy in ROUNDS_ALIKE else 1e-2
        assert (alone - made).norm() <= bound * alone.norm(), weights
    assert (looks["ema"] - looks["trained"]).norm() > 5e-2 * looks["trained"].norm()


@pytest.mark.parametrize("strategy", WHOLE)
def test_a_look_at_it_changes_nothing_however_it_ends(strategy: str, sharded: Path) -> None:
    for rank in told(sharded, strategy):
        assert rank["unchanged"] and rank["stopped"] == []
        # After an error of its own a rank meets no other. ZeRO-2's copies are of the weights of all.
        assert rank["failed"] == (["computed"] if strategy == "zero2" else [])


@pytest.mark.parametrize("strategy", WHOLE)
def test_each_rank_keeps_and_writes_the_average_of_its_own_masters(strategy: str, sharded: Path) -> None:
    checkpoint = path(sharded, strategy)
    elements = sum(tensor.numel for tensor in open_checkpoint(checkpoint).weights.values())
    for rank in told(sharded, strategy):
        assert rank["average"] == rank["masters"]
        assert sum(rank["average"]) < 1.1 * 4 * elements / 2
    listed = [Path(name).name for name in manifest.iter_files(checkpoint)]
    sizes = [file.stat().st_size for file in sorted(checkpoint.rglob("*_ema.safetensors"))]
    assert "ema.safetensors" not in listed
    if strategy == "fsdp":
        assert sizes == [] and ".metadata" in listed
    else:
        assert all(f"zero_pp_rank_{rank}_mp_rank_00_ema.safetensors" in listed for rank in range(2))
        assert len(sizes) == 2 and all(0.45 * 4 * elements < size < 0.6 * 4 * elements for size in sizes)


@pytest.mark.parametrize("strategy", ["single", *WHOLE])
def test_it_is_exported_from_any_strategys_checkpoint(strategy: str, sharded: Path, tmp_path: Path) -> None:
    base = sharded / "model/transformer"
    export(path(sharded, strategy), tmp_path / "ema", base_dir=base, weights="ema")
    exported = load_file(tmp_path / "ema/diffusion_pytorch_model.safetensors")
    found = average(open_checkpoint(path(sharded, strategy)))
    assert len(found) > 50
    for name, values in found.items():
        assert torch.equal(exported[name], torch.from_numpy(values).bfloat16()), name


def test_a_run_without_it_goes_on_from_a_checkpoint_with_one_and_not_the_other_way_round(sharded: Path) -> None:
    state = start_whole("single", sharded)
    checkpoint = open_checkpoint(path(sharded, "zero3"))
    checkpoint.ema.clear()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="holds no moving average of the weights") as caught:
        load_average(state, checkpoint)
    assert caught.value.hint == "Resume without --use-ema."
    state.average = None
    load_whole(state, "single", path(sharded, "zero3"))


def test_parts_of_another_number_of_ranks_are_refused(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    for file in (path(sharded, "zero2") / "model/state").iterdir():
        if "rank_1_mp_rank_00_ema" not in file.name:
            (folder / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"written by 2 ranks, and holds 1 .*_ema"):
        open_checkpoint(tmp_path)


def test_some_elements_of_a_tensor_are_read_without_the_others(sharded: Path) -> None:
    tensor = max(open_checkpoint(path(sharded, "zero3")).ema.values(), key=lambda each: each.numel)
    whole, half = tensor.read().ravel(), tensor.numel // 2
    assert len(tensor.segments) == 2
    for start, count in ((0, tensor.numel), (half - 3, 7), (1, 5), (tensor.numel - 1, 1)):
        part = elements_of(tensor, start, count)
        assert np.array_equal(part.read(), whole[start : start + count])
        assert sum(segment.count for segment in part.segments) == count
    with pytest.raises(CheckpointError, match="do not add up"):
        elements_of(tensor, tensor.numel - 1, 2).read()
