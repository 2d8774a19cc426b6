"""Six layouts into six: weights, their average, moments and step counts carried over bit for bit, and the run
goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration import matrix
from tests.integration.matrix import Run, losses
from vfun_cli.checkpoints.reader import CheckpointReader, open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.long

FAMILY = "wan-s2v"
CHANGED, LAST = 2, 4
"""The step of the change, and the run's end."""
_TWO = {"num_processes": 2, "gradient_accumulation_steps": 2}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "single": {"strategy": "single", "num_processes": 1, "gradient_accumulation_steps": 4},
    "ddp": {"strategy": "ddp", **_TWO},
    "fsdp": {"strategy": "fsdp", **_TWO},
    "hybrid": {"strategy": "fsdp", "num_processes": 4, "gradient_accumulation_steps": 1, "fsdp_shard_size": 2},
    "zero2": {"strategy": "zero2", **_TWO},
    "zero3": {"strategy": "zero3", **_TWO},
}
"""A step of four micro-batches everywhere."""


@dataclass(frozen=True, kw_only=True)
class Continued(Run):
    """A run that another strategy began."""

    source: Run
    at: int = CHANGED

    def checkpoint(self) -> Path:
        return RunDir(self.source.folder).checkpoint(self.at)


def straight(layout: str) -> Run:
    """Over clips of several shapes."""
    options = {
        "train_data_meta": f"vfun-demo/{FAMILY}/data/metadata.json",
        "video_sample_size": 96,
        "image_sample_size": 96,
        "token_sample_size": 96,
        "max_train_steps": LAST,
        "checkpointing_steps": CHANGED,
        "use_ema": True,
        **LAYOUTS[layout],
    }
    return Run(name=f"straight-{layout}", family=FAMILY, strategy=LAYOUTS[layout]["strategy"], options=options)


def copied(source: str, target: str) -> Continued:
    """Takes a checkpoint over and saves it again, without a step."""
    run = continued(source, target)
    return replace(run, name=f"copy-{run.name}", options={**run.options, "max_train_steps": CHANGED})


def continued(source: str, target: str) -> Continued:
    run = straight(target)
    return Continued(
        name=f"{target}-after-{source}", family=FAMILY, strategy=run.strategy, source=straight(source),
        options=run.options,
    )  # fmt: skip


def launch(runs: Sequence[Run]) -> None:
    """On a machine of any size, which otherwise refuses more processes than it has cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfun_cli.devices.cpu_cores", lambda: 4)
        matrix.launch(runs)


@pytest.fixture(scope="session")
def begun(workplace: Path) -> Callable[[str], None]:
    """The straight run of a layout, once."""

    @cache
    def begin(layout: str) -> None:
        launch([straight(layout)])

    return begin


@pytest.fixture(scope="session")
def taken_over(begun: Callable[[str], None]) -> Callable[[str], None]:
    """All continuations in a layout, in one launch."""

    @cache
    def take_over(target: str) -> None:
        for source in LAYOUTS:
            begun(source)
        launch([make(source, target) for source in LAYOUTS for make in (copied, continued)])

    return take_over


def arrays(checkpoint: CheckpointReader) -> dict[str, np.ndarray[Any, Any]]:
    found = {name: source.read() for name, source in checkpoint.weights.items()}
    found |= {f"{name}.average": source.read() for name, source in checkpoint.ema.items()}
    for name, moments in checkpoint.moments.items():
        found |= {f"{name}.{key}": array.read() for key, array in moments.arrays.items()}
        found[f"{name}.step"] = np.array(moments.step)
    return found


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_weights_average_moments_and_step_counts_arrive_bit_for_bit(
    source: str, target: str, taken_over: Callable[[str], None]
) -> None:
    taken_over(target)
    before = arrays(open_checkpoint(RunDir(straight(source).folder).checkpoint(CHANGED)))
    after = arrays(open_checkpoint(RunDir(copied(source, target).folder).checkpoint(CHANGED)))
    assert before.keys() == after.keys()
    assert len(before) > 400
    different = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert not different, different[:5]


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_the_losses_are_those_of_an_uninterrupted_run(
    source: str, target: str, taken_over: Callable[[str], None]
) -> None:
    taken_over(target)
    expected = losses(straight(source))[CHANGED:]
    found = losses(continued(source, target))
    assert len(found) == LAST - CHANGED
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_says_where_its_run_stands(begun: Callable[[str], None]) -> None:
    begun("ddp")
    state = json.loads((RunDir(straight("ddp").folder).checkpoint(CHANGED) / "state.json").read_text())
    assert (state["step"], state["world_size"], state["strategy"], state["layouts"]) == (CHANGED, 2, "ddp", [])
