"""Hybrid sharding, two by two on four processes: every family trains as one process does, resumes bit-equal, and its
checkpoints go on under one process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration import matrix
from tests.integration.matrix import COMMANDS, Run, losses
from tests.integration.test_other_world_sizes import arrays
from vfun_cli import families
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILIES = tuple(families.FAMILIES)
HALF, LAST = 1, 2
"""The step of the first checkpoint, and the run's end."""
IN_FLOAT32: Mapping[str, Any] = {"mixed_precision": "no", "adam_epsilon": 1e-4, "max_train_steps": LAST, "use_ema": True,
                                 "checkpointing_steps": HALF}  # fmt: skip
LAYOUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "single": ("single", {"num_processes": 1, "gradient_accumulation_steps": 4}),
    "hybrid": ("fsdp", {"num_processes": 4, "gradient_accumulation_steps": 1, "fsdp_shard_size": 2}),
}
"""Steps of four micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Part(Run):
    """Of a run, from another one's checkpoint on."""

    source: Run

    def checkpoint(self) -> Path:
        return RunDir(self.source.folder).checkpoint(HALF)


def straight(family: str, command: str, layout: str) -> Run:
    strategy, options = LAYOUTS[layout]
    return Run(
        name=f"{layout}-{command}-{family}", family=family, strategy=strategy, command=command,
        options={**IN_FLOAT32, **options},
    )  # fmt: skip


def part(family: str, command: str, layout: str, before: str, last: int = LAST) -> Part:
    run = straight(family, command, layout)
    return Part(
        name=f"{run.name}-after-{before}-to-{last}", family=family, strategy=run.strategy, command=command,
        options={**run.options, "max_train_steps": last}, source=straight(family, command, before),
    )  # fmt: skip


CELLS = [(family, command) for command in COMMANDS for family in FAMILIES]


@pytest.fixture(scope="session")
def hybrid(workplace: Path) -> None:
    """All runs: one process, four, and one that takes over what the four had."""
    made = [[straight(*cell, "hybrid"), part(*cell, "hybrid", "hybrid")] for cell in CELLS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfun_cli.devices.cpu_cores", lambda: 4)  # a machine with fewer refuses four processes
        matrix.launch([straight(*cell, "single") for cell in CELLS])
        matrix.launch(
            [run for runs in made for run in runs] + [part(*cell, "hybrid", "single", HALF) for cell in CELLS]
        )
        matrix.launch([part(*cell, "single", "hybrid", HALF) for cell in CELLS])


every_cell = pytest.mark.parametrize(("family", "command"), CELLS)


def held(run: Run, step: int) -> dict[str, np.ndarray[Any, Any]]:
    return arrays(open_checkpoint(RunDir(run.folder).checkpoint(step)))


def same(one: Mapping[str, np.ndarray[Any, Any]], other: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert one.keys() == other.keys() and len(one) > 50
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


@every_cell
def test_four_processes_train_as_one_does(family: str, command: str, hybrid: None) -> None:
    alone, shared = straight(family, command, "single"), straight(family, command, "hybrid")
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    one, four, before = held(alone, LAST), held(shared, LAST), held(alone, HALF)
    assert one.keys() == four.keys()

    def distance(some: Mapping[str, Any], others: Mapping[str, Any]) -> float:
        return float(np.sqrt(sum(np.square(some[name] - others[name], dtype=np.float64).sum() for name in some)))

    print(family, command, distance(one, four) / distance(one, before))
    assert distance(one, four) < 1e-3 * distance(one, before)


@every_cell
def test_a_resumed_run_is_bit_equal(family: str, command: str, hybrid: None) -> None:
    whole, again = straight(family, command, "hybrid"), part(family, command, "hybrid", "hybrid")
    assert losses(again) == losses(whole)[HALF:]
    same(held(whole, LAST), held(again, LAST))


@every_cell
@pytest.mark.parametrize(("before", "after"), [("hybrid", "single"), ("single", "hybrid")])
def test_one_process_and_four_take_over_what_the_other_has(
    family: str, command: str, before: str, after: str, hybrid: None
) -> None:
    taken = part(family, command, after, before, HALF)
    same(held(taken.source, HALF), held(taken, HALF))
