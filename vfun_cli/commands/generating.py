"""``vfun generate`` from what was typed to files: whose weights, which videos, in how many processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli import console, families
from vfun_cli.checkpoints.given import Given
from vfun_cli.commands import defaults
from vfun_cli.demo import default as demo_default
from vfun_cli.devices import check_processes, gpu_count
from vfun_cli.errors import ConfigError, RunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.files import partial_of
from vfun_cli.imports import uncollected
from vfun_cli.launch.preemption import nothing_to_save
from vfun_cli.run import locate
from vfun_cli.run.rundir import RunDir
from vfun_cli.sampling import processes
from vfun_cli.sampling.events import MADE, Event
from vfun_cli.sampling.progress import Bars
from vfun_cli.sampling.source import Source, find_source, told_strengths

if TYPE_CHECKING:
    from vfun_cli.sampling.orders import Order
    from vfun_cli.sampling.rows import Video

Tell = Callable[[Path], None]

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
    given: Given
    ema: bool
    base: str | None
    demo: bool


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Which videos were named, and where they go."""

    prompts: Sequence[str]
    media: Mapping[str, Sequence[Path]]
    """By the input that they are."""
    meta: Path | None
    root: Path | None
    settings: Mapping[str, Any]
    """Of ``sampling.settings.Wanted``."""
    output: Path | None
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be made."""

    source: Source
    base: Source | None
    orders: Sequence["Order"]
    overwrite: bool

    @property
    def left(self) -> list[int]:
        """The places of those that are not there yet."""
        return [place for place, order in enumerate(self.orders) if self.overwrite or not order.is_made()]


def decide(named: Named, wishes: Wishes) -> Job:
    """Find the weights and check every row, before anything is loaded.

    Raises:
        VfunError: the weights are not there, or a video cannot be made.
    """
    if wishes.meta is not None and (wishes.prompts or wishes.media):
        raise ConfigError("--meta names the videos, and so do --prompt and the others.", hint="Drop one of them.")
    source, base = _source(named), None
    if named.base is not None:
        base = find_source(named.base, output_dir=defaults.output_dir(demo=named.demo), default_model=source.model)
        if base.spec is not source.spec:
            raise ConfigError(
                f"--compare {named.base} is {base.spec.name}, and {source.path} is {source.spec.name}.",
                hint="Name weights of one family.",
            )
    from vfun_cli.sampling.orders import orders_of  # with numpy: not for weights that are not there

    orders = orders_of(
        _videos(named, wishes, source), source, base, wishes.output or _output(source), overwrite=wishes.overwrite
    )
    return Job(source=source, base=base, orders=orders, overwrite=wishes.overwrite)


def _source(named: Named) -> Source:
    output_dir = defaults.output_dir(demo=named.demo)
    name = named.name
    if named.demo:
        family = families.FAMILIES.get(name or "")
        if name is None and named.lora is None and not locate.may_hold_checkpoints(RunDir(output_dir)):
            family = next(iter(families.FAMILIES.values()))
            console.hint(f"there is no trained demo in {output_dir}: these videos are of an untrained {family.name}")
        name = name if family is None else str(demo_default.make_model(family))
    return find_source(
        name, output_dir=output_dir, model=named.model, default_model=defaults.model_directory(), lora=named.lora,
        strength=named.strength, ema=named.ema, given=named.given,
    )  # fmt: skip


def _videos(named: Named, wishes: Wishes, source: Source) -> Sequence["Video"]:
    """What is asked for or, of a demo that is asked for nothing, some of its rows.

    Raises:
        VfunError: one of them cannot be made.
    """
    from vfun_cli.sampling.rows import videos_of_options, videos_of_rows
    from vfun_cli.sampling.settings import Wanted

    spec = _with_demo_settings(source.spec) if named.demo else source.spec
    wanted, dims = Wanted(**wishes.settings), read_dims(spec, source.model)
    meta, most = wishes.meta, None
    if named.demo and not (meta or wishes.prompts or wishes.media):
        meta, most = demo_default.make(source.spec)["train_data_meta"], DEMO_ROWS
    if meta is not None:
        found = videos_of_rows(meta, wishes.root, spec, dims, wanted)
    else:
        found = videos_of_options(wishes.prompts, wishes.media, spec, dims, wanted)  # type: ignore[arg-type]
    found.require_ok()
    return found.videos[:most]


def _with_demo_settings(spec: FamilySpec) -> FamilySpec:
    return replace(spec, sampling=replace(spec.sampling, **spec.sampling.demo))


def _output(source: Source) -> Path:
    """Beside weights that were trained; else where the command is run."""
    if source.path == source.model:
        return Path("videos")
    path = source.path if source.path.name not in ("", "..") else source.path.resolve()
    return path.with_name(f"{path.name}-videos")


def make(job: Job, *, device: str | None, num_processes: int, low_vram: bool, tell: Tell) -> list[Event] | None:
    """Make what is not there yet; returns what could not be made, and None in a process that makes a part for another.

    Args:
        tell: gets each video when it is whole, at once where it is there already.

    Raises:
        VfunError: nothing more can be made; the videos before it are there.
    """
    if device is not None and device not in DEVICES:
        raise ConfigError(f"--device is {device!r}; choose one of: {', '.join(DEVICES)}.", option="--device")
    device = device or ("cuda" if gpu_count() else "cpu")
    if (share := processes.own_share()) is not None:
        processes.leave_signals()
        for event in _made(job, share, device, low_vram):
            processes.tell(event)
        return None
    check_processes(device, num_processes)
    left = job.left
    if len(left) < len(job.orders):
        console.hint(f"{len(job.orders) - len(left)} of {len(job.orders)} videos are there already")
        for place in sorted({*range(len(job.orders))} - {*left}):
            tell(job.orders[place].path)
    if not left:
        return []
    for told in told_strengths(job.source):
        console.hint(told)
    count = min(num_processes, len(left))
    with nothing_to_save("preempted: the videos that were whole are there."), _no_half_files(job, left):
        if count > 1:
            return _followed(job, left, processes.run_shares(left, count, gpus=device == "cuda"), tell)
        return _followed(job, left, ((0, event) for event in _made(job, left, device, low_vram)), tell)


def _made(job: Job, places: Sequence[int], device: str, low_vram: bool) -> Iterator[Event]:
    """In this process."""
    with uncollected():
        import torch

        from vfun_cli.sampling.make import make as make_videos
        from vfun_cli.sampling.weights import LoadOptions

    options = LoadOptions(device=torch.device(device), low_vram=low_vram)
    return make_videos([job.orders[place] for place in places], job.source, job.base, options)


def _followed(job: Job, left: Sequence[int], events: Iterable[tuple[int, Event]], tell: Tell) -> list[Event]:
    """Show what happens; returns what could not be made."""
    paths = {job.orders[place].name: job.orders[place].path for place in left}
    failed: list[Event] = []
    with Bars(list(paths)) as bars:
        bars.show(0, Event(doing="starting"))
        for process, event in events:
            bars.show(process, event)
            if event.exit_code == MADE:
                tell(paths[str(event.video)])
            elif event.exit_code is not None:
                failed.append(event)
                console.warn(f"{event.video} is not made: {event.message}")
    return failed


def require_all(job: Job, failed: Sequence[Event]) -> None:
    """Say that videos are missing.

    Raises:
        VfunError: with the exit code of the first.
    """
    if not failed:
        return
    first, names = failed[0], ", ".join(str(event.video) for event in failed)
    error = RunError(
        f"{len(failed)} of {len(job.orders)} videos could not be made: {names}.",
        hint=f"{first.hint or ''} The same command again makes what is not there yet.".strip(),
    )
    error.exit_code = first.exit_code or RunError.exit_code
    raise error


@contextmanager
def _no_half_files(job: Job, left: Sequence[int]) -> Iterator[None]:
    """Whatever ends the block: a process that is killed leaves what it was writing."""
    try:
        yield
    finally:
        for place in left:
            partial_of(job.orders[place].path).unlink(missing_ok=True)
