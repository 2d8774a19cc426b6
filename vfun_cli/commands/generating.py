"""``vfun generate`` from what was typed to files: whose weights, which videos, in how many processes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vfun_cli import console, families
from vfun_cli.commands import defaults
from vfun_cli.demo import default as demo_default
from vfun_cli.devices import check_processes, gpu_count
from vfun_cli.errors import ConfigError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.launch.preemption import nothing_to_save
from vfun_cli.run import locate
from vfun_cli.run.rundir import RunDir
from vfun_cli.sampling import processes
from vfun_cli.sampling.orders import Order, Tell, left_to_make, orders_of
from vfun_cli.sampling.rows import Videos, videos_of_options, videos_of_rows
from vfun_cli.sampling.settings import Wanted
from vfun_cli.sampling.source import Source, find_source

DEVICES = ("cuda", "cpu")
DEMO_ROWS = 2
"""Of the demo's data, where no row is named."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Whose weights were named."""

    name: str | None
    lora: Path | None
    strength: float | None
    model: Path | None
    ema: bool
    base: str | None
    demo: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be made."""

    source: Source
    base: Source | None
    orders: Sequence[Order]


def decide(
    named: Named,
    media: Mapping[str, Sequence[Path] | None],
    *,
    prompts: Sequence[str],
    meta: Path | None,
    root: Path | None,
    settings: Mapping[str, Any],
    output: Path | None,
) -> Job:
    """Find the weights and check every row, before anything is loaded.

    Raises:
        VfunError: the weights are not there, or a video cannot be made.
    """
    source, base = _source(named), None
    if named.base is not None:
        base = find_source(named.base, output_dir=defaults.output_dir(demo=named.demo), default_model=source.model)
        if base.spec is not source.spec:
            raise ConfigError(f"--compare {named.base} is {base.spec.name}, the other is {source.spec.name}.")
    spec = _with_demo_settings(source.spec) if named.demo else source.spec
    wanted, dims = Wanted(**settings), read_dims(spec, source.model)
    given = {name: paths for name, paths in media.items() if paths}
    if meta is not None and (prompts or given):
        raise ConfigError("--meta names the videos, and so do --prompt and the others.", hint="Drop one of them.")
    if meta is None and named.demo and not prompts and not given:
        meta, rows = demo_default.make(source.spec)["train_data_meta"], DEMO_ROWS
    else:
        rows = None
    if meta is not None:
        found: Videos = videos_of_rows(meta, root, spec, dims, wanted)
    else:
        found = videos_of_options(prompts, given, spec, dims, wanted)  # type: ignore[arg-type]
    found.require_ok()
    return Job(source=source, base=base, orders=orders_of(found.videos[:rows], source, base, output or _output(source)))


def _source(named: Named) -> Source:
    output_dir = defaults.output_dir(demo=named.demo)
    name, model = named.name, named.model
    if named.demo and name in families.FAMILIES:
        name = str(demo_default.make_model(families.find(str(name))))
    elif named.demo and name is None and named.lora is None and not locate.may_hold_checkpoints(RunDir(output_dir)):
        name = str(demo_default.make_model(next(iter(families.FAMILIES.values()))))
    return find_source(
        name, output_dir=output_dir, model=model, default_model=defaults.model_directory(), lora=named.lora,
        strength=named.strength, ema=named.ema,
    )  # fmt: skip


def _with_demo_settings(spec: FamilySpec) -> FamilySpec:
    return replace(spec, sampling=replace(spec.sampling, **spec.sampling.demo))


def _output(source: Source) -> Path:
    """Beside a checkpoint or an export; else where the command is run."""
    trained = source.full is not None or source.loras
    return source.path.with_name(f"{source.path.name}-videos") if trained else Path("videos")


def make(job: Job, *, device: str | None, num_processes: int, low_vram: bool, overwrite: bool) -> list[Path] | None:
    """Make what is not there yet, and say where each video is; None in a process that makes a part for another.

    Raises:
        VfunError: a video cannot be made; those before it are there.
    """
    device = _device(device)
    check_processes(device, num_processes)
    own = processes.own_share()
    if own is not None:
        left = left_to_make(job.orders[own[0] :: own[1]], overwrite=overwrite)
        for path in _made(replace(job, orders=left), device, low_vram, processes.say_progress):
            processes.say_made(path)
        return None
    left = left_to_make(job.orders, overwrite=overwrite)
    if len(left) < len(job.orders):
        console.hint(f"{len(job.orders) - len(left)} of {len(job.orders)} videos are there already.")
    with nothing_to_save(), _shown() as tell:
        if not left:
            making: Iterator[Path] = iter(())
        elif num_processes == 1:
            making = _made(replace(job, orders=left), device, low_vram, tell)
        else:
            making = processes.run_shares(num_processes, gpus=device == "cuda", tell=tell)
        for path in making:
            console.err.print(f"made {path}", soft_wrap=True)
    return [order.path for order in job.orders]


def _made(job: Job, device: str, low_vram: bool, tell: Tell) -> Iterator[Path]:
    """In this process."""
    import torch

    from vfun_cli.sampling.make import make as make_videos
    from vfun_cli.sampling.weights import LoadOptions

    options = LoadOptions(device=torch.device(device), low_vram=low_vram)
    return make_videos(job.orders, job.source, job.base, options, tell)


def _device(named: str | None) -> str:
    if named is not None and named not in DEVICES:
        raise ConfigError(f"--device is {named!r}; choose one of: {', '.join(DEVICES)}.", option="--device")
    return named or ("cuda" if gpu_count() else "cpu")


@contextmanager
def _shown() -> Iterator[Tell]:
    """A bar for each video, with the time that is left; nothing where no terminal is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal) as bars:

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=None)
            bars.update(tasks[name], completed=done, total=total or None, visible=not total or done < total)

        yield tell
