"""What the first version wrote into run directories and checkpoints is still read: its runs continue."""

import hashlib
import json
from pathlib import Path

import pytest

from vfun_cli.checkpoints.state import read_state
from vfun_cli.config.options import RunConfig
from vfun_cli.launch.resume_check import continuation, earlier_run, resolve_as_before
from vfun_cli.plan.schedule import earlier_segments
from vfun_cli.run import ownership
from vfun_cli.run.locate import Found
from vfun_cli.run.rundir import RunDir

WRITTEN = Path(__file__).with_name("first_version")
"""run.json and state.json of two runs; ROOT stands for the folder they ran in."""


@pytest.fixture(params=["train", "lora"])
def found(request: pytest.FixtureRequest, tmp_path: Path) -> Found:
    """A checkpoint of a run of the first version, as far as a continuation is decided by it."""
    text = (WRITTEN / f"{request.param}.json").read_text(encoding="utf-8").replace("ROOT", str(tmp_path))
    content = json.loads(text)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    meta = tmp_path / "metadata.json"
    meta.write_text("[]")
    content["run.json"]["config"]["train_data_meta"] = str(meta)
    content["run.json"]["metadata_sha256"] = hashlib.sha256(b"[]").hexdigest()
    (tmp_path / "run" / "run.json").write_text(json.dumps(content["run.json"]))
    (checkpoint / "state.json").write_text(json.dumps(content["state.json"]))
    return Found(run=RunDir(tmp_path / "run"), checkpoint=checkpoint, step=4)


def test_a_run_of_the_first_version_continues_with_its_options(found: Found) -> None:
    described = found.run.read_run()
    run = earlier_run(found)
    command, spec, resolved = resolve_as_before(run, {"max_train_steps": 6})
    kept = continuation(run, command, spec, resolved).config
    assert (command, spec.name) == (described["command"], described["family"])
    assert ownership.may_go(found.checkpoint, described.get("id")), "the checkpoint is its run's"
    expected = described["config"] | {"output_dir": str(found.run.root), "max_train_steps": 6}
    newer = {name: default for name, default in RunConfig().to_json().items() if name not in expected}
    assert kept.to_json() == expected | newer
    assert len(expected) > 60


def test_the_training_processes_read_what_the_first_version_wrote(found: Found) -> None:
    described, state = found.run.read_run(), read_state(found.checkpoint)
    config = RunConfig.from_json(described["config"])
    assert {"strategy", "world_size", "family", "kind", "layouts", "run_config", "step"} <= set(state)
    slots = state["world_size"] * config.gradient_accumulation_steps
    assert not earlier_segments(state, slots)
    (later,) = earlier_segments(state, slots + 1)
    assert (later.until, later.slots) == (4, slots)
