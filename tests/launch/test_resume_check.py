"""What may change between a run and its continuation when the processes change."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import Resolved
from vfun_cli.errors import CheckpointError
from vfun_cli.launch import resume_check
from vfun_cli.metadata.records import metadata_digest
from vfun_cli.run.locate import Found
from vfun_cli.run.rundir import RunDir

BEFORE = RunConfig(strategy="fsdp", device="cpu", num_processes=4, gradient_accumulation_steps=1)

FOUND = Found(run=RunDir(Path("my run")), checkpoint=Path("my run/checkpoint-2"), step=2)


def described(config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    meta = tmp_path / "meta.json"
    meta.write_text("[]")
    return {"config": config.to_json(), "metadata_sha256": metadata_digest(meta)}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_fewer_processes_accumulate_to_the_same_step(processes: int, accumulation: int, tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    after = Resolved(config=replace(BEFORE, strategy="zero3", num_processes=processes), sources={})
    kept = resume_check.keep_step_size(run, after)
    assert kept.config.gradient_accumulation_steps == accumulation
    resume_check.check_resume(FOUND, run, kept.config, ())


def test_a_step_that_cannot_stay_the_same_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = described(BEFORE, tmp_path)
    after = Resolved(config=replace(BEFORE, num_processes=3), sources={})
    kept = resume_check.keep_step_size(run, after)
    assert kept.config.gradient_accumulation_steps == 1
    resume_check.check_resume(FOUND, run, kept.config, ())
    said = " ".join(capsys.readouterr().err.split())
    assert "a step now holds 3 micro-batches instead of 4" in said
    assert "planned anew" in said


def test_another_accumulation_on_the_same_processes_is_another_run(tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    with pytest.raises(CheckpointError, match="gradient_accumulation_steps 1 -> 2"):
        resume_check.check_resume(FOUND, run, replace(BEFORE, gradient_accumulation_steps=2), ())
    allow = ["gradient-accumulation-steps"]
    resume_check.check_resume(FOUND, run, replace(BEFORE, gradient_accumulation_steps=2), allow)


def test_an_accumulation_that_was_typed_stays_and_so_do_the_steps_of_as_many_processes(tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    typed = Resolved(config=replace(BEFORE, num_processes=2), sources={"gradient_accumulation_steps": "option"})
    assert resume_check.keep_step_size(run, typed) == typed
    same = Resolved(config=replace(BEFORE, gradient_accumulation_steps=2), sources={})
    assert resume_check.keep_step_size(run, same) == same


def test_the_hint_is_the_whole_command_that_goes_on_all_the_same(tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    after = replace(BEFORE, learning_rate=0.5, uniform_sampling=not BEFORE.uniform_sampling, max_train_steps=9)
    with pytest.raises(CheckpointError) as caught:
        resume_check.check_resume(FOUND, run, after, ["uniform-sampling"])
    switch = "--uniform-sampling" if after.uniform_sampling else "--no-uniform-sampling"
    command = str(caught.value.hint).partition("mean it: ")[2]
    changed = ["--learning-rate", "0.5", switch, "--max-train-steps", "9"]
    allowed = ["--allow", "learning-rate", "--allow", "uniform-sampling"]
    assert sorted(shlex.split(command)) == sorted(["vfun", "resume", "my run/checkpoint-2", *changed, *allowed])
