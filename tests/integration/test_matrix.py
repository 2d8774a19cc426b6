"""Family x strategy, full and LoRA: trains, falls on a memorised clip, exports; a part of them resumes bit-equal."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

from tests.integration.matrix import (
    COMMANDS,
    STEPS,
    STRATEGIES,
    Run,
    losses,
    resumed,
    resumed_too,
    straight,
    unlearning,
)
from vfun_cli import families
from vfun_cli.checkpoints.export import export, read_base
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILIES = tuple(families.FAMILIES)
STRAIGHT = [
    straight(family, strategy, command) for strategy in STRATEGIES for command in COMMANDS for family in FAMILIES
]
Trained = Callable[[str], None]


def cells(runs: Iterable[Run]) -> pytest.MarkDecorator:
    """A test of each of these runs; README's table tells of a cell whether all of its tests passed."""
    return pytest.mark.parametrize("cell", list(runs), ids=lambda run: f"{run.command}-{run.family}-{run.strategy}")


every_run = cells(STRAIGHT)
every_train = cells(run for run in STRAIGHT if run.command == "train")
every_lora = cells(run for run in STRAIGHT if run.command == "lora")
every_resumed = cells(filter(resumed_too, STRAIGHT))


def weights_of(run: Run) -> dict[str, np.ndarray]:
    weights = open_checkpoint(run.last_checkpoint()).weights
    return {name: tensor.read() for name, tensor in weights.items()}


def in_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).bfloat16().float().numpy()


def export_of(run: Run) -> str:
    """Content hash of the export of the run's last checkpoint."""
    spec = families.find(run.family)
    base = Path("vfun-demo") / run.family / "model" / Path(spec.model.config_file).parent
    output = RunDir(run.folder).root / "export"
    done = export(run.last_checkpoint(), output, base_dir=base, names=spec.export.names["same"], overwrite=True)
    assert done.verified
    return done.sha256


@every_run
def test_loss_falls_on_a_memorised_clip(cell: Run, trained: Trained) -> None:
    """Against the same draws without learning, so that easy and hard timesteps do not matter in so few steps."""
    trained(cell.strategy)
    trained("single")
    found, unlearned = losses(cell), losses(unlearning(cell.family))
    assert len(found) == STEPS[cell.command] and all(math.isfinite(loss) for loss in found)
    assert found[0] == pytest.approx(unlearned[0], rel=0.01)
    enough = {"train": 0.75, "lora": 0.95}[cell.command]
    assert mean(found[-2:]) <= enough * mean(unlearned[len(found) - 2 : len(found)]), (found, unlearned)


@every_resumed
def test_a_resumed_run_is_bit_equal_to_the_straight_one(cell: Run, trained: Trained) -> None:
    trained(cell.strategy)
    again = resumed(cell)
    assert losses(again) == losses(cell)[STEPS[cell.command] // 2 :]
    expected = weights_of(cell)
    for name, values in weights_of(again).items():
        np.testing.assert_array_equal(values, expected.pop(name), err_msg=name)
    assert not expected
    if cell.command == "train":
        assert export_of(again) == export_of(cell)


@every_train
def test_the_export_is_the_trained_weights_in_bf16(cell: Run, trained: Trained) -> None:
    trained(cell.strategy)
    export_of(cell)
    exported = read_base(RunDir(cell.folder).root / "export")[1]
    released = families.find(cell.family).export.names["same"]
    weights = weights_of(cell)
    assert len(weights) > 20
    for name, values in weights.items():
        np.testing.assert_array_equal(exported[released(name)].read(), in_bf16(values), err_msg=name)


@every_lora
def test_lora_trains_whole_adapters_and_nothing_else(cell: Run, trained: Trained) -> None:
    trained(cell.strategy)
    trained("single")
    reader = open_checkpoint(cell.last_checkpoint())
    down = {name for name in reader.weights if ".lora_A." in name}
    up = {name for name in reader.weights if ".lora_B." in name}
    assert down and set(reader.weights) == down | up
    assert {name.replace(".lora_A.", ".lora_B.") for name in down} == up
    for name, moments in reader.moments.items():
        assert np.abs(moments.arrays["exp_avg"].read()).max() > 0, f"{name} got no gradient"
    assert set(reader.moments) == down | up
    expected = open_checkpoint(straight(cell.family, "single", "lora").last_checkpoint()).weights
    assert {name: tensor.shape for name, tensor in reader.weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@every_lora
def test_lora_leaves_every_weight_of_the_model_as_it_was(cell: Run, trained: Trained) -> None:
    trained(cell.strategy)
    logs = RunDir(cell.folder).logs
    noted = [json.loads(path.read_text()) for path in sorted(logs.glob("noted-rank-*.json"))]
    assert len(noted) == (1 if cell.strategy == "single" else 2)
    for rank in noted:
        assert rank["before"] == rank["after"]
        assert len(rank["before"]) > 20
    assert any(not digest.startswith("0 ") for rank in noted for digest in rank["before"].values())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_agree(family: str, command: str, trained: Trained) -> None:
    """The same clips, noise and timesteps: the losses differ by bf16 rounding alone."""
    curves = []
    for strategy in STRATEGIES:
        trained(strategy)
        curves.append(losses(straight(family, strategy, command)))
    for values in zip(*curves, strict=True):
        assert max(values) <= 1.05 * min(values), values
