"""``vfun cache`` starts as train does: alone in its folder, again after a crash, with the exit code of how it ended."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Vfun
from vfun_cli.launch import job
from vfun_cli.launch.templates import LaunchPlan

CACHE = ("cache", "wan-s2v", "--demo", "--cache", "latents")
RANK = """
import sys
from pathlib import Path
from vfun_cli.errors import ConfigError
from vfun_cli.run import lock
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir
run, ending, marker = RunDir(Path(sys.argv[1])), sys.argv[2], Path("crashed")
try:
    with lock.held(run, 0):
        print("nobody holds the folder", file=sys.stderr)
        sys.exit(2)
except ConfigError:
    pass
if ending == "crashed once" and not marker.exists():
    marker.touch()
    sys.exit("the first launch ends badly")
Outcome(ending=ending.replace("crashed once", "completed"), step=3).write(run)
"""


@pytest.fixture
def ranks_that_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of the launcher and its ranks: a process that says how they ended."""

    def end(ending: str) -> None:
        def plan(config: Any, spec: Any, run: Any, run_json: Any, **others: Any) -> LaunchPlan:
            return LaunchPlan(files={}, argv=[sys.executable, "-c", RANK, str(run.root.absolute()), ending])

        monkeypatch.setattr(job, "plan_launch", plan)

    return end


@pytest.mark.parametrize(("ending", "code"), [("completed", 0), ("preempted", 75), ("interrupted", 130)])
def test_the_exit_code_says_how_the_fill_ended(ending: str, code: int, ranks_that_end: Any, vfun: Vfun) -> None:
    ranks_that_end(ending)
    said = vfun(*CACHE, "--json")
    assert said.code == code, said.err
    assert json.loads(said.out) | {"bytes": 0} == {
        "schema": 1, "cache": "latents", "complete": code == 0, "encoded": 3, "bytes": 0,
    }  # fmt: skip
    assert ("goes on from here" in said.err) == (code != 0)
    assert not [*Path("latents/fill").iterdir()]


@pytest.mark.slow
def test_a_crashed_fill_is_launched_again_as_often_as_is_allowed(ranks_that_end: Any, vfun: Vfun) -> None:
    ranks_that_end("crashed once")
    said = vfun(*CACHE)
    assert said.code == 1 and "ends badly" in said.err, said.err
    (logs,) = Path("latents/fill").iterdir()
    assert (logs / "logs" / "launcher.log").is_file()
    Path("crashed").unlink()
    said = vfun(*CACHE, "--max-restarts", "1")
    assert said.code == 0 and "restart 1 of 1, from the beginning" in said.err, said.err
