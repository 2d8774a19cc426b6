"""A run directory as a run leaves it, made of small files."""

import json
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints import manifest
from vfun_cli.run import ownership
from vfun_cli.run.rundir import RunDir

CONFIG = {
    "pretrained_model_name_or_path": "model",
    "train_data_meta": "metadata.json",
    "num_processes": 2,
    "num_machines": 1,
    "gradient_accumulation_steps": 1,
}
DESCRIBED = {"command": "train", "family": "cogvideox-fun", "config": CONFIG, "metadata_sha256": "0"}
STATE = {"strategy": "single", "world_size": 1, "family": "cogvideox-fun", "kind": "train", "run_config": CONFIG}


def write_run(run: RunDir, *, steps: tuple[int, ...] = (2, 4), **stated: Any) -> str | None:
    """All files of a run, and checkpoints of these steps; returns the run's id."""
    described = {**DESCRIBED, "id": ownership.new_id(), **stated}
    for path in [
        run.plan_json,
        run.metrics,
        run.bad_step,
        run.report_html,
        *run.files_of_machine(0),
        *run.files_of_rank(1),
        run.sampled_clips / "row-3.mp4",
        *(run.samples(step) / f"row-3{end}" for step in (2, 4) for end in (".json", ".mp4", "-ema.png")),
        run.samples(4) / ".row-5.mp4",
    ]:
        write(path)
    with ownership.noting(run, run.root):
        write(run.sanity_check / "sample-0-video.mp4")
        write(run.tensorboard() / "events.out.tfevents.1700000000.host.1.0")
    write(run.run_json, json.dumps(described))
    for step in steps:
        write_checkpoint(run.checkpoint(step), described["id"])
    return described["id"]


def write_checkpoint(path: Path, run_id: str | None, **state: Any) -> None:
    """A whole one, of a run."""
    write(path / "model" / "model.safetensors", "weights")
    write(path / "state.json", json.dumps({**STATE, "step": manifest.step_of(path), "run_id": run_id, **state}))
    manifest.write_manifest(path)


def write(path: Path, text: str = "") -> Path:
    """A file, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
