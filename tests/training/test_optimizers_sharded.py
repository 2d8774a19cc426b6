"""Optimizers and learning rates under DDP, FSDP2, ZeRO-2 and ZeRO-3 with two processes."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizers_worker import CASES, SLOW, TAKEN_OVER, Transformer, config_of

from tests.two_ranks import run_on_two_ranks
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.forecast.measuring.model import Weight
from vfun_cli.forecast.measuring.state import kept

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("optimizers_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    run_on_two_ranks(WORKER, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_and_resumes_bit_equal(case: str, ranks: list[Mapping[str, Any]]) -> None:
    for results in ranks:
        found = results[case]
        assert found["losses"][-1] < 0.9 * found["losses"][0]
        assert found["resumed"] == found["losses"][2:] and found["same"]
        assert found["gathered"], "whole tensors, as of adapters"
        assert set(found["seen"]) == {2 if case.startswith("class") else None}


@pytest.mark.parametrize("kind", ["slow", "class"])
def test_strategies_train_alike(kind: str, ranks: list[Mapping[str, Any]]) -> None:
    expected = ranks[0][f"{kind}-ddp"]["losses"]
    for strategy in ("fsdp", "zero2", "zero3"):
        assert ranks[0][f"{kind}-{strategy}"]["losses"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_forecast_of_what_a_rank_keeps_is_what_it_keeps(case: str, ranks: list[Mapping[str, Any]]) -> None:
    config = config_of(case)
    slow = SLOW if config.trainable_modules_low_learning_rate else ()
    weights = [
        Weight(name=name, shape=tuple(weight.shape), trained=True, slow=any(part in name for part in slow))
        for name, weight in Transformer().named_parameters()
    ]
    told = kept(config, weights, 2)
    assert [told.masters or told.weights, told.moments] == ranks[0][case]["bytes"]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is missing")
def test_8_bits_are_kept_of_large_shards_alone(ranks: list[Mapping[str, Any]], folder: Path) -> None:
    assert ranks[0]["8bit-fsdp"]["kinds"] == ["OptimState8bit", "Tensor"]
    moments = open_checkpoint(folder / "8bit-fsdp/checkpoint-2").moments["blocks.0.inner.weight"]
    assert set(moments.arrays) == {
        f"{moment}.rank{rank}.{part}"
        for moment in ("exp_avg", "exp_avg_sq") for rank in (0, 1) for part in ("codes", "scale")
    }  # fmt: skip


@pytest.mark.parametrize(("source", "target"), [pair for pair, why in TAKEN_OVER.items() if why is None])
def test_another_strategy_takes_over_what_the_optimizer_kept(
    source: str, target: str, ranks: list[Mapping[str, Any]], folder: Path
) -> None:
    before = open_checkpoint(folder / source / "checkpoint-2")
    after = open_checkpoint(folder / target / f"checkpoint-{1000 + list(CASES).index(source)}")
    assert before.weights.keys() == after.weights.keys() == before.moments.keys() == after.moments.keys() != set()
    for name, moments in before.moments.items():
        np.testing.assert_array_equal(after.weights[name].read(), before.weights[name].read())
        assert moments.arrays.keys() == after.moments[name].arrays.keys() == {"exp_avg", "exp_avg_sq"}
        for key, array in moments.arrays.items():
            np.testing.assert_array_equal(after.moments[name].arrays[key].read(), array.read())
        assert moments.step == after.moments[name].step == 2
    found = ranks[0][f"{source} to {target}"]
    assert set(found["seen"]) == {2 if target.startswith("class") else None}
    losses = found["losses"]
    assert losses == pytest.approx(ranks[0][target]["losses"][2:], rel=1e-4)


@pytest.mark.parametrize(("pair", "why"), [(pair, why) for pair, why in TAKEN_OVER.items() if why is not None])
def test_what_cannot_be_taken_over_is_refused(pair: tuple[str, str], why: str, ranks: list[Mapping[str, Any]]) -> None:
    for results in ranks:
        found = results[" to ".join(pair)]
        assert why in found["refused"] and found["exit_code"] == 2
