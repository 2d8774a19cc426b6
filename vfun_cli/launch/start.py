"""Starting a job: the run directory is locked, the files are written, the processes launched, once or again."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from vfun_cli import console
from vfun_cli.checkpoints import manifest
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, EnvironmentFault, VfunError
from vfun_cli.launch import show, supervise
from vfun_cli.launch.job import Job, continued
from vfun_cli.launch.machines import Machine
from vfun_cli.launch.preemption import NothingToSave
from vfun_cli.metadata.stored import store_rows
from vfun_cli.plan.sets import read_rows
from vfun_cli.run import locate, lock, ownership
from vfun_cli.run.contents import write_contents
from vfun_cli.run.locate import Found
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir, ensure_writable, write_atomically


@dataclass(frozen=True, kw_only=True)
class Part:
    """This command's part in a job."""

    claim: int
    """Of the run directory, which the processes get as their stdin."""
    machine: Machine


@contextmanager
def taking_part(command: str, config: RunConfig) -> Iterator[Part]:
    """Until the end of the block, have the run directory for this machine, and the other machines know how it does.

    Raises:
        EnvironmentFault: the directory cannot be written.
        ConfigError: another command is at work there.
    """
    run = RunDir(config.output_dir)
    ensure_writable(run.root)
    machine = _machine(command, config, run)
    with lock.held(run, machine.number) as claim, machine.taking_part():
        yield Part(claim=claim, machine=machine)


@contextmanager
def taking_part_early(command: str, config: RunConfig, *, dry_run: bool) -> Iterator[Part | None]:
    """The same for what comes before a job among several machines is decided: what one of them meets while it checks
    its rows and its model ends the others too, and they wait for as long as that takes.

    A machine alone leaves nothing behind where it refuses a job.
    """
    if dry_run or config.num_machines == 1:
        yield None
        return
    with taking_part(command, config) as part:
        yield part


def start(
    job: Job,
    *,
    overwrite: bool = False,
    announce: Callable[[Job], None] = show.preview,
    part: Part | None = None,
) -> Outcome:
    """Run a job to its end, alone in its run directory.

    A job that crashes is launched again from its newest checkpoint, ``max_restarts`` times at most.

    Args:
        overwrite: delete the run that the directory holds.
        announce: says what begins, once nothing stands in its way.
        part: that this command takes already.

    Raises:
        ConfigError: the directory holds a run already, or another command is at work there.
        VfunError: the job failed.
    """
    if job.found is not None and job.found.step >= (job.config.max_train_steps or job.found.step + 1):
        console.hint("The run was complete; a larger --max-train-steps trains on.")
        return Outcome(ending="completed", step=job.found.step)
    with taking_part(job.command, job.config) if part is None else nullcontext(part) as mine:
        # The look at the directory was before the lock: another command may have run in between.
        refuse_used(job.config, job.found, overwrite=overwrite)
        ownership.remove_leftovers(job.run, job.config.machine_rank)
        if job.found is not None and job.found.is_in(job.run):
            job = _looked_at_again(job, job.found)
        elif job.config.machine_rank == 0:
            if job.run.is_half_deleted():
                console.warn(f"the deletion of the run that {job.run.root} held was stopped half-way; it goes on.")
            ownership.clear(job.run, job.config.num_machines)
        announce(job)
        write_plan(job)
        return _launch(job, mine.claim, mine.machine)


def _machine(command: str, config: RunConfig, run: RunDir) -> Machine:
    """This machine among those of the job. A cache is filled by each for itself, in a directory of its own."""
    if command == "cache":
        return Machine(run, config.machine_rank)
    assert config.num_processes is not None
    return Machine(run, config.machine_rank, machines=config.num_machines, processes=config.num_processes)


def refuse_used(config: RunConfig, found: Found | None, *, overwrite: bool = False) -> None:
    """Refuse to begin a run where there is one, and to write over what is not the run's.

    Args:
        found: the checkpoint that a run continues from; if it lies in another directory, a run begins with it.
        overwrite: delete the run that is there.

    Raises:
        ConfigError: the run directory holds another run, or a checkpoint of another.
    """
    run = RunDir(config.output_dir)
    if config.machine_rank != 0:
        return
    continues = found is not None and found.is_in(run)
    # a job script that always says "latest" begins anew as long as nothing was saved
    saved_nothing = found is None and not locate.may_hold_checkpoints(run)
    overwrite |= saved_nothing and config.resume_from_checkpoint == "latest"
    overwrite |= not locate.holds_results(run)
    if run.holds_run() and not (continues or overwrite):
        hint = "--output-dir names another directory."
        if found is None:
            hint = "--output-dir names another directory, --overwrite deletes the run."
        if locate.newest(run) is not None:
            hint += f" {locate.way_on(run)}"
        raise ConfigError(f"{run.root} already holds a run.", hint=hint)
    first_step = found.step if found is not None and continues else 0
    foreign = ownership.in_the_way(run, first_step)
    if foreign:
        names = ", ".join(path.name for path in foreign)
        raise ConfigError(
            f"{run.root} holds {names}, which this run did not save and might write over.",
            hint="Move it away, or name another directory with --output-dir.",
        )


def _looked_at_again(job: Job, found: Found) -> Job:
    """The job, if its run is as it was when the checkpoint was found, with the checkpoint where it lies now.

    Raises:
        ConfigError: another command has been at work there.
    """
    if job.config.machine_rank == 0 and found.seen != job.run.fingerprint():
        raise ConfigError(
            f"another vfun command was at work in {job.run.root} while this one looked at it.",
            hint="Run the same command again.",
        )
    return replace(job, found=replace(found, checkpoint=job.run.checkpoint(found.step)))


def write_plan(job: Job) -> None:
    """What the training processes make their plan from. Machine 0 writes for all what people read of the plan, and the
    rows.
    """
    run, machine = job.run, job.config.machine_rank
    run.launch(machine).mkdir(parents=True, exist_ok=True)
    job.plan.table.save(run.clips(machine))
    if job.plan.validation_table is not None:
        job.plan.validation_table.save(run.validation_clips(machine))
    if machine == 0:
        store_rows(run.rows, read_rows(job.config), job.metadata_sha256)
        summary = {"digest": job.plan.first_epoch.digest(), **job.plan_summary()}
        write_atomically(run.plan_json, json.dumps(summary, indent=1))


def write_launch_files(job: Job) -> None:
    """What the launcher and the training processes read; from here on the directory holds a run."""
    write_contents(job.run.contents(job.config.machine_rank), job.contents)
    for path, text in job.files().items():
        write_atomically(path, text)


def _launch(job: Job, claim: int, machine: Machine) -> Outcome:
    """As often as it takes, or as is allowed."""
    restarts = 0
    while True:
        try:
            return _launch_once(job, claim, machine)
        except supervise.Crashed as error:
            if restarts == job.config.max_restarts:
                raise
            console.report(error)
        except VfunError as error:
            if error.exit_code in (EXIT_INTERRUPTED, EXIT_PREEMPTED) and _left_no_run(job):
                ownership.clear(job.run, job.config.num_machines)
                error.hint = NothingToSave.usual_hint
            raise
        restarts += 1
        newest = locate.newest(job.run)
        job = continued(job, machine.next_attempt(None if newest is None else newest.step))
        start_from = job.found.checkpoint.name if job.found else "the beginning"
        console.warn(f"restart {restarts} of {job.config.max_restarts}, from {start_from}.")


def _left_no_run(job: Job) -> bool:
    """Whether the directory holds a run that was stopped before its first launch had begun to train."""
    begun = job.run.listening(job.config.machine_rank).exists() or locate.may_hold_checkpoints(job.run)
    return job.config.machine_rank == 0 and not begun


def _way_on(job: Job) -> str:
    """The hint after a failure."""
    return "The same command goes on from here." if job.command == "cache" else locate.way_on(job.run)


def _launch_once(job: Job, claim: int, machine: Machine) -> Outcome:
    if job.found is not None and job.config.machine_rank == 0:
        manifest.verify(job.found.checkpoint)  # every byte: what is loaded here is trained on for days
    first_step = job.found.step if job.found else 0
    # Until here a signal ends the command. From here on there is a run, which only a checkpoint can continue.
    machine.launches()
    with supervise.stop_requests(job.run, machine.number) as stop:
        if job.staging is not None:
            _make_staging(job.staging)
        write_launch_files(job)
        try:
            return supervise.launch(
                job.launch.argv, machine, first_step, stop, way_on=lambda: _way_on(job), stdin=claim
            )  # fmt: skip
        finally:
            ownership.remove_leftovers(job.run, job.config.machine_rank)


def _make_staging(folder: Path) -> None:
    """The folder in memory for checkpoints: made before anybody can read its name, so that it is this user's.

    Raises:
        EnvironmentFault: there is no such memory here.
    """
    try:
        ownership.make_private(folder)
    except OSError as error:
        raise EnvironmentFault(
            f"--async-checkpoint keeps a checkpoint in {folder}, which cannot be made: {error.strerror}.",
            hint="Leave out --async-checkpoint, or give this machine a writable /dev/shm.",
        ) from None
