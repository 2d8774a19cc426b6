"""``--resume-from-checkpoint latest`` as a job script has it, which is queued again and again."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.commands.conftest import QUICK, TRAIN, Vfun
from vfun_cli.errors import RunError
from vfun_cli.launch import supervise
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir

RUN = RunDir(Path("vfun-demo/output_dir"))
LATEST = ("--resume-from-checkpoint", "latest")
NOTICE = "There is no checkpoint in vfun-demo/output_dir yet: the run begins anew."


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "launch", lambda *args, **named: Outcome(ending="completed", step=1))


@pytest.mark.slow
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


@pytest.fixture
def fails_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: object, way_on: object, **named: object) -> Outcome:
        RUN.logs.mkdir(parents=True, exist_ok=True)
        RUN.rank_error(0).write_text("{}")
        RUN.listening().write_text("")
        assert callable(way_on)
        raise RunError("rank 0 failed.", hint=way_on())

    monkeypatch.setattr(supervise, "launch", launch)


def test_a_launch_that_failed_before_its_first_step_is_in_nobodys_way(
    place: Path, vfun: Vfun, fails_while_loading: None
) -> None:
    for _ in range(2):
        said = vfun(*TRAIN)
        assert said.code == 1 and "the same command begins anew" in said.err, said.err
    mine = RUN.root / "notes.txt"
    mine.write_text("mine")
    identities = [json.loads(RUN.run_json.read_text())["id"]]
    assert vfun(*TRAIN).code == 1 and mine.read_text() == "mine"
    identities.append(json.loads(RUN.run_json.read_text())["id"])
    assert len(set(identities)) == 2


@pytest.mark.parametrize("result", ["a step", "a sample", "a checkpoint"])
def test_what_a_run_made_is_in_the_way(result: str, place: Path, vfun: Vfun, fails_while_loading: None) -> None:
    vfun(*TRAIN)
    if result == "a step":
        RUN.metrics.write_text('{"step": 1}\n')
    (RUN.samples(1) if result == "a sample" else RUN.root / "x").mkdir(parents=True)
    if result == "a checkpoint":
        RUN.checkpoint(1).mkdir()
    before = RUN.run_json.read_bytes()
    said = vfun(*TRAIN)
    assert said.code == 2 and "already holds a run" in said.err and RUN.run_json.read_bytes() == before, said.err


@pytest.mark.slow
def test_the_next_try_after_weights_that_do_not_fit_needs_no_overwrite(place: Path, vfun: Vfun) -> None:
    file = next(Path("vfun-demo/wan-s2v/model").glob("diffusion_pytorch_model*.safetensors"))
    shutil.copy2(file, "whole")
    tensors = load_file(file)
    tensors[max(tensors)] = tensors[max(tensors)][:1].clone()  # what shape it should have, the training processes know
    save_file(tensors, file)
    command = (*TRAIN, *QUICK, "--max-train-steps", "1")
    said = vfun(*command)
    assert said.code != 0 and RUN.run_json.is_file(), said.err
    shutil.copy2("whole", file)
    again = vfun(*command)
    assert again.code == 0, again.err
