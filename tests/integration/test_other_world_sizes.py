"""Five strategies into five: weights, their average, moments and step counts carried over bit for bit, and the run
goes on.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration import matrix
from tests.integration.matrix import STRATEGIES, Run, losses
from vfun_cli.checkpoints.reader import CheckpointReader, open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.long

FAMILY = "wan-s2v"
CHANGED, LAST = 2, 4
"""The step of the change, and the run's end."""


@dataclass(frozen=True, kw_only=True)
class Continued(Run):
    """A run that another strategy began."""

    source: Run
    at: int = CHANGED

    def checkpoint(self) -> Path:
        return RunDir(self.source.folder).checkpoint(self.at)


def options(strategy: str, **more: Any) -> Mapping[str, Any]:
    """A step of two micro-batches everywhere, over clips of several shapes."""
    processes = 1 if strategy == "single" else 2
    return {
        "train_data_meta": f"vfun-demo/{FAMILY}/data/metadata.json",
        "video_sample_size": 96,
        "image_sample_size": 96,
        "token_sample_size": 96,
        "num_processes": processes,
        "gradient_accumulation_steps": 2 // processes,
        "max_train_steps": LAST,
        "checkpointing_steps": CHANGED,
        "use_ema": True,
        **more,
    }


def straight(strategy: str) -> Run:
    return Run(name="straight", family=FAMILY, strategy=strategy, options=options(strategy))


def copied(source: str, target: str) -> Continued:
    """Takes a checkpoint over and saves it again, without a step."""
    return Continued(
        name=f"copy-of-{source}",
        family=FAMILY,
        strategy=target,
        source=straight(source),
        options=options(target, max_train_steps=CHANGED),
    )


def continued(source: str, target: str) -> Continued:
    return replace(copied(source, target), name=f"after-{source}", options=options(target))


@pytest.fixture(scope="session")
def begun(workplace: Path) -> Callable[[str], None]:
    """The straight run of a strategy, once."""

    @cache
    def begin(strategy: str) -> None:
        matrix.launch([straight(strategy)])

    return begin


@pytest.fixture(scope="session")
def taken_over(begun: Callable[[str], None]) -> Callable[[str], None]:
    """All continuations under a strategy, in one launch."""

    @cache
    def take_over(target: str) -> None:
        for source in STRATEGIES:
            begun(source)
        matrix.launch([make(source, target) for source in STRATEGIES for make in (copied, continued)])

    return take_over


def arrays(checkpoint: CheckpointReader) -> dict[str, np.ndarray[Any, Any]]:
    found = {name: source.read() for name, source in checkpoint.weights.items()}
    found |= {f"{name}.average": source.read() for name, source in checkpoint.ema.items()}
    for name, moments in checkpoint.moments.items():
        found |= {f"{name}.{key}": array.read() for key, array in moments.arrays.items()}
        found[f"{name}.step"] = np.array(moments.step)
    return found


@pytest.mark.parametrize("target", STRATEGIES)
@pytest.mark.parametrize("source", STRATEGIES)
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


@pytest.mark.parametrize("target", STRATEGIES)
@pytest.mark.parametrize("source", STRATEGIES)
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
