"""Starts a run whose clips no file holds: ``made_up FAMILY [COMMAND RUN_DIR OPTIONS_JSON [SIDE]]`` (``python -m``).

The run is a real one, from the launcher to its last checkpoint, but for two things that its ranks do otherwise
(``rank.py``): pixels and sound are drawn instead of decoded, so that PyAV is not needed, and a step that waits for the
device is an error. Clips are of the demo's sizes, or squares of SIDE pixels. With a family alone, its demo is made.
"""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli import console, families
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import VfunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch.job import Job
from vfun_cli.launch.start import start
from vfun_cli.launch.templates import LaunchPlan, plan_launch
from vfun_cli.metadata.records import metadata_digest
from vfun_cli.run import ownership
from vfun_cli.run.rundir import RunDir

if TYPE_CHECKING:
    from vfun_cli.metadata.table import ClipTable

OPTIONS = {"strategy": "single", "num_processes": 1, "mixed_precision": "no", "dataloader_num_workers": 0}
"""What is not said otherwise."""


def main(argv: list[str]) -> int:
    """Make a demo, or start a run of it; returns the exit code."""
    spec = families.find(argv[0])
    try:
        if len(argv) == 1:
            make_demo(spec)
            return 0
        command, run_dir, options, *side = argv[1:]
        job = job_of(command, spec, Path(run_dir), json.loads(options), *map(int, side))
        return start(job, announce=lambda job: None).exit_code
    except VfunError as error:
        console.report(error)
        return error.exit_code


def make_demo(spec: FamilySpec) -> None:
    """The demo's model, and its media where they can be encoded."""
    if find_spec("av"):
        demo_default.make(spec)
    else:
        demo_default.make_model(spec)


def job_of(command: str, spec: FamilySpec, run_dir: Path, options: dict[str, Any], side: int | None = None) -> Job:
    """A run of the demo's model on clips as long as the demo's.

    Args:
        options: of the run, by name.
        side: of the clips in pixels; by default they are as large as the demo's.
    """
    from vfun_cli.plan.run_plan import RunPlan

    data = run_dir.with_name(f"{run_dir.name}-data")
    metadata = data / "metadata.json"
    table = _write_clips(spec, metadata, side)
    demo = {
        **spec.defaults.demo,
        "pretrained_model_name_or_path": demo_default.make_model(spec),
        "train_data_dir": data,
        "train_data_meta": metadata,
    }
    given = {**OPTIONS, "report_to": "none", "output_dir": run_dir, **options}
    resolved = resolve(command, spec, given, demo=demo, environ={}, directory=data)
    config, run = resolved.config, RunDir(run_dir)
    launch = plan_launch(config, spec, run, run.run_json)
    return Job(
        command=command, spec=spec, resolved=resolved, run=run, run_json=run.run_json, found=None, contents={},
        plan=RunPlan.of(config, spec, read_dims(spec, config.pretrained_model_name_or_path), table),
        launch=_by_own_rank(launch), run_id=ownership.new_id(), most=ownership.most(config.to_json()), staging=None,
        metadata_sha256=metadata_digest(metadata), validation_sha256=None, deadline=None, trained=(),
    )  # fmt: skip


def _by_own_rank(launch: LaunchPlan) -> LaunchPlan:
    """The same launch of the ranks of ``rank.py``."""
    ranks = {"vfun_cli.training": "vfun_cli.acceptance.rank"}
    return replace(launch, argv=[ranks.get(word, word) for word in launch.argv])


def _write_clips(spec: FamilySpec, metadata: Path, side: int | None) -> "ClipTable":
    """Rows of files that are not there; returns what reading them would find."""
    from vfun_cli.demo.media import CLIPS
    from vfun_cli.metadata.table import ClipTable

    rows = [
        {field.name: f"{field.name}-{number}" for field in spec.fields} | {"text": clip.text, "type": "video"}
        for number, clip in enumerate(CLIPS)
    ]
    metadata.parent.mkdir(parents=True)
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return ClipTable.from_columns(
        width=[side or clip.width for clip in CLIPS],
        height=[side or clip.height for clip in CLIPS],
        frames=[clip.frames for clip in CLIPS],
        fps=[clip.fps.as_integer_ratio() for clip in CLIPS],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
