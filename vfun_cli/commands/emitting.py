"""``--emit`` of train and lora: its flags, what goes beside it, and how its file is printed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfun_cli import console, devices
from vfun_cli.config.resolve import Resolved, resolve
from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch.emit import ENGINES, USUAL_GPUS, USUAL_GRACE, USUAL_HOURS, Wishes, check, emitted, file_of

if TYPE_CHECKING:
    from vfun_cli.launch.job import Job

PANEL = "A file for a scheduler"

Emit = Annotated[
    str | None,
    typer.Option(
        "--emit",
        metavar="WORD",
        help="Print the file that starts this command on all machines, and start nothing. "
        f"One of: {', '.join(ENGINES)}.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        metavar="N",
        min=1,
        help=f"GPUs of each machine of the job. [default: those of this machine, else {USUAL_GPUS}]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="HOURS",
        min=0,
        help="Time limit of the job, from which its --max-hours follows: it stops, saved, twice --grace before. "
        f"[default, with slurm: --max-hours and as much, else {USUAL_HOURS:g}]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Grace = Annotated[
    int | None,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        min=1,
        max=65_535,  # the most that --signal of Slurm takes
        help="What a checkpoint and a step take: so long before the job is ended it is asked to stop. "
        f"[default: {USUAL_GRACE}]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]


def asked(
    engine: str | None,
    gpus_per_node: int | None,
    time_limit: float | None,
    grace: int | None,
    *,
    dry_run: bool,
    overwrite: bool,
) -> Wishes | None:
    """What was typed of --emit; None where no file is wanted.

    Raises:
        ConfigError: flags that do not go together.
    """
    if engine is None:
        beside = {"--gpus-per-node": gpus_per_node, "--time-limit": time_limit, "--grace": grace}
        if alone := next((flag for flag, value in beside.items() if value is not None), None):
            raise ConfigError(f"{alone} is about the file that --emit prints.", hint=f"Add --emit, or drop {alone}.")
        return None
    if engine not in ENGINES:
        raise ConfigError(
            f"--emit is {engine!r}; choose one of: {', '.join(ENGINES)}.{did_you_mean(engine, ENGINES)}",
            option="--emit",
        )
    if dry_run:
        raise ConfigError(
            "--emit and --dry-run both start nothing, and print one thing each.", hint="Drop one of them."
        )
    if overwrite:
        raise ConfigError(
            "--emit with --overwrite: each time the job is started again it would delete what it has done.",
            hint="Drop --overwrite, or name another --output-dir.",
        )
    return Wishes(engine=engine, gpus_per_node=gpus_per_node, time_limit=time_limit, grace=grace)


def resolved(
    wishes: Wishes, command: str, spec: FamilySpec, given: Mapping[str, Any], *, demo: Mapping[str, Any] | None
) -> Resolved:
    """The options of a job on other machines than this one, which goes on where there is something to go on from.

    Raises:
        ConfigError: as of ``resolve``, or they cannot be started from a file.
    """
    found = resolve(
        command,
        spec,
        {"resume_from_checkpoint": "latest", **given},
        demo=demo,
        gpus_there=wishes.gpus_per_node or devices.gpu_count() or USUAL_GPUS,
    )
    check(found, wishes)
    return found


def show(job: "Job", wishes: Wishes, *, as_json: bool) -> None:
    """Print the file, and on stderr what is still to be done.

    Raises:
        ConfigError: the job cannot be started from a file.
    """
    made, engine = emitted(job, wishes), ENGINES[wishes.engine]
    text = file_of(made)
    if as_json:
        console.print_json({"file": text, "fill_in": dict(engine.fill_in), "submit": engine.submit})
        return
    console.print_file(text.encode())
    for notice in made.notices:
        console.hint(notice)
    for placeholder, meaning in engine.fill_in.items():
        console.hint(f"fill in {placeholder}: {meaning}")
    console.hint(f"then: {engine.submit}")
