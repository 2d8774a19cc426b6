"""What train, lora and resume do with a job that is decided: show it, print a file that starts it, or start it and say
how it went.

On GPUs its forecast comes first: it settles what was left open, and refuses what will not fit.
"""

from typing import TYPE_CHECKING

from vfun_cli import console
from vfun_cli.commands import emitting
from vfun_cli.config.optimizers import notices
from vfun_cli.launch import show
from vfun_cli.launch.emit import Wishes
from vfun_cli.launch.job import Job, with_options
from vfun_cli.launch.start import Part, start

if TYPE_CHECKING:
    from vfun_cli.forecast.fit import Outlook


def show_or_start(job: Job, *, dry_run: bool, overwrite: bool, as_json: bool, part: Part | None) -> int:
    """One or the other; returns the exit code: not 0 where the job was interrupted or preempted and its state is saved.

    Args:
        part: that this command takes already, among several machines.

    Raises:
        FitError: it will not fit.
        VfunError: the run failed.
    """
    job, found = _forecast(job, dry_run=dry_run)
    for notice in notices(job.config, job.resolved.said):
        console.warn(notice)
    if dry_run:
        show.dry_run(job, forecast=None if found is None else found.to_json(), as_json=as_json)
    if found is not None:
        from vfun_cli.forecast.fit import refuse
        from vfun_cli.forecast.show import shown

        if not as_json:
            (console.out if dry_run else console.err).print(shown(found), soft_wrap=True)
        refuse(found, job.config)
    if dry_run:
        return 0
    outcome = start(job, overwrite=overwrite, part=part)
    show.result(job, outcome, as_json=as_json)
    return outcome.exit_code


def emit(job: Job, wishes: Wishes, *, as_json: bool) -> None:
    """Print the file that starts the job on all machines, if it fits into them as far as is known here.

    Raises:
        FitError: it will not fit.
        ConfigError: it cannot be started from a file.
    """
    job, found = _forecast(job, dry_run=True)
    for notice in notices(job.config, job.resolved.said):
        console.warn(notice)
    if found is not None:
        from vfun_cli.forecast.fit import refuse

        refuse(found, job.config)
    emitting.show(job, wishes, as_json=as_json)


def _forecast(job: Job, *, dry_run: bool) -> "tuple[Job, Outlook | None]":
    """The job as its forecast settles it, and the forecast; none of a run on processors, or where nobody wants one."""
    if job.config.device != "cuda" or not job.config.fit_check:
        return job, None
    from vfun_cli.forecast.ask import measuring
    from vfun_cli.forecast.fit import settled

    with measuring(keeps=not dry_run) as measurer, console.err.status("forecasting the memory of a step"):
        resolved, found = settled(job.command, job.resolved, job.plan, job.plan.first_epoch, measurer)
    return with_options(job, resolved), found
