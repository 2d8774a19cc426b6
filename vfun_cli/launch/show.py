"""What people see of a job: the preview of its plan, a dry run, and how it went."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from vfun_cli import console
from vfun_cli.config import cluster
from vfun_cli.config.options import options
from vfun_cli.config.resolve import HERE
from vfun_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from vfun_cli.launch.disk_need import DiskNeed, disk_need
from vfun_cli.launch.job import Job
from vfun_cli.run.messages import Outcome


def preview(job: Job) -> None:
    """The Rich preview of the plan and one line of what will be launched, on stderr: stdout is for results."""
    from vfun_cli.plan import preview as plan_preview

    config = job.config
    console.err.print(plan_preview.preview(job.plan, [job.plan.first_epoch]))
    where = f"{config.num_processes} process{'es' if config.num_processes != 1 else ''}"
    if config.num_machines > 1:
        where += f" on {config.num_machines} machines"
    if config.fsdp_shard_size is not None:
        where += f", sharded over groups of {config.fsdp_shard_size}"
    start = f", from {job.found.checkpoint.name}" if job.found else ""
    what = f" under {config.strategy} on {where} ({config.device}){start} -> {job.run.root}"
    console.err.print(Text.assemble("\n", (f"{job.command} {job.spec.name}", "bold"), what), soft_wrap=True)
    told = [
        f"{name} {getattr(config, name)} ({job.resolved.sources[name]})"
        for name in cluster.OPTIONS
        if cluster.is_told(name, job.resolved.sources[name])
    ]
    if told:
        console.err.print(Text(", ".join(told)), soft_wrap=True)
    for name, source in job.resolved.sources.items():
        if source.startswith(f"{HERE}: "):
            console.err.print(
                Text(f"{name} {getattr(config, name)}: {source.removeprefix(f'{HERE}: ')}"), soft_wrap=True
            )
    need = disk_need(job)
    console.err.print(str(need), soft_wrap=True)
    _warn(need, job)


def _warn(need: DiskNeed, job: Job) -> None:
    warning = need.warning(job.config.checkpoints_total_limit)
    if warning is not None:
        console.warn(warning)


def dry_run(job: Job, *, forecast: Mapping[str, Any] | None, as_json: bool) -> None:
    """All that the job would write and start, on stdout. ``forecast``: of its memory, for programs."""
    _warn(disk_need(job), job)
    if as_json:
        console.print_json({**_dry_run_json(job), "forecast": forecast})
    else:
        _print_dry_run(job)


def _dry_run_json(job: Job) -> dict[str, Any]:
    """For programs."""
    return {
        "run_dir": str(job.run.root),
        "argv": job.launch.argv,
        "files": {str(path): text for path, text in job.files().items()},
        "config": job.config.to_json(),
        "sources": job.resolved.sources,
        "plan": job.plan_summary(),
        "disk": disk_need(job).to_json(),
    }


def _print_dry_run(job: Job) -> None:
    """For people: options with sources, files, command, plan."""
    from vfun_cli.plan import preview as plan_preview

    out = console.out
    out.print(Text("Options", "bold"))
    values = job.config.to_json()
    for name in options(job.command):
        value = values[name]
        source = job.resolved.sources.get(name, "")
        out.print(Text.assemble(f"  {name} = {value!r}  ", (source, "dim")), soft_wrap=True)
    for path, text in job.launch.files.items():
        out.print(Text.assemble("\n", (str(path), "bold"), f"\n{text}"), soft_wrap=True)
    run_json = str(job.run_json.absolute())
    out.print(Text.assemble("\n", (run_json, "bold"), "\nThe options above; --json shows it too.\n"), soft_wrap=True)
    out.print(Text.assemble(("Command", "bold"), f"\n{job.launch.command}\n"), soft_wrap=True)
    out.print(plan_preview.preview(job.plan, [job.plan.first_epoch]))
    out.print(f"\n{disk_need(job)}", soft_wrap=True)


def result(job: Job, outcome: Outcome, *, as_json: bool) -> None:
    """How the job ended, what it left, and the next command."""
    run, newest = job.run, job.run.checkpoint(outcome.step)
    if as_json:
        console.print_json(
            {"run_dir": str(run.root), "outcome": outcome.ending, "step": outcome.step, "checkpoint": str(newest)}
        )
    if outcome.exit_code in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
        console.err.print(f"{outcome.ending} after step {outcome.step}; saved {newest}", soft_wrap=True)
        console.hint(f"next: vfun resume {shlex.quote(str(run.root))}")
    else:
        if not as_json:
            console.out.print(f"done: {outcome.step} steps, {newest}", soft_wrap=True)
        if newest.is_dir():  # another machine may have the run directory on its own disk
            console.hint(f"next: vfun export-bf16 {shlex.quote(str(newest))}")
