"""``vfun make-control``: the control clips of a folder of videos and pictures."""

import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vfun_cli import console
from vfun_cli.commands.flags import Debug, Json, typed_path
from vfun_cli.devices import cpu_cores, gpu_count
from vfun_cli.errors import ConfigError, EnvironmentFault, MetadataError
from vfun_cli.files import existing
from vfun_cli.launch.preemption import nothing_to_save

if TYPE_CHECKING:
    from vfun_cli.control.clips import Clip
    from vfun_cli.control.kinds import Kind, Settings


def make_control(
    folder: Annotated[
        Path,
        typer.Argument(parser=typed_path, metavar="FOLDER", show_default=False, help="Folder of videos and pictures."),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="WORD",
            help="canny: edges, by OpenCV. depth: by a Depth Anything or DPT model of transformers. pose: skeletons of "
            "people, by rtmlib. The last two need --model.",
        ),
    ] = "canny",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=typed_path,
            metavar="DIR",
            show_default=False,
            help="Write them there, under the same paths. [default: FOLDER/control, where training finds them]",
        ),
    ] = None,
    low: Annotated[int, typer.Option("--low", min=0, metavar="N", help="Canny's lower threshold.")] = 100,
    high: Annotated[int, typer.Option("--high", min=0, metavar="N", help="Canny's upper threshold.")] = 200,
    blur: Annotated[
        float,
        typer.Option(
            "--blur", min=0, max=100, metavar="PIXELS", help="Blur with this deviation before edges are looked for."
        ),
    ] = 0.0,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            parser=typed_path,
            metavar="DIR",
            show_default=False,
            help="Folder with the weights of depth or pose. Nothing is downloaded.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=1024,
            metavar="N",
            show_default=False,
            help="Processes at once. [default: one a core; one where a GPU runs a model]",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the control clips of a folder: of each video as many frames, of the same size, at the same rate.

    Clips that are there already are left; the same command goes on where it was stopped. Each file is whole or not
    there. Training on FOLDER then finds them (docs/data.md).

    Examples: [bold]vfun make-control clips[/bold] · [bold]vfun make-control clips --kind depth --model
    models/Depth-Anything-V2-Small-hf --out depth[/bold]
    """
    from vfun_cli.control import kinds

    settings = _settings(kinds.find(kind), name=kind, low=low, high=high, blur=blur, model=model)
    from vfun_cli.control.clips import clips_of, doubled

    clips, unread = clips_of(folder, out)
    for message in unread:
        console.warn(f"left out: {message}")
    states = Counter[str]()
    broken = {clip.name: f"its control clip would be that of {first.name}" for clip, first in doubled(clips)}
    left: list[Clip] = []
    for clip in clips:
        if clip.name in broken:
            continue
        state = clip.state(str(settings))
        states[state] += 1
        if state == "new":
            left.append(clip)
        elif state == "theirs":
            broken[clip.name] = f"{clip.target} is there, and make-control did not write it"
    if left:
        _require_writable(folder, left, out)
    default = 1 if settings.device != "cpu" else cpu_cores()
    count = min(workers or default, max(1, len(left)))
    with nothing_to_save("preempted: the control clips that were whole are there."):
        broken |= _make(left, settings, count, as_json=json)
    _report(folder, clips, states, broken, as_json=json)
    if broken:
        raise typer.Exit(MetadataError.exit_code)


def _settings(kind: "Kind", *, name: str, low: int, high: int, blur: float, model: Path | None) -> "Settings":
    from vfun_cli.control.kinds import Settings

    if low > high:
        raise ConfigError(f"--low {low} is above --high {high}.", option="--low")
    if kind.model is None:
        if model is not None:
            raise ConfigError(f"--kind {name} has no model.", hint="Drop --model.", option="--model")
        return Settings(kind=name, low=low, high=high, blur=blur)
    if model is None or not model.is_dir():
        what = "no folder is named by --model" if model is None else f"there is no folder {model}"
        place = shlex.quote(str(model or f"models/{name}"))
        raise ConfigError(
            f"{what}; --kind {name} needs one with {kind.model}.",
            hint=f"To get one: hf download {kind.released} --local-dir {place}\nThen name it with --model {place}.",
            option="--model",
        )
    return Settings(kind=name, model=str(model.absolute()), device="cuda" if gpu_count() else "cpu")


def _require_writable(folder: Path, left: "list[Clip]", out: Path | None) -> None:
    """Say it once, and before the first video is decoded."""
    from vfun_cli.control.clips import FOLDER

    there = existing(out or folder / FOLDER)
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{there} may not be written to.", hint="Name a folder that may with --out DIR.")


def _make(left: "list[Clip]", settings: "Settings", workers: int, *, as_json: bool) -> dict[str, str]:
    """What could not be made, by name, with why."""
    from vfun_cli.control.make import Made, make

    broken: dict[str, str] = {}
    columns = (TextColumn("control clips"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal) as bar:
        task = bar.add_task("make", total=len(left))

        def tell(made: Made) -> None:
            bar.advance(task)
            if made.broken is not None:
                broken[made.clip.name] = made.broken

        make(left, settings, workers, tell)
    return broken


def _report(folder: Path, clips: "list[Clip]", states: Counter[str], broken: dict[str, str], *, as_json: bool) -> None:
    good = [clip for clip in clips if clip.name not in broken]
    for name, why in broken.items():
        console.warn(f"{name} has no control clip: {why}")
    if as_json:
        console.print_json(
            {
                "folder": str(folder),
                "clips": [_row(folder, clip) for clip in good],
                "broken": [{"file_path": name, "message": why} for name, why in broken.items()],
            }
        )
        return
    made = len(good) - states["made"] - states["given"]
    words = [f"{made} made", f"{states['made']} there already", f"{states['given']} with one of their own"]
    said = ", ".join(word for word in words if not word.startswith("0 ")) or "nothing made"
    failed = f", {len(broken)} failed" if broken else ""
    console.out.print(Text(f"done: {said}{failed}"), soft_wrap=True)


def _row(folder: Path, clip: "Clip") -> dict[str, Any]:
    """As metadata has it: paths from the folder where they lead into it."""
    if clip.given is not None:
        return {"file_path": clip.name, "control_file_path": clip.given}
    try:
        control = clip.target.relative_to(folder).as_posix()
    except ValueError:
        control = str(clip.target.absolute())
    return {"file_path": clip.name, "control_file_path": control}
