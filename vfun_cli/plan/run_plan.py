"""The plan of a run as the training processes read it back from what the launch wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import MetadataError
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.records import Record, read_metadata
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.planning import ENDLESS_EPOCHS, metadata_digest, plan_options, read_dims, total_steps
from vfun_cli.plan.rows import check_rows
from vfun_cli.plan.schedule import RunSegment


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything the plan of a run is a function of, and how many steps it has."""

    spec: FamilySpec
    dims: ModelDims
    table: ClipTable
    options: PlanOptions
    num_epochs: int
    total_steps: int
    records: Mapping[int, Record]
    root: Path | None
    earlier: tuple[RunSegment, ...] = ()
    """Sizes of the steps before this launch, if they differed."""


def _checked_clips(config: RunConfig, spec: FamilySpec, saved: Path) -> ClipTable:
    """The table that the launch saved; from the rows themselves where only the files of a --dry-run were written."""
    if saved.is_file():
        return ClipTable.load(saved)
    report = check_rows(config, spec)
    report.require_ok()
    return report.table()


def load_plan(config: RunConfig, spec: FamilySpec, described: Mapping[str, Any]) -> RunPlan:
    """The plan of a run from what its launch wrote.

    Raises:
        MetadataError: the metadata changed since the launch checked it.
    """
    assert config.train_data_meta is not None
    if metadata_digest(config.train_data_meta) != described["metadata_sha256"]:
        raise MetadataError(
            f"{config.train_data_meta} changed since this run was launched.",
            hint="Start the run again, so that the rows are checked again.",
        )
    table = _checked_clips(config, spec, Path(described["clips"]))
    dims = read_dims(spec, config.pretrained_model_name_or_path)
    records = {record.row: record for record in read_metadata(config.train_data_meta).records}
    earlier = tuple(RunSegment(**entry) for entry in described.get("layouts", ()))
    return RunPlan(
        spec=spec,
        dims=dims,
        table=table,
        options=plan_options(config),
        records=records,
        root=config.train_data_dir,
        num_epochs=ENDLESS_EPOCHS if config.max_train_steps is not None else config.num_train_epochs,
        total_steps=total_steps(config, spec, dims, table, earlier),
        earlier=earlier,
    )
