"""``vfun cache``: encode everything that a run will need, before it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json
from vfun_cli.commands.signature import with_options
from vfun_cli.config.originals import settle
from vfun_cli.config.resolve import Resolved, resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch.joining import first_of_machine
from vfun_cli.launch.preemption import nothing_to_save

if TYPE_CHECKING:
    from vfun_cli.launch.job import Job
    from vfun_cli.run.messages import Outcome


@with_options("train", choosing_flags=True)
def cache(
    given: dict[str, Any],
    originals: dict[str, str | bool],
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Model family, e.g. wan-s2v.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every entry of the cache, and encode nothing.", show_default=False)
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the entries that this run does not need.", show_default=False)
    ] = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fill the --cache of a run ahead, with the options of the run: latents, texts, sounds, pictures.

    Stopped or killed, the same command goes on where it was. A run whose entries are all there loads no encoder.

    Examples: [bold]vfun cache wan-s2v --cache latents[/bold] · [bold]vfun cache wan-s2v --cache latents --prune[/bold]
    · [bold]vfun cache wan-s2v --cache latents --verify[/bold]
    """
    spec = families.find(family)
    if verify and prune:
        raise ConfigError("--verify only reads, --prune deletes before it fills.", hint="Drop one of them.")
    with first_of_machine() as first:
        if first:
            _fill_or_verify(given, originals, spec, verify=verify, prune=prune, demo=demo, as_json=json)


def _fill_or_verify(
    given: dict[str, Any],
    originals: dict[str, str | bool],
    spec: FamilySpec,
    *,
    verify: bool,
    prune: bool,
    demo: bool,
    as_json: bool,
) -> None:
    needs_demo = demo and not verify  # making the demo loads torch
    layer = demo_default.make(spec) if needs_demo else None
    resolved = resolve("train", spec, given, demo=layer, starts=not verify)
    for notice in settle(originals, spec, resolved.config):
        console.hint(notice)
    folder = resolved.config.cache
    if folder is None:
        raise ConfigError("no cache is named.", hint="Name its folder with --cache.")
    if verify:
        _verify(folder, as_json=as_json)
        return
    from vfun_cli.launch.job import decide
    from vfun_cli.launch.start import start

    with nothing_to_save():
        job = replace(decide("cache", spec, _for_filling(resolved, folder)), prune=prune)
        outcome = start(job, announce=_announce)
        shutil.rmtree(job.run.root)  # an error leaves its logs
    _report(folder, outcome, as_json=as_json)


def _announce(job: "Job") -> None:
    console.err.print(Text.assemble((f"cache {job.spec.name}", "bold"), f" -> {job.config.cache}"), soft_wrap=True)
    console.err.print(f"looking which of its {len(job.plan.table)} clips are not there yet; new files are read whole")


def _report(folder: Path, outcome: "Outcome", *, as_json: bool) -> None:
    from vfun_cli.run.cachedir import total_bytes

    encoded, complete = outcome.step, outcome.ending == "completed"
    size = total_bytes(folder)
    if as_json:
        console.print_json({"cache": str(folder), "complete": complete, "encoded": encoded, "bytes": size})
    else:
        console.out.print(
            f"{'done' if complete else 'stopped'}: {encoded} clips encoded, {size / 2**30:.2f} GiB in {folder}",
            soft_wrap=True,
        )
    if not complete:
        console.hint("The same command goes on from here.")
        raise typer.Exit(outcome.exit_code)


def _for_filling(resolved: Resolved, folder: Path) -> Resolved:
    """The same data and plan, with processes that hold no transformer; their logs lie inside the cache."""
    from vfun_cli.run.cachedir import fill_dir

    config = resolved.config
    strategy = "single" if config.num_processes == 1 else "ddp"
    return replace(resolved, config=replace(config, output_dir=fill_dir(folder), strategy=strategy))


def _verify(folder: Path, *, as_json: bool) -> None:
    from vfun_cli.run.cachedir import DamagedEntry, entries, is_cache, unreadable, verify_entry

    if not is_cache(folder):
        raise ConfigError(f"there is no cache in {folder}.", hint="The same command without --verify fills one.")
    damaged, good = [], 0
    for path in entries(folder):
        try:
            verify_entry(path)
            good += 1
        except DamagedEntry as error:
            damaged.append(str(path))
            console.warn(str(error))
        except OSError as error:
            raise unreadable(path, error) from None
    if as_json:
        console.print_json({"cache": str(folder), "good": good, "damaged": damaged})
    if damaged:
        found = CheckpointError(
            f"{len(damaged)} of {good + len(damaged)} entries in {folder} are damaged.",
            hint="Training encodes them again by itself; deleting the files is safe.",
        )
        if not as_json:
            raise found
        console.report(found)  # stdout has its one object already
        raise typer.Exit(found.exit_code)
    if not as_json:
        console.out.print(f"{good} entries, all whole")
