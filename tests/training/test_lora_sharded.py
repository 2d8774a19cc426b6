"""Adapters under FSDP2, ZeRO-3 and ZeRO-2 with two processes: whole files, exact to restore, whatever sharded them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_worker import STRATEGIES

from vfun_cli.checkpoints.lora_files import peft_key

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(sharded: Path) -> Path:
    return sharded


def same(one: Path, other: Path) -> None:
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_saved_adapter_is_whole(strategy: str, folder: Path) -> None:
    adapter = load_file(folder / strategy / "trained/adapter_model.safetensors")
    assert len(adapter) == 20
    dim = 32
    for name, value in adapter.items():
        wide = 4 * dim if "ff.net" in name and ("net.2.lora_A" in name or "proj.lora_B" in name) else dim
        assert value.shape == ((4, wide) if "lora_A" in name else (wide, 4)), name
        assert value.dtype == torch.float32
        assert (value != 0).all(dim=1).float().mean() > 0.9, name  # no part of another rank is missing
    moments = load_file(folder / strategy / "trained/optimizer.safetensors")
    assert len(moments) == 60
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {3.0}
    average = load_file(folder / strategy / "trained/ema.safetensors")
    assert {peft_key(name): value.shape for name, value in average.items()} == {
        name: value.shape for name, value in adapter.items()
    }
    for name, value in average.items():
        assert (value != 0).all(dim=1).float().mean() > 0.9 and not torch.equal(value, adapter[peft_key(name)]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_strategy_restores_it_without_loss(strategy: str, folder: Path) -> None:
    same(folder / strategy / "trained", folder / strategy / "restored")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_restored_run_takes_the_same_step(strategy: str, folder: Path) -> None:
    same(folder / strategy / "continued", folder / strategy / "resumed")


def test_strategies_train_alike(folder: Path) -> None:
    losses = {s: json.loads((folder / s / "losses.json").read_text()) for s in STRATEGIES}
    for found in losses.values():
        assert found[-1] < found[0]
        assert found == pytest.approx(losses["fsdp"], rel=2e-2)  # computed in bf16, each in its own order
