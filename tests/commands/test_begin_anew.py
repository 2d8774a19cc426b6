"""``--resume-from-checkpoint latest`` as a job script has it, which is queued again and again."""

import json
from pathlib import Path

import pytest

from tests.commands.conftest import TRAIN, Vfun
from vfun_cli.launch import supervise
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir

RUN = RunDir(Path("vfun-demo/output_dir"))
LATEST = ("--resume-from-checkpoint", "latest")
NOTICE = "There is no checkpoint in vfun-demo/output_dir yet: the run begins anew."


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "launch", lambda *args, **named: Outcome(ending="completed", step=1))


@pytest.mark.parametrize("earlier", [False, True], ids=["the first time", "after a try that saved nothing"])
def test_latest_begins_anew_where_nothing_was_saved(earlier: bool, place: Path, vfun: Vfun, never_trains: None) -> None:
    if earlier:
        RUN.logs.mkdir(parents=True)
        RUN.run_json.write_text("{}")
    said = vfun(*TRAIN, *LATEST)
    assert said.code == 0 and NOTICE in said.err, said.err
    described = json.loads(RUN.run_json.read_text())
    assert described["family"] == "wan-s2v" and described["resume"] is None


def test_a_checkpoint_that_is_named_must_be_there(place: Path, vfun: Vfun) -> None:
    said = vfun(*TRAIN, "--resume-from-checkpoint", "checkpoint-500")
    assert said.code == 5 and "there is no checkpoint-500" in said.err


def test_latest_does_not_begin_anew_over_damaged_checkpoints(place: Path, vfun: Vfun) -> None:
    RUN.checkpoint(500).mkdir(parents=True)
    said = vfun(*TRAIN, *LATEST)
    assert said.code == 5 and "checkpoint-500 has no valid manifest.json" in said.err, said.err
    assert RUN.checkpoint(500).is_dir()
