"""Something goes wrong on one of several machines: what the others say, when they end, and what becomes of the run."""

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.machine_deaths import (
    CASES,
    NOTICED,
    SAVED_EVERY,
    STEPS,
    Case,
    Ending,
    Trained,
    loading,
    performed,
    undisturbed,
)
from vfun_cli.run.messages import MachineReport
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

SHORT = ("machine frozen", "rank killed and restarted", "SIGTERM", "shared disk full", "all otherwise")
"""Each way of ending once; the rest takes minutes."""


def happens(case: Case) -> Ending:
    """Machines that refuse to begin leave nothing that a second command could go on from."""
    return performed(case, place_of(case.name), Path("vfun-demo"), again=case.harm is not None)


def place_of(name: str) -> Path:
    return Path("machine-deaths") / name.replace(" ", "-")


def reference() -> Trained:
    return undisturbed(place_of("undisturbed"), Path("vfun-demo"))


@pytest.fixture(scope="session")
def straight(workplace: Path, pool: ThreadPoolExecutor) -> "Future[Trained]":
    """What the run comes to where nothing happens."""
    return pool.submit(reference)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[
                pytest.mark.ahead.with_args(happens, case, needs=None),
                *([] if case.name in SHORT else [pytest.mark.long]),
            ],
        )
        for case in CASES
    ],
)
def test_all_machines_end_alike_and_the_run_goes_on_to_the_same_bits(
    case: Case, result: Ending, straight: "Future[Trained]"
) -> None:
    *others, harmed = result.said
    for said in others:
        assert said.code == case.code, said.err
        assert re.search(case.says, " ".join(said.err.split())), said.err
    assert harmed.code in (case.code, -9)
    if case.code and case.harm is not None:
        assert max(result.seconds) < 3 * NOTICED, "on a machine that does much else"
    run = RunDir(place_of(case.name) / "shared" / "run")
    if case.disk is None and case.harm is None:  # what is there is machine 0's
        described = json.loads(run.run_json.read_text(encoding="utf-8"))
        assert json.loads(run.plan_json.read_text(encoding="utf-8"))["digest"] == described["plan_digest"]
        assert described["config"]["machine_rank"] == 0
    if case.code == 0:
        reports = [MachineReport.read(run, number) for number in range(case.machines)]
        assert [said and said.attempt for said in reports] == [2] * case.machines
    if case.harm is not None:
        assert result.steps[:1] == ([] if case.after is loading else [SAVED_EVERY]), "what was saved is there, whole"
        assert case.machines > 2 or result.became == straight.result()
        assert result.became is not None and len(result.became.losses) == STEPS
    else:
        assert not result.steps
