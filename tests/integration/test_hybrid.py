"""Hybrid sharding, two by two on four processes: every family trains as one process does, resumes bit-equal, and its
checkpoints go on under one process.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.matrix import COMMANDS, Run, losses
from tests.integration.test_kept import forecast, most
from tests.integration.test_kept import held as kept_by_ranks
from tests.integration.test_other_world_sizes import FAMILY, LAYOUTS, Continued, arrays, launch
from vfun_cli import families
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

FAMILIES = tuple(families.FAMILIES)
HALF, LAST = 1, 2
"""The step of the first checkpoint, and the run's end."""
IN_FLOAT32: Mapping[str, Any] = {
    "mixed_precision": "no",
    "adam_epsilon": 1e-4,
    "max_train_steps": LAST,
    "checkpointing_steps": HALF,
    "use_ema": True,
}


def straight(family: str, command: str, layout: str) -> Run:
    return Run(
        name=f"{layout}-{command}-{family}", family=family, strategy=LAYOUTS[layout]["strategy"], command=command,
        options={**IN_FLOAT32, **LAYOUTS[layout]},
    )  # fmt: skip


def part(family: str, command: str, layout: str, before: str, last: int = LAST) -> Continued:
    run = straight(family, command, layout)
    return Continued(
        name=f"{run.name}-after-{before}-to-{last}", family=family, strategy=run.strategy, command=command,
        options={**run.options, "max_train_steps": last}, source=straight(family, command, before), at=HALF,
    )  # fmt: skip


CELLS = [(family, command) for command in COMMANDS for family in FAMILIES]


@pytest.fixture(scope="session")
def hybrid(workplace: Path) -> None:
    """All runs: one process, four, and one that takes over what the four had."""
    made = [run for cell in CELLS for run in (straight(*cell, "hybrid"), part(*cell, "hybrid", "hybrid"))]
    made += [part(family, command, "hybrid", "single", HALF) for family, command in CELLS if family == FAMILY]
    launch([straight(*cell, "single") for cell in CELLS])
    launch(made)
    launch([part(*cell, "single", "hybrid", HALF) for cell in CELLS])


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
    beside = ("average", "exp_avg", "exp_avg_sq", "step")
    kinds = {name: name.rpartition(".")[2] for name in one}
    for kind in {kind if kind in beside else "weight" for kind in kinds.values()} - {"step"}:
        names = [name for name, of in kinds.items() if of == kind or (kind == "weight" and of not in beside)]
        off, way = (
            math.sqrt(sum(np.square(one[name] - others[name], dtype=np.float64).sum() for name in names))
            for others in (four, before)
        )
        assert 0 < off < 1e-4 * way, kind


@every_cell
def test_what_ranks_keep_is_forecast_to_the_byte(family: str, command: str, hybrid: None) -> None:
    run = straight(family, command, "hybrid")
    ranks = kept_by_ranks(run)
    assert len(ranks) == 4
    assert ranks[0] == most(ranks) == forecast(run, 4)


@every_cell
def test_a_resumed_run_is_bit_equal(family: str, command: str, hybrid: None) -> None:
    whole, again = straight(family, command, "hybrid"), part(family, command, "hybrid", "hybrid")
    assert losses(again) == losses(whole)[HALF:]
    same(held(whole, LAST), held(again, LAST))


@every_cell
def test_one_process_takes_over_what_four_have(family: str, command: str, hybrid: None) -> None:
    taken = part(family, command, "single", "hybrid", HALF)
    same(held(taken.source, HALF), held(taken, HALF))


@pytest.mark.parametrize("command", COMMANDS)
def test_four_processes_take_over_what_one_has(command: str, hybrid: None) -> None:
    taken = part(FAMILY, command, "hybrid", "single", HALF)
    same(held(taken.source, HALF), held(taken, HALF))
