"""``vfun checkpoints``: what there is, whether it is whole, and what changed between two."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfun_cli import console
from vfun_cli.commands import defaults
from vfun_cli.commands.flags import Debug, Demo, Json, typed_name, typed_path
from vfun_cli.commands.help import Command, Group
from vfun_cli.errors import CheckpointError

if TYPE_CHECKING:
    from vfun_cli.checkpoints.compare import Comparison

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, verify and compare checkpoints.")

Checkpoint = Annotated[
    str,
    typer.Argument(parser=typed_name, help="A checkpoint: a path, or a bare name looked up in the output directory."),
]

LONGEST_LIST = 10
"""Tensors that are named for people; --json names all."""


@app.command("ls", cls=Command)
def ls(
    run: Annotated[
        Path | None,
        typer.Argument(
            parser=typed_path,
            metavar="[RUN]",
            help="Run directory. [default: the output directory]",
            show_default=False,
        ),
    ] = None,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the checkpoints of a run: step, size, strategy, and whether they are complete."""
    from rich.table import Table

    from vfun_cli.run import locate

    folder = run or defaults.output_dir(demo=demo)
    if not locate.exists(folder) or not folder.is_dir():
        raise CheckpointError(f"there is no run directory {folder}.", hint="Name the output directory of a run.")
    rows = _list(folder)
    if json:
        console.print_json({"run_dir": str(folder), "checkpoints": rows})
        return
    if not rows:
        console.out.print(f"no checkpoints in {folder}", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for name, side in (("checkpoint", "left"), ("bytes", "right"), ("written by", "left"), ("", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in rows:
        writer = f"{row['strategy']} on {row['world_size']}" if row["strategy"] else ""
        table.add_row(Path(row["path"]).name, f"{row['bytes']:,}", writer, row["problem"] or "complete")
    console.out.print(table)


@app.command("verify", cls=Command)
def verify(checkpoint: Checkpoint, demo: Demo = False, json: Json = False, debug: Debug = False) -> None:
    """Read every file of a checkpoint and compare it with what was written: sizes, hashes, tensors."""
    from vfun_cli.checkpoints import manifest
    from vfun_cli.checkpoints.state import read_state
    from vfun_cli.run import locate

    found = locate.checkpoint(checkpoint, output_dir=defaults.output_dir(demo=demo)).checkpoint
    manifest.verify(found)
    read_state(found)
    from vfun_cli.checkpoints import compare  # with numpy: not for a checkpoint that is not there
    from vfun_cli.checkpoints.reader import open_checkpoint

    reader = open_checkpoint(found)
    tensors = [*reader.weights.values(), *reader.ema.values(), *compare.moments(reader).values()]
    for tensor in tensors:
        _ = tensor.segments  # raises where the parts do not make up the whole
    files = list(manifest.iter_files(found))
    size = sum((found / name).stat().st_size for name in files)
    if json:
        console.print_json(
            {"checkpoint": str(found), "files": len(files), "bytes": size, "tensors": len(tensors), "verified": True}
        )
    else:
        console.out.print(f"{found}: {len(files)} files, {size:,} bytes, {len(tensors)} tensors, whole", soft_wrap=True)


@app.command("diff", cls=Command)
def diff(first: Checkpoint, second: Checkpoint, demo: Demo = False, json: Json = False, debug: Debug = False) -> None:
    """Compare two checkpoints, of any strategies: options, weights, optimizer moments."""
    from vfun_cli.run import locate

    output_dir = defaults.output_dir(demo=demo)
    found = [locate.checkpoint(name, output_dir=output_dir).checkpoint for name in (first, second)]
    from vfun_cli.checkpoints import compare  # with numpy: not for a checkpoint that is not there
    from vfun_cli.checkpoints.reader import open_checkpoint

    a, b = (open_checkpoint(path) for path in found)
    changed = _changed(a.state, b.state)
    parts = {
        "weights": compare.compare_tensors(a.weights, b.weights),
        "moments": compare.compare_tensors(compare.moments(a), compare.moments(b)),
    }
    if json:
        content = {name: vars(part) | {"different": _finite(part.different)} for name, part in parts.items()}
        same = all(part.same for part in parts.values())
        console.print_json({"first": str(a.path), "second": str(b.path), "same": same, "changed": changed, **content})
        return
    for name, (before, after) in changed.items():
        console.out.print(f"{name}: {before} -> {after}", soft_wrap=True)
    for name, part in parts.items():
        _print(name, part)


def _list(folder: Path) -> list[dict[str, Any]]:
    from vfun_cli.checkpoints import manifest
    from vfun_cli.checkpoints.state import read_state
    from vfun_cli.run import ownership
    from vfun_cli.run.rundir import RunDir

    rows, own = [], ownership.checkpoints(RunDir(folder))
    for step, path in manifest.numbered(folder):
        problem, state = None if path in own else "saved by another run", {}
        try:
            manifest.verify(path, deep=False)
            state = read_state(path)
        except CheckpointError as error:
            problem = error.message
        rows.append(
            {
                "path": str(path),
                "step": step,
                "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                "complete": problem is None,
                "problem": problem,
                "strategy": state.get("strategy"),
                "world_size": state.get("world_size"),
            }
        )
    return rows


def _changed(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Fields of ``state.json`` that differ, options by their names."""
    before, after = ({**state, **state.get("run_config", {})} for state in (first, second))
    names = [name for name in {**before, **after} if name != "run_config"]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _finite(distances: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity: null."""
    return {name: distance if math.isfinite(distance) else None for name, distance in distances.items()}


def _print(name: str, part: "Comparison") -> None:
    console.out.print(f"{name}: {part.equal} equal, {len(part.different)} different")
    largest = sorted(part.different.items(), key=lambda item: -item[1])
    for tensor, distance in largest[:LONGEST_LIST]:
        console.out.print(f"  {tensor}  differs by up to {distance:.3g}", soft_wrap=True)
    for label, names in (("first", part.only_first), ("second", part.only_second)):
        if names:
            more = f" and {len(names) - LONGEST_LIST} more" if len(names) > LONGEST_LIST else ""
            console.out.print(f"  only in the {label}: {', '.join(names[:LONGEST_LIST])}{more}", soft_wrap=True)
