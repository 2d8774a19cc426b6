"""What train, lora and resume do with a job that is decided: show it, or start it and say how it went."""

import typer

from vfun_cli.launch import show
from vfun_cli.launch.job import Job
from vfun_cli.launch.start import start


def show_or_start(job: Job, *, dry_run: bool, overwrite: bool, as_json: bool) -> None:
    """One or the other.

    Raises:
        VfunError: the run failed.
        typer.Exit: it was interrupted or preempted; its state is saved.
    """
    if dry_run:
        show.dry_run(job, as_json=as_json)
        return
    outcome = start(job, overwrite=overwrite)
    show.result(job, outcome, as_json=as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
