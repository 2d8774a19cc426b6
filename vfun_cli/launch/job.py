"""A job, and how it is decided: devices, data, model, plan, files, command."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli import __version__, console, devices
from vfun_cli.checkpoints.state import read_state
from vfun_cli.config import optimizers
from vfun_cli.config.checks import check_guidance, check_streamed_blocks
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import Resolved
from vfun_cli.errors import CheckpointError, ConfigError, MetadataError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.releases import downloads_named, require_parts
from vfun_cli.families.spec import FamilySpec
from vfun_cli.imports import require_installed
from vfun_cli.launch import interfaces
from vfun_cli.launch.templates import GLOO_INTERFACE, LaunchPlan, plan_launch
from vfun_cli.metadata.checks import Report
from vfun_cli.metadata.records import Metadata
from vfun_cli.metadata.remembered import only_read
from vfun_cli.plan import rows
from vfun_cli.plan.sets import rows_digest
from vfun_cli.run import ownership
from vfun_cli.run.contents import Contents, contents_of
from vfun_cli.run.locate import Found
from vfun_cli.run.rundir import RunDir

if TYPE_CHECKING:
    from vfun_cli.metadata.table import ClipTable
    from vfun_cli.plan.run_plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Job:
    """A launch that is fully decided and not yet started."""

    command: str
    """``train``, ``lora`` or ``cache``."""
    spec: FamilySpec
    resolved: Resolved
    plan: "RunPlan"
    trained: Sequence[tuple[int, ...]]
    """Shapes of the parameters that it trains."""
    run: RunDir
    run_json: Path
    launch: LaunchPlan
    found: Found | None
    """The checkpoint to continue from."""
    run_id: str | None
    """Stated by the run and by every checkpoint it saves; the first version knew none."""
    most: Mapping[str, int]
    """Of processes and machines in any launch of the run."""
    staging: Path | None
    """The folder in memory in which a checkpoint waits while training goes on, of this launch alone."""
    metadata_sha256: str
    """Of the metadata that were checked."""
    validation_sha256: str | None
    """Of those of the rows to validate on, if they have their own."""
    deadline: float | None
    """When --max-hours is over, in seconds since 1970; of a dry run, which may be started by hand at any time, None."""
    contents: Mapping[str, Contents]
    """What the run reads, by the options that name it."""
    allowed: Sequence[Mapping[str, Any]] = ()
    """What changed since the run began and was let pass by --allow: step, option, before, after."""
    prune: bool = False
    """Filling a cache: delete what the plan does not need."""

    @property
    def config(self) -> RunConfig:
        """The resolved options."""
        return self.resolved.config

    def description(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return {
            "schema": 1,
            "vfun": __version__,
            "command": self.command,
            "family": self.spec.name,
            "id": self.run_id,
            "most": dict(self.most),
            "staging": None if self.staging is None else str(self.staging),
            "directory": ownership.identity(self.run.root),
            "run_dir": str(self.run.root.absolute()),
            "config": self.config.absolute().to_json(),
            "sources": self.resolved.sources,
            "clips": str(self.run.clips(self.config.machine_rank).absolute()),
            "rows": str(self.run.rows.absolute()),
            "metadata_sha256": self.metadata_sha256,
            "validation_clips": self._validation_clips(),
            "validation_sha256": self.validation_sha256,
            "contents": {name: each.digest for name, each in self.contents.items()},
            "allowed": list(self.allowed),
            "plan_digest": self.plan.first_epoch.digest(),
            "resume": str(self.found.checkpoint.absolute()) if self.found else None,
            "layouts": [vars(layout) for layout in self.plan.earlier],
            "deadline": self.deadline,
            "prune": self.prune,
        }

    def _validation_clips(self) -> str | None:
        if self.plan.validation_table is None:
            return None
        return str(self.run.validation_clips(self.config.machine_rank).absolute())

    def files(self) -> dict[Path, str]:
        """What the launcher and the training processes read; ``run.json``, which makes a run of them, is the last."""
        run_text = json.dumps(self.description(), indent=1, ensure_ascii=False)
        return {**self.launch.files, self.run_json.absolute(): run_text}

    def plan_summary(self) -> dict[str, Any]:
        """The plan as JSON."""
        from vfun_cli.plan.report import plan_json

        return plan_json(self.plan, [self.plan.first_epoch])


def decide(
    command: str, spec: FamilySpec, resolved: Resolved, *, found: Found | None = None, dry_run: bool = False
) -> Job:
    """Check devices, data and model, and work out everything a launch needs.

    Writes nothing but what it remembers of the files that it read.

    Args:
        dry_run: the job is only to be shown: nothing at all is written, and it may be meant for another machine.

    Raises:
        VfunError: whatever would stop the run later, now.
    """
    config, keeping = resolved.config, only_read if dry_run else nullcontext
    assert config.num_processes is not None
    if not (dry_run and config.num_processes):
        devices.check_processes(config.device, config.num_processes // config.num_machines)
    interface = interface_of(config, dry_run=dry_run)
    check_packages(config)
    if config.pretrained_model_name_or_path is None:
        raise CheckpointError(
            "no model directory is set.",
            hint="Set --pretrained-model-name-or-path or export MODEL_NAME; --demo needs neither.",
        )
    if command == "lora" and config.network_path is not None and found is None:
        from vfun_cli.config.network import check_network  # with numpy, as below

        check_network(config.network_path, config, spec)
    try:
        with keeping():
            report = rows.checked_rows(config, spec)
            validation = rows.validation_table(config, spec)
        if (notice := rows.undrawn_captions(config, report)) is not None:
            console.hint(notice)
        plan = _plan(config, spec, found, report, validation)
    except MetadataError as error:
        raise error.with_command(rows.validate_command(config, spec)) from None
    check_streamed_blocks(config, spec, plan.dims)
    check_guidance(config, spec, plan.dims)
    from vfun_cli.sampling.prompts import videos_of_prompts  # with numpy

    prompts = videos_of_prompts(config, spec, plan.dims)
    if prompts is not None:
        prompts.require_ok()
    check_batch(config, len(plan.table) - int(plan.table.held_out.sum()))
    if not dry_run:
        from vfun_cli.plan.queue import check_shared_memory  # with numpy, as the plan

        check_shared_memory(config, plan)
    from vfun_cli.checkpoints.released import check_weights
    from vfun_cli.families.given import require_given

    with downloads_named(spec, config.pretrained_model_name_or_path):
        require_parts(spec, config.pretrained_model_name_or_path)
        check_weights(config.pretrained_model_name_or_path)
        require_given(spec, config.pretrained_model_name_or_path, config.given_weights)
        trained = _trained(command, config, spec, plan)
    with keeping():
        contents = {} if command == "cache" else _contents(config, spec, report.metadata)
    own_sets = rows.of_validation(config).train_data_meta
    run = RunDir(config.output_dir)
    run_json = run.description(config.machine_rank)
    earlier = ownership.recorded(run.run_json) if found is not None and found.is_in(run) else None
    return Job(
        command=command,
        spec=spec,
        resolved=resolved,
        plan=plan,
        trained=trained,
        run=run,
        run_json=run_json,
        launch=plan_launch(config, spec, run, run_json, interface=interface),
        found=found,
        contents=contents,
        run_id=ownership.new_id() if earlier is None else earlier.get("id"),
        most=ownership.most(config.to_json(), earlier),
        staging=ownership.MEMORY / f"vfun-{ownership.new_id()}" if config.async_checkpoint else None,
        metadata_sha256=rows_digest(config.train_data_meta),
        validation_sha256=rows_digest(own_sets) if own_sets else None,
        deadline=None if config.max_hours is None or dry_run else time.time() + 3600 * config.max_hours,
    )


def interface_of(config: RunConfig, *, dry_run: bool) -> str | None:
    """By which network interface this machine reaches machine 0; None for a machine alone, or where the user says it.

    Raises:
        ConfigError: it reaches none. A dry run, which may be meant for another machine, only says so.
    """
    if config.num_machines == 1 or os.environ.get(GLOO_INTERFACE):
        return None
    try:
        return interfaces.towards(config.main_process_ip, own=config.machine_rank == 0)
    except ConfigError as error:
        if not dry_run:
            raise
        console.warn(f"{error.message} The command that is shown names no {GLOO_INTERFACE}.")
        return None


def _trained(command: str, config: RunConfig, spec: FamilySpec, plan: "RunPlan") -> list[tuple[int, ...]]:
    """Shapes of the parameters that the job trains, as far as the model's files tell; says where an option means
    another thing than it seems to.

    Raises:
        ConfigError: options that choose nothing.
    """
    from vfun_cli.config.trainable import adapter_shapes, choose_from_files  # with numpy, as above

    model_dir = config.pretrained_model_name_or_path
    assert model_dir is not None
    if command == "lora":
        return adapter_shapes(config, model_dir, spec, plan.dims)
    if command == "cache":
        return []
    chosen, shapes = choose_from_files(config.trained_modules, model_dir, spec, plan.dims)
    for notice in chosen.notices:
        console.warn(notice)
    return shapes


def _plan(
    config: RunConfig, spec: FamilySpec, found: Found | None, report: Report, validation: "ClipTable | None"
) -> "RunPlan":
    """The plan of the checked rows, whose first epoch can be planned.

    Raises:
        MetadataError: rows that cannot be trained on.
        CheckpointError: no such model directory.
    """
    dims = read_dims(spec, config.pretrained_model_name_or_path)
    from vfun_cli.plan.held_out import hold_out  # with numpy: not for what is refused until here
    from vfun_cli.plan.run_plan import RunPlan
    from vfun_cli.plan.schedule import earlier_segments

    table = hold_out(config, spec, dims, report.table())
    plan = RunPlan.of(config, spec, dims, table, validation_table=validation)
    if found is not None:
        plan = replace(plan, earlier=earlier_segments(read_state(found.checkpoint), plan.options.slots))
    _ = plan.first_epoch  # raises where no row can be used
    return plan


def _contents(config: RunConfig, spec: FamilySpec, metadata: Metadata) -> dict[str, Contents]:
    """What the run reads; new files are read in samples, which takes a while for many.

    Raises:
        EnvironmentFault: a file cannot be read.
    """
    assert config.pretrained_model_name_or_path is not None
    with rows.progress() as stage:
        return contents_of(
            metadata,
            spec.fields,
            config.train_data_dir,
            config.pretrained_model_name_or_path,
            config.given_weights,
            cache=rows.header_cache(),
            progress=stage("reading samples of files"),
        )


def check_packages(config: RunConfig) -> None:
    """Refuse a tracker or an optimizer whose package is missing, before anything is started.

    Raises:
        EnvironmentFault: with the command that installs it.
    """
    for tracker in config.trackers:
        devices.require_package(f"--report-to {tracker}", tracker)
    optimizer = optimizers.find(config.optimizer)
    if optimizer.module is not None:
        devices.require_package(f"--optimizer {optimizer.name}", optimizer.module, install=optimizer.package)
    elif optimizer.arguments is None:
        require_installed(optimizer.place, "--optimizer")


def check_batch(config: RunConfig, clips: int) -> None:
    """Refuse a micro-batch that no epoch can fill.

    Raises:
        ConfigError: it is larger than the data set.
    """
    repeats = max((math.ceil(each.repeats) for each in config.train_data_meta), default=1)
    if config.train_batch_size > clips * max(1, config.video_repeat) * repeats:
        raise ConfigError(
            f"train_batch_size {config.train_batch_size} cannot be filled: the data set has {clips} clips.",
            hint=f"Use a --train-batch-size of at most {clips}; clips of one micro-batch also share a size.",
        )


def _launch_of(job: Job, config: RunConfig) -> LaunchPlan:
    return plan_launch(config, job.spec, job.run, job.run_json, interface=job.launch.interface)


def with_options(job: Job, resolved: Resolved) -> Job:
    """The same job with other values of options that do not change its plan."""
    return replace(job, resolved=resolved, launch=_launch_of(job, resolved.config))


def continued(job: Job, step: int | None) -> Job:
    """The same job from the checkpoint of this step of its run; from where it began for None."""
    launch = _launch_of(job, job.config)
    found = job.found if step is None else Found(run=job.run, checkpoint=job.run.checkpoint(step), step=step)
    return replace(job, found=found, launch=launch)
