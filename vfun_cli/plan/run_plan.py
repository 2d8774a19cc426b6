"""The plan of a run as one object: what preview, report, picture and trainer take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import MetadataError, RunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.records import metadata_digest
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.rows import check_rows
from vfun_cli.plan.schedule import EpochPlan, RunSegment, count_steps, plan_epoch, plan_run

ENDLESS_EPOCHS = 1_000_000
"""Epochs planned lazily when only the step limit ends a run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """Everything the plan of a run is a function of, and what it gives."""

    spec: FamilySpec
    dims: ModelDims
    options: PlanOptions
    table: ClipTable
    """Empty where no clips are known yet; the sizes are."""
    num_epochs: int = ENDLESS_EPOCHS
    max_steps: int | None = None
    """The step limit."""
    earlier: tuple[RunSegment, ...] = ()
    """Sizes of the steps before this launch, if they differed."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        spec: FamilySpec,
        dims: ModelDims,
        table: ClipTable,
        *,
        world_size: int | None = None,
        earlier: tuple[RunSegment, ...] = (),
    ) -> "RunPlan":
        """The plan that a run of this configuration executes, by default on its own number of ranks."""
        return cls(
            spec=spec,
            dims=dims,
            options=plan_options(config, world_size),
            table=table,
            num_epochs=config.num_train_epochs if config.max_train_steps is None else ENDLESS_EPOCHS,
            max_steps=config.max_train_steps,
            earlier=earlier,
        )

    def epochs(self) -> Iterator[EpochPlan]:
        """Its epochs one by one, the step limit left out; one in which the step size changed comes in two parts.

        Raises:
            ConfigError: options that cannot work.
            MetadataError: no row can be used.
        """
        return plan_run(self.spec, self.dims, self.table, self.options, self.num_epochs, self.earlier)

    def steps(self) -> int:
        """Optimizer steps of the run: the step limit if there is one, else what the epochs hold."""
        return self._counted_steps if self.max_steps is None else self.max_steps

    @cached_property
    def _counted_steps(self) -> int:
        return count_steps(self.spec, self.dims, self.table, self.options, self.num_epochs, self.earlier)

    @cached_property
    def first_epoch(self) -> EpochPlan:
        """The first epoch under the step size of this launch: what is shown before it starts."""
        return plan_epoch(self.spec, self.dims, self.table, self.options, 0, complete=self.num_epochs == 1)


def load_plan(config: RunConfig, spec: FamilySpec, described: Mapping[str, Any]) -> RunPlan:
    """The plan of a run as its processes read it back from what the launch wrote.

    Args:
        described: the content of ``run.json``.

    Raises:
        MetadataError: the metadata changed since the launch checked it.
        RunError: the plan is another than the launch showed.
    """
    assert config.train_data_meta is not None
    if metadata_digest(config.train_data_meta) != described["metadata_sha256"]:
        raise MetadataError(
            f"{config.train_data_meta} changed since this run was launched.",
            hint="Start the run again, so that the rows are checked again.",
        )
    saved = Path(described["clips"])
    if saved.is_file():
        table = ClipTable.load(saved)
    else:  # only the files of a --dry-run were written
        report = check_rows(config, spec)
        report.require_ok()
        table = report.table()
    earlier = tuple(RunSegment(**entry) for entry in described.get("layouts", ()))
    plan = RunPlan.of(config, spec, read_dims(spec, config.pretrained_model_name_or_path), table, earlier=earlier)
    shown = described.get("plan_digest")
    if shown is not None and replace(plan).first_epoch.digest() != shown:  # of a copy, which does not keep the epoch
        raise RunError(
            f"this process plans other steps than the launch showed, from the clips in {saved}.",
            hint="Start the run again. If that is no cure, it is a fault of vfun or of the machine; please report it.",
        )
    return plan
