"""One launch, from resolved options to a running job: shared by train, lora and resume."""

import json
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from vfun_cli import __version__, console, devices
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.released import check_weights
from vfun_cli.checkpoints.state import read_state
from vfun_cli.config.lora import check_network
from vfun_cli.config.options import RunConfig, options
from vfun_cli.config.resolve import Resolved
from vfun_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, CheckpointError, ConfigError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch import supervise
from vfun_cli.launch.preemption import NothingToSave
from vfun_cli.launch.templates import LaunchPlan, plan_launch
from vfun_cli.plan.planning import earlier_segments, metadata_digest
from vfun_cli.plan.preview import preview
from vfun_cli.plan.report import plan_json
from vfun_cli.plan.rows import PlanInput, plan, plan_input
from vfun_cli.plan.schedule import EpochPlan, RunSegment
from vfun_cli.run import lock
from vfun_cli.run.locate import Found
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir, clear, ensure_writable, refuse_used, write_atomically


@dataclass(frozen=True, kw_only=True)
class Job:
    """A launch that is fully decided and not yet started."""

    command: str
    """``train``, ``lora`` or ``cache``."""
    spec: FamilySpec
    resolved: Resolved
    source: PlanInput
    plans: list[EpochPlan]
    run: RunDir
    run_json: Path
    launch: LaunchPlan
    found: Found | None
    """The checkpoint to continue from."""
    deadline: float | None
    """When --max-hours is over, in seconds since 1970."""
    prune: bool = False
    """Filling a cache: delete what the plan does not need."""

    @property
    def config(self) -> RunConfig:
        """The resolved options."""
        return self.resolved.config

    def earlier(self) -> list[RunSegment]:
        """Sizes of the steps before the checkpoint, where they differ from this launch's."""
        return earlier_segments(read_state(self.found.checkpoint), self.source.options.slots) if self.found else []

    def description(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        assert self.config.train_data_meta is not None
        return {
            "schema": 1,
            "vfun": __version__,
            "command": self.command,
            "family": self.spec.name,
            "run_dir": str(self.run.root.absolute()),
            "config": self.config.to_json(),
            "sources": self.resolved.sources,
            "clips": str(self.run.clips(self.config.machine_rank).absolute()),
            "metadata_sha256": metadata_digest(self.config.train_data_meta),
            "plan_digest": self.plans[0].digest(),
            "resume": str(self.found.checkpoint.absolute()) if self.found else None,
            "layouts": [vars(layout) for layout in self.earlier()],
            "deadline": self.deadline,
            "prune": self.prune,
        }


def decide(command: str, spec: FamilySpec, resolved: Resolved, *, found: Found | None = None) -> Job:
    """Check devices, data and model, and work out everything a launch needs. Writes nothing.

    Raises:
        VfunError: whatever would stop the run later, now.
    """
    config = resolved.config
    assert config.num_processes is not None
    devices.check_processes(config.device, config.num_processes // config.num_machines)
    check_trackers(config)
    if config.pretrained_model_name_or_path is None:
        raise CheckpointError(
            "no model directory is set.",
            hint="Set --pretrained-model-name-or-path or export MODEL_NAME; --demo needs neither.",
        )
    if command == "lora" and config.network_path is not None and found is None:
        check_network(config.network_path, config)
    source = plan_input(config, spec)
    check_batch(config, len(source.table))
    check_weights(config.pretrained_model_name_or_path)
    run = RunDir(config.output_dir)
    run_json = run.run_json if config.machine_rank == 0 else run.launch(config.machine_rank) / "run.json"
    return Job(
        command=command,
        spec=spec,
        resolved=resolved,
        source=source,
        plans=plan(source, 1),
        run=run,
        run_json=run_json,
        launch=plan_launch(config, spec, run, run_json),
        found=found,
        deadline=time.time() + 3600 * config.max_hours if config.max_hours is not None else None,
    )


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is missing, before anything is started.

    Raises:
        EnvironmentFault: with the command that installs it.
    """
    devices.require_package(config.report_to, {"tensorboard": "tensorboard", "wandb": "wandb"})


def check_batch(config: RunConfig, clips: int) -> None:
    """Refuse a micro-batch that no epoch can fill.

    Raises:
        ConfigError: it is larger than the data set.
    """
    if config.train_batch_size > clips * max(1, config.video_repeat):
        raise ConfigError(
            f"train_batch_size {config.train_batch_size} cannot be filled: the data set has {clips} clips.",
            hint=f"Use a --train-batch-size of at most {clips}; clips of one micro-batch also share a size.",
        )


def show(job: Job) -> None:
    """The Rich preview of the plan and one line of what will be launched, on stderr: stdout is for results."""
    config = job.config
    console.err.print(preview(job.spec, job.source.dims, job.source.options, job.source.table, job.plans))
    where = f"{config.num_processes} process{'es' if config.num_processes != 1 else ''}"
    if config.num_machines > 1:
        where += f" on {config.num_machines} machines"
    start = f", from {job.found.checkpoint.name}" if job.found else ""
    console.err.print(
        f"\n[bold]{job.command} {job.spec.name}[/bold] under {config.strategy} on {where} ({config.device})"
        f"{start} -> {escape(str(job.run.root))}",
        soft_wrap=True,
    )


def describe(job: Job) -> dict[str, Any]:
    """The JSON of ``--dry-run``."""
    return {
        "run_dir": str(job.run.root),
        "argv": job.launch.argv,
        "files": {str(path): text for path, text in job.launch.files.items()}
        | {str(job.run_json.absolute()): _run_text(job)},
        "config": job.config.to_json(),
        "sources": job.resolved.sources,
        "plan": plan_json(job.spec, job.source.dims, job.source.options, job.source.table, job.plans),
    }


def print_dry_run(job: Job) -> None:
    """The same for people: options with sources, files, command, plan."""
    out = console.out
    out.print("[bold]Options[/bold]")
    values = job.config.to_json()
    for name in options(job.command):
        value = values[name]
        out.print(
            f"  {name} = {escape(repr(value))}  [dim]{escape(job.resolved.sources.get(name, ''))}[/dim]", soft_wrap=True
        )
    for path, text in job.launch.files.items():
        out.print(f"\n[bold]{escape(str(path))}[/bold]\n{escape(text)}", soft_wrap=True)
    out.print(f"[bold]Command[/bold]\n{escape(job.launch.command)}\n", soft_wrap=True)
    out.print(preview(job.spec, job.source.dims, job.source.options, job.source.table, job.plans))


def carry_out(job: Job, *, dry_run: bool, overwrite: bool, as_json: bool) -> None:
    """Show the job, or show the preview and run it to its end.

    Raises:
        VfunError: the run failed.
        typer.Exit: it was interrupted or preempted; its state is saved.
    """
    if dry_run:
        if as_json:
            console.print_json(describe(job))
        else:
            print_dry_run(job)
        return
    if job.found is not None and job.found.step >= (job.config.max_train_steps or job.found.step + 1):
        _tell_end(job, Outcome(ending="completed", step=job.found.step), as_json=as_json)
        console.hint("The run was complete; a larger --max-train-steps trains on.")
        return
    begins = job.found is None and job.config.machine_rank == 0
    if begins and not overwrite:
        refuse_used(job.run)
    ensure_writable(job.run.root)
    with lock.held(job.run, job.config.machine_rank):
        if begins and job.run.holds_run():
            clear(job.run)
        show(job)
        with supervise.stop_requests(job.run) as stop:
            code = start(job, stop, as_json=as_json)
    if code:
        raise typer.Exit(code)


def start(job: Job, stop: supervise.StopRequests, *, as_json: bool) -> int:
    """Write the run's files, run the job to its end and say how it went; the exit code.

    A job that crashes starts over from its newest checkpoint, ``max_restarts`` times at most.

    Raises:
        VfunError: the run failed.
    """
    config = job.config
    write_plan(job)
    ended = run_once(job, stop)
    for restart in range(1, config.max_restarts + 1):
        if isinstance(ended, Outcome) or stop.asked:
            break
        console.report(ended)
        job = _continued(job)
        start_from = job.found.checkpoint.name if job.found else "the beginning"
        console.warn(f"restart {restart} of {config.max_restarts}, from {start_from}.")
        ended = run_once(job, stop)
    if isinstance(ended, supervise.Crashed):
        raise ended
    _tell_end(job, ended, as_json=as_json)
    return ended.exit_code


def _tell_end(job: Job, ended: Outcome, *, as_json: bool) -> None:
    run, newest = job.run, job.run.checkpoint(ended.step)
    if as_json:
        console.print_json(
            {"run_dir": str(run.root), "outcome": ended.ending, "step": ended.step, "checkpoint": str(newest)}
        )
    if ended.exit_code in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
        console.err.print(f"{ended.ending} after step {ended.step}; saved {escape(str(newest))}", soft_wrap=True)
        console.hint(f"next: vfun resume {shlex.quote(str(run.root))}")
    else:
        if not as_json:
            console.out.print(f"done: {ended.step} steps, {escape(str(newest))}", soft_wrap=True)
        console.hint(f"next: vfun export-bf16 {shlex.quote(str(newest))}")


def write_plan(job: Job) -> None:
    """What the training processes make their plan from."""
    run, machine = job.run, job.config.machine_rank
    run.launch(machine).mkdir(parents=True, exist_ok=True)
    job.source.table.save(run.clips(machine))
    write_atomically(run.plan_json, json.dumps({"digest": job.plans[0].digest(), **_summary(job)}, indent=1))


def run_once(job: Job, stop: supervise.StopRequests) -> Outcome | supervise.Crashed:
    """One launch to its end, or to its crash."""
    job.run.remove_leftovers(job.config.machine_rank)
    if job.found is not None and job.config.machine_rank == 0:
        manifest.verify(job.found.checkpoint)  # every byte: what is loaded here is trained on for days
    if stop.asked:  # before run.json makes a run of the directory, which only a checkpoint can continue
        raise NothingToSave() if stop.reason == "preempted" else KeyboardInterrupt
    for path, text in job.launch.files.items():
        write_atomically(path, text)
    write_atomically(job.run_json, _run_text(job))
    try:
        return supervise.run(
            job.launch.argv, job.run, job.config.machine_rank, job.found.step if job.found else 0, stop
        )
    except supervise.Crashed as error:
        return error
    finally:
        job.run.remove_leftovers(job.config.machine_rank)


def _continued(job: Job) -> Job:
    """The same job from the newest checkpoint of its run; from where it began if there is none."""
    complete = manifest.checkpoints(job.run.root)
    found = Found(run=job.run, checkpoint=complete[-1], step=manifest.step_of(complete[-1]) or 0) if complete else None
    launch = plan_launch(job.config, job.spec, job.run, job.run_json)
    return replace(job, found=found or job.found, launch=launch)


def _summary(job: Job) -> dict[str, Any]:
    return plan_json(job.spec, job.source.dims, job.source.options, job.source.table, job.plans)


def _run_text(job: Job) -> str:
    return json.dumps(job.description(), indent=1, ensure_ascii=False)
