"""Runs of the integration tests: what to train, launched once per strategy and kept for the whole session."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfun_cli import families, launching
from vfun_cli.demo import default as demo_default
from vfun_cli.locate import Found
from vfun_cli.resolve import resolve
from vfun_cli.rundir import RunDir, write_atomically

ROOT = Path(__file__).parents[2]
STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
STEPS = 24
LAUNCH_TIMEOUT = 1500
"""Seconds; a launch of all families takes about two minutes on two quiet cores."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the matrix."""

    name: str
    family: str
    strategy: str
    command: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    resume_from: str | None = None
    """Name of an earlier run of the same launch, continued from its checkpoint at half the steps."""

    @property
    def folder(self) -> Path:
        return Path("runs") / self.strategy / self.name


def memorised(family: str) -> dict[str, Any]:
    """Options that train one clip of the demo over and over, at the smallest size."""
    return {
        "train_data_meta": f"vfun-demo/{family}/data/one-clip.json",
        "video_sample_size": 64,
        "image_sample_size": 64,
        "token_sample_size": 64,
        "video_sample_n_frames": 8 if family == "wan-s2v" else 9,
        "dataloader_num_workers": 1,
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS // 2,
        "lr_scheduler": "constant",
    }


def prepare_demo() -> None:
    """The demo of every family in the working directory, with a one-clip metadata file beside each."""
    for spec in families.FAMILIES.values():
        layer = demo_default.make(spec)
        rows = json.loads(Path(layer["train_data_meta"]).read_text(encoding="utf-8"))
        videos = [row for row in rows if row["type"] == "video"]
        Path(layer["train_data_dir"], "one-clip.json").write_text(json.dumps(videos[:1]), encoding="utf-8")


def write_run(run: Run) -> Path:
    """Everything that ``vfun train`` writes before it starts the processes; the path of run.json."""
    spec = families.find(run.family)
    given = {**memorised(run.family), **run.options, "strategy": run.strategy, "output_dir": run.folder}
    resolved = resolve(run.command, spec, given, demo=demo_default.make(spec), environ={})
    found = None
    if run.resume_from is not None:
        source = RunDir(Path("runs") / run.strategy / run.resume_from)
        found = Found(run=source, checkpoint=source.checkpoint(STEPS // 2), step=STEPS // 2)
    job = launching.decide(run.command, spec, resolved, found=found)
    for path, text in job.launch.files.items():
        write_atomically(path, text)
    job.source.table.save(job.run.clips())
    write_atomically(job.run_json, json.dumps(job.description()))
    return job.run_json.absolute()


def launch(runs: Sequence[Run]) -> None:
    """Train the runs of one strategy inside one launch, in order.

    Raises:
        AssertionError: a run failed; the message ends with the launch's output.
    """
    files = [write_run(run) for run in runs]
    list_file = Path("runs") / f"{runs[0].strategy}-{runs[0].name}.json".replace("/", "-")
    list_file.write_text(json.dumps([str(path) for path in files]), encoding="utf-8")
    argv = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(RunDir(files[0].parent).launch() / "accelerate.yaml"),
        "-m", "tests.integration.worker", str(list_file.absolute()),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        argv, capture_output=True, text=True, env=environment, timeout=LAUNCH_TIMEOUT, check=False
    )
    if done.returncode:
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in Path("runs").rglob("error-rank-*.json"))
        raise AssertionError(f"launch of {list_file} failed\n{done.stderr[-6000:]}\n{logs}")


def losses(run: Run) -> list[float]:
    """Loss of each step, from metrics.jsonl."""
    lines = RunDir(run.folder).metrics.read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]
