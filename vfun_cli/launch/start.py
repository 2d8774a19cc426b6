"""Starting a job: the run directory is locked, the files are written, the processes launched, once or again."""

import json
from collections.abc import Callable

from vfun_cli import console
from vfun_cli.checkpoints import manifest
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.launch import show, supervise
from vfun_cli.launch.job import Job, continued
from vfun_cli.run import locate, lock
from vfun_cli.run.locate import Found
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir, clear, ensure_writable, write_atomically


def start(job: Job, *, overwrite: bool = False, announce: Callable[[Job], None] = show.preview) -> Outcome:
    """Run a job to its end, alone in its run directory.

    A job that crashes is launched again from its newest checkpoint, ``max_restarts`` times at most.

    Args:
        overwrite: delete the run that the directory holds.
        announce: says what begins, once nothing stands in its way.

    Raises:
        ConfigError: the directory holds a run already, or another command is at work there.
        VfunError: the job failed.
    """
    if job.found is not None and job.found.step >= (job.config.max_train_steps or job.found.step + 1):
        console.hint("The run was complete; a larger --max-train-steps trains on.")
        return Outcome(ending="completed", step=job.found.step)
    if not overwrite:
        refuse_used(job.config, job.found)
    begins = job.found is None and job.config.machine_rank == 0
    ensure_writable(job.run.root)
    with lock.held(job.run, job.config.machine_rank):
        if begins and job.run.holds_run():
            clear(job.run)
        announce(job)
        write_plan(job)
        return _launch(job)


def refuse_used(config: RunConfig, found: Found | None) -> None:
    """Refuse to begin a run where there is one.

    Args:
        found: the checkpoint that a run continues from.

    Raises:
        ConfigError: the run directory holds a run already.
    """
    run = RunDir(config.output_dir)
    if found is not None or config.machine_rank != 0 or not run.holds_run():
        return
    hint = "--output-dir names another directory, --overwrite deletes the run."
    if locate.newest(run) is not None:
        hint += f" {locate.way_on(run)}"
    raise ConfigError(f"{run.root} already holds a run.", hint=hint)


def write_plan(job: Job) -> None:
    """What the training processes make their plan from."""
    run, machine = job.run, job.config.machine_rank
    run.launch(machine).mkdir(parents=True, exist_ok=True)
    job.plan.table.save(run.clips(machine))
    write_atomically(
        run.plan_json, json.dumps({"digest": job.plan.first_epoch.digest(), **job.plan_summary()}, indent=1)
    )


def write_launch_files(job: Job) -> None:
    """What the launcher and the training processes read; from here on the directory holds a run."""
    for path, text in job.files().items():
        write_atomically(path, text)


def _launch(job: Job) -> Outcome:
    """As often as it takes, or as is allowed."""
    restarts = 0
    while True:
        try:
            return _launch_once(job)
        except supervise.Crashed as error:
            if restarts == job.config.max_restarts:
                raise
            console.report(error)
        restarts += 1
        job = continued(job)
        start_from = job.found.checkpoint.name if job.found else "the beginning"
        console.warn(f"restart {restarts} of {job.config.max_restarts}, from {start_from}.")


def _way_on(job: Job) -> str:
    """The hint after a failure."""
    return "The same command goes on from here." if job.command == "cache" else locate.way_on(job.run)


def _launch_once(job: Job) -> Outcome:
    job.run.remove_leftovers(job.config.machine_rank)
    if job.found is not None and job.config.machine_rank == 0:
        manifest.verify(job.found.checkpoint)  # every byte: what is loaded here is trained on for days
    first_step = job.found.step if job.found else 0
    # Until here a signal ends the command. From here on there is a run, which only a checkpoint can continue.
    with supervise.stop_requests(job.run) as stop:
        write_launch_files(job)
        try:
            return supervise.launch(
                job.launch.argv, job.run, job.config.machine_rank, first_step, stop, way_on=lambda: _way_on(job)
            )
        finally:
            job.run.remove_leftovers(job.config.machine_rank)
