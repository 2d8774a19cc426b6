"""Hybrid sharding, two by two on four processes: every family trains as one process does, resumes bit-equal, and its
checkpoints go on under one process.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.matrix import COMMANDS, Run, losses
from tests.integration.test_kept import forecast, most
from tests.integration.test_kept import held as kept_by_ranks
from tests.integration.test_other_world_sizes import FAMILY, LAYOUTS, Continued, arrays, launch
from vfun_cli import families
from vfun_cli.checkpoints.export import export
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


def accumulated(layout: str) -> Run:
    """A step of twice as many micro-batches."""
    run = straight(FAMILY, "train", layout)
    more = {"gradient_accumulation_steps": 2 * LAYOUTS[layout]["gradient_accumulation_steps"], "max_train_steps": 1}
    return replace(run, name=f"{run.name}-accumulated", options={**run.options, **more})


CELLS = [(family, command) for command in COMMANDS for family in FAMILIES]


@pytest.fixture(scope="session")
def hybrid(workplace: Path) -> None:
    """All runs: one process, four, and one that takes over what the four had."""
    made = [run for cell in CELLS for run in (straight(*cell, "hybrid"), part(*cell, "hybrid", "hybrid"))]
    made += [part(family, command, "hybrid", "single", HALF) for family, command in CELLS if family == FAMILY]
    made.append(accumulated("hybrid"))
    launch([*(straight(*cell, "single") for cell in CELLS), accumulated("single")])
    launch(made)
    launch([part(*cell, "single", "hybrid", HALF) for cell in CELLS])


BESIDE = ("average", "exp_avg", "exp_avg_sq")
every_cell = pytest.mark.parametrize(("family", "command"), CELLS)


def held(run: Run, step: int) -> dict[str, np.ndarray[Any, Any]]:
    return arrays(open_checkpoint(RunDir(run.folder).checkpoint(step)))


def distance(one: Mapping[str, Any], other: Mapping[str, Any], kind: str) -> float:
    """Of all weights, or of all that there is of a kind beside them."""

    def of_the_kind(name: str) -> bool:
        last = name.rpartition(".")[2]
        return last == kind if kind in BESIDE else last not in (*BESIDE, "step")

    assert one.keys() == other.keys()
    names = filter(of_the_kind, one)
    return math.sqrt(sum(np.square(one[name] - other[name], dtype=np.float64).sum() for name in names))


def same(one: Mapping[str, np.ndarray[Any, Any]], other: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert one.keys() == other.keys() and len(one) > 50
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


@every_cell
def test_four_processes_train_as_one_does(family: str, command: str, hybrid: None) -> None:
    alone, shared = straight(family, command, "single"), straight(family, command, "hybrid")
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    one, four, before = held(alone, LAST), held(shared, LAST), held(alone, HALF)
    for kind in ("weight", *BESIDE):
        assert 0 < distance(one, four, kind) < 1e-4 * distance(one, before, kind), kind


def test_groups_sum_their_gradients_once_a_step_and_ranks_those_of_every_micro_batch(hybrid: None) -> None:
    one, four = accumulated("single"), accumulated("hybrid")
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)
    alone, shared, of_half = (held(run, 1) for run in (one, four, straight(FAMILY, "train", "single")))
    assert distance(alone, shared, "exp_avg") < 1e-4 * distance(alone, of_half, "exp_avg")
    two_steps, of_two = (sums_of_rank_0(run) for run in (straight(FAMILY, "train", "hybrid"), four))
    assert two_steps > 0 and of_two == two_steps * 3 / 4  # in a step of one micro-batch each sum is followed by another


def sums_of_rank_0(run: Run) -> int:
    noted = json.loads((RunDir(run.folder).logs / "noted-rank-0.json").read_text())
    return sum(noted["reductions"].values())


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


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exported_as_what_one_process_made_of_it(family: str, hybrid: None, tmp_path: Path) -> None:
    spec, taken = families.find(family), part(family, "train", "single", "hybrid", HALF)
    base = Path("vfun-demo", family, "model", spec.model.config_file).parent
    four, one = (
        export(RunDir(run.folder).checkpoint(HALF), tmp_path / run.name, base_dir=base, names=spec.export.names["same"])
        for run in (taken.source, taken)
    )
    assert four.verified and four.sha256 == one.sha256


@pytest.mark.parametrize("command", COMMANDS)
def test_four_processes_take_over_what_one_has(command: str, hybrid: None) -> None:
    taken = part(FAMILY, command, "hybrid", "single", HALF)
    same(held(taken.source, HALF), held(taken, HALF))
