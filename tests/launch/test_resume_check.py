"""What may change between a run and its continuation when the processes change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import Resolved
from vfun_cli.errors import CheckpointError
from vfun_cli.launch import resume_check
from vfun_cli.plan.planning import metadata_digest

BEFORE = RunConfig(strategy="fsdp", device="cpu", num_processes=4, gradient_accumulation_steps=1)


def described(config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    meta = tmp_path / "meta.json"
    meta.write_text("[]")
    return {"config": config.to_json(), "metadata_sha256": metadata_digest(meta)}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_fewer_processes_accumulate_to_the_same_step(processes: int, accumulation: int, tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    given = {"num_processes": processes}
    after = Resolved(config=replace(BEFORE, strategy="zero3", num_processes=processes), sources={})
    kept = resume_check.keep_step_size(run, after, given)
    assert kept.config.gradient_accumulation_steps == accumulation
    resume_check.check_resume(run, kept.config, ())


def test_a_step_that_cannot_stay_the_same_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = described(BEFORE, tmp_path)
    after = Resolved(config=replace(BEFORE, num_processes=3), sources={})
    kept = resume_check.keep_step_size(run, after, {"num_processes": 3})
    assert kept.config.gradient_accumulation_steps == 1
    resume_check.check_resume(run, kept.config, ())
    said = " ".join(capsys.readouterr().err.split())
    assert "a step now holds 3 micro-batches instead of 4" in said
    assert "planned anew" in said


def test_another_accumulation_on_the_same_processes_is_another_run(tmp_path: Path) -> None:
    run = described(BEFORE, tmp_path)
    with pytest.raises(CheckpointError, match="gradient_accumulation_steps 1 -> 2"):
        resume_check.check_resume(run, replace(BEFORE, gradient_accumulation_steps=2), ())
    resume_check.check_resume(run, replace(BEFORE, gradient_accumulation_steps=2), ["gradient-accumulation-steps"])
