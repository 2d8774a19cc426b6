"""The plan of a run as one object: what preview, report, picture and trainer take."""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import MetadataError, RunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.held_out import Dates, HeldOut, held_out_clips, hold_out
from vfun_cli.plan.options import PlanOptions, plan_options
from vfun_cli.plan.rows import checked_rows, of_validation
from vfun_cli.plan.rows import validation_table as checked_validation_table
from vfun_cli.plan.samples import SampleSettings
from vfun_cli.plan.schedule import EpochPlan, RunSegment, count_steps, plan_epoch, plan_run
from vfun_cli.plan.sets import rows_digest

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
    validation_table: ClipTable | None = None
    """Rows of metadata of their own that are validated on; None: those of ``table`` that are held out, if any."""
    dates: Dates | None = None
    """When the run validates; None: never."""
    averages: bool = False
    """Whether it does so with the moving average of the weights too."""
    samples: SampleSettings | None = None
    """How it makes videos then of the rows that are validated on; None: not at all."""
    data_sets: tuple[str, ...] = ()
    """What its data sets are called."""

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
        validation_table: ClipTable | None = None,
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
            validation_table=validation_table,
            dates=Dates.of(config),
            averages=config.use_ema,
            samples=SampleSettings.of(config, spec),
            data_sets=tuple(str(each.meta) for each in config.train_data_meta),
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

    @cached_property
    def held_out(self) -> HeldOut | None:
        """What the held-out loss is computed on; None where no row is held out."""
        table = self.validation_table
        if table is None:
            rows = np.flatnonzero(self.table.held_out)
            table = ClipTable(**{name: column[rows] for name, column in vars(self.table).items()})
        return held_out_clips(self.spec, self.dims, self.options, table) if len(table) else None

    def validations(self) -> Iterator[int]:
        """The steps after which the run validates, ascending; 0 is before the first."""
        if self.dates is None:
            return
        total, every = self.steps(), self.dates.steps
        by_steps = range(every, total, every) if every is not None else ()
        by_epochs = takewhile(lambda step: step < total, self.dates.ends(self.epochs()))
        yield from (step for step, _ in groupby(heapq.merge((0,), by_steps, by_epochs, (total,))))

    def steps_between_validations(self) -> int | None:
        """Steps from one to the next, as far as the first epoch tells; None where it has none."""
        if self.dates is None:
            return None
        epochs = None if self.dates.epochs is None else self.dates.epochs * self.first_epoch.num_steps
        return min((number for number in (self.dates.steps, epochs, self.steps()) if number), default=None)


def load_plan(config: RunConfig, spec: FamilySpec, described: Mapping[str, Any]) -> RunPlan:
    """The plan of a run as its processes read it back from what the launch wrote.

    Args:
        described: the content of ``run.json``.

    Raises:
        MetadataError: the metadata changed since the launch checked it.
        RunError: the plan is another than the launch showed.
    """
    for sets, digest in (
        (config.train_data_meta, described["metadata_sha256"]),
        (of_validation(config).train_data_meta, described.get("validation_sha256")),
    ):
        if sets and rows_digest(sets) != digest:
            raise MetadataError(
                f"{', '.join(str(each.meta) for each in sets)} changed since this run was launched.",
                hint="Start the run again, so that the rows are checked again.",
            )
    dims = read_dims(spec, config.pretrained_model_name_or_path)
    table, validation_table = _saved_table(config, spec, dims, described)
    earlier = tuple(RunSegment(**entry) for entry in described.get("layouts", ()))
    plan = RunPlan.of(config, spec, dims, table, earlier=earlier, validation_table=validation_table)
    saved, shown = described["clips"], described.get("plan_digest")
    if shown is not None and replace(plan).first_epoch.digest() != shown:  # of a copy, which does not keep the epoch
        raise RunError(
            f"this process plans other steps than the launch showed, from the clips in {saved}.",
            hint="Start the run again. If that is no cure, it is a fault of vfun or of the machine; please report it.",
        )
    return plan


def _saved_table(
    config: RunConfig, spec: FamilySpec, dims: ModelDims, described: Mapping[str, Any]
) -> tuple[ClipTable, ClipTable | None]:
    """The clips to train on and, where they have metadata of their own, those to validate on, as the launch saved them.

    Raises:
        MetadataError: only the files of a ``--dry-run`` were written, and the rows are no good.
    """
    saved, validation = Path(described["clips"]), described.get("validation_clips")
    if saved.is_file():
        return ClipTable.load(saved), None if validation is None else ClipTable.load(Path(validation))
    table = hold_out(config, spec, dims, checked_rows(config, spec).table())
    return table, checked_validation_table(config, spec)
