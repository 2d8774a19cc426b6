"""``vfun fetch``: the files of a released model that its family reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Json, typed_path
from vfun_cli.families import releases

if TYPE_CHECKING:
    from vfun_cli.hub import Fetch


def fetch(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Model family, e.g. wan-s2v.", show_default=False)],
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            show_default=False,
            help="Which of its models, e.g. 14B. [default: that of the published command line]",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            parser=typed_path,
            metavar="DIR",
            show_default=False,
            help="Where it goes. [default: where vfun train looks for it, models/Diffusion_Transformer/NAME]",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Ask the hub for the list of files, and fetch nothing.", show_default=False),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a released model from the Hugging Face hub: the only command that downloads anything.

    Only the files that the family reads; the same command goes on where it was stopped. Files that differ from the
    hub's are replaced. HF_ENDPOINT names a mirror, HF_TOKEN an account.

    Examples: [bold]vfun fetch wan-s2v[/bold] · [bold]vfun fetch wan-fun-control --size V1.1-1.3B --dry-run[/bold]
    """
    spec = families.find(family)
    release = releases.of_size(spec, size)
    folder = to or releases.usual_directory(spec, release)
    from vfun_cli import hub

    job = hub.plan(spec, release, folder)
    if not json:
        console.err.print(Text.assemble((f"fetch {release.hugging_face}", "bold"), f" -> {folder}"), soft_wrap=True)
    if not dry_run:
        hub.fetch(job)
    if json:
        console.print_json(_described(job, fetched=not dry_run))
        return
    total = hub.size_text(sum(file.size for file in job.files))
    if dry_run:
        for file in job.files:
            there = "  there" if file.is_in(folder) else ""
            console.out.print(f"{hub.size_text(file.size):>9}  {file.name}{there}", soft_wrap=True)
        console.out.print(f"{len(job.files)} files, {total}, of them {_left(job)} to fetch")
        return
    console.out.print(f"done: {len(job.files)} files, {total}, in {folder}", soft_wrap=True)
    console.hint(f"It trains by: {_train_command(job)}")


def _left(job: "Fetch") -> str:
    from vfun_cli.hub import size_text

    return size_text(sum(file.size for file in job.left))


def _train_command(job: "Fetch") -> str:
    import shlex

    usual = str(job.spec.defaults.train["pretrained_model_name_or_path"])
    place = [] if job.folder == Path(usual) else ["--pretrained-model-name-or-path", str(job.folder)]
    return shlex.join(["vfun", "train", job.spec.name, *place])


def _described(job: "Fetch", *, fetched: bool) -> dict[str, Any]:
    return {
        "family": job.spec.name,
        "size": job.release.size,
        "repository": job.release.hugging_face,
        "revision": job.revision,
        "folder": str(job.folder),
        "fetched": fetched,
        "files": [{"name": file.name, "bytes": file.size} for file in job.files],
    }
