"""What the files of a run tell, whether it runs, has stopped or has failed; what is missing or damaged is left out."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli import families
from vfun_cli.config.options import RunConfig, options
from vfun_cli.config.resolve import FOLLOWS, HERE, family_defaults, is_default
from vfun_cli.errors import CheckpointError, VfunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.files import PICTURE, VIDEO
from vfun_cli.run.messages import Outcome, RankError
from vfun_cli.run.metrics_file import parse
from vfun_cli.run.rundir import RunDir
from vfun_cli.typed_json import read_object

Record = Mapping[str, Any]
"""A line of metrics.jsonl, or what lies beside a sample; anybody may have edited it."""


Place = tuple[str, int]
"""Which row, or which prompt."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What became of one validation row after so many steps."""

    step: int
    place: "Place"
    ema: bool
    """Made with the moving average of the weights."""
    said: Record
    """What the file beside it says: prompt, seed, size, or the error that left no picture."""
    file: Path | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An option that is not as the family has it."""

    name: str
    value: Any
    default: Any
    source: str
    """Where its value came from."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """All that the page is made of."""

    run: RunDir
    described: Record
    """``run.json``."""
    spec: FamilySpec
    steps: Sequence[Record]
    events: Mapping[str, Sequence[Record]]
    """Records that are no steps, by their event."""
    samples: Sequence[Sample]
    clips: Mapping[Place, Path]
    """The own clip of a validation row: what a sample of it could look like."""
    plan: Record | None
    """``plan.json``."""
    outcome: Outcome | None
    errors: Sequence[RankError]

    @property
    def total_steps(self) -> int | None:
        """How many the run is to have, as its newest step says."""
        total = number(self.steps[-1], "total_steps") if self.steps else None
        return None if total is None else int(total)

    @property
    def last_step(self) -> int:
        """The newest step that was recorded."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def gather(run: RunDir) -> Told:
    """Read the files of a run.

    Raises:
        CheckpointError: there is no run, or its ``run.json`` is damaged.
    """
    described = run.read_run()
    steps: dict[int, Record] = {}
    events: dict[str, list[Record]] = {}
    for record in _records(run.metrics):
        if "event" in record:
            events.setdefault(str(record["event"]), []).append(record)
        else:
            steps[record["step"]] = record
    return Told(
        run=run,
        described=described,
        spec=families.stated_in(run.run_json, described["family"]),
        steps=[steps[step] for step in sorted(steps)],
        events=events,
        samples=_samples(run),
        clips={place: path for place, _, path in _of_rows(run.sampled_clips) if path.suffix in MEDIA},
        plan=_read(run.plan_json) or None,
        outcome=Outcome.read(run),
        errors=RankError.read_all(run),
    )


LARGEST = 1e100
"""What is larger is a fault, and sums of it are no numbers."""


def number(record: Record, name: str) -> float | None:
    """A finite number of a record; None where it states none, as after an infinite loss."""
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < LARGEST else None


def numbers(record: Record, name: str) -> list[float | None]:
    """The same of a list of numbers."""
    values = record.get(name)
    return [number({"": value}, "") for value in values] if isinstance(values, list) else []


def differences(told: Told) -> list[Difference]:
    """Options with another value than the family's default, in the order of their declaration.

    What only follows from another option or from this machine is no choice of anybody's.
    """
    config, sources = told.described["config"], told.described.get("sources") or {}
    strategy = "auto" if sources.get("strategy", "").startswith(HERE) else str(config.get("strategy"))
    preset = config.get("preset")
    preset = preset if preset in told.spec.defaults.presets else None  # resume takes any: it holds no defaults
    defaults = family_defaults(told.described["command"], told.spec, strategy, preset).to_json()
    followed = {words for _, words in FOLLOWS.values()}
    found = []
    for name in options():
        source = sources.get(name, "")
        open_ = is_default(source) or source.startswith(HERE) or source in followed
        if name in config and not open_ and config[name] != defaults[name]:
            found.append(Difference(name=name, value=config[name], default=defaults[name], source=source))
    return found


def picture(told: Told) -> str:
    """The plan drawn as SVG, from the clip table that the launch left.

    Raises:
        CheckpointError: it cannot be drawn any more; says why.
    """
    from vfun_cli.metadata.table import ClipTable  # with numpy
    from vfun_cli.plan.picture import compose, to_svg
    from vfun_cli.plan.run_plan import RunPlan
    from vfun_cli.plan.schedule import RunSegment

    clips = told.run.clips()
    if not clips.is_file():
        raise CheckpointError(f"the launch's table of clips, {clips}, is not there.")
    try:
        config = RunConfig.from_json(told.described["config"])
        dims = read_dims(told.spec, config.pretrained_model_name_or_path)
        earlier = tuple(RunSegment(**entry) for entry in told.described.get("layouts") or ())
        plan = RunPlan.of(config, told.spec, dims, ClipTable.load(clips), earlier=earlier)
        epoch = plan.first_epoch
        drawn = to_svg(*compose(plan, epoch))
    except VfunError as error:
        raise CheckpointError(error.message) from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{clips} cannot be read: {error}.") from None
    if told.described.get("plan_digest") not in (None, epoch.digest()):
        raise CheckpointError(f"what is in {clips} gives another plan than the launch showed.")
    return drawn


# Files ---------------------------------------------------------------------------------------------------------------

MEDIA = (VIDEO, PICTURE)
_OF_ROW = re.compile(r"(row|prompt)-(\d{1,9})(-ema)?\.(json|mp4|png)")


def _records(metrics: Path) -> list[Record]:
    """Lines of metrics.jsonl; those that a crash tore are passed over."""
    try:
        with metrics.open("rb") as file:
            found = [record for line in file if (record := parse(line)) is not None]
    except OSError:
        return []
    return [record for record in found if number(record, "step") is not None]


def _samples(run: RunDir) -> list[Sample]:
    """Every sample, by step and row, the moving average after the weights themselves."""
    found = []
    for step, folder in run.sampled():
        files = _of_rows(folder)
        media = {(place, ema): path for place, ema, path in files if path.suffix in MEDIA}
        said = {(place, ema): _read(path) for place, ema, path in files if path.suffix == ".json"}
        for place, ema in sorted({*media, *said}):
            about = said.get((place, ema)) or said.get((place, False)) or {}
            found.append(Sample(step=step, place=place, ema=ema, said=about, file=media.get((place, ema))))
    return found


def _of_rows(folder: Path) -> list[tuple[Place, bool, Path]]:
    """Files named after a validation row or prompt: which, whether it is of the moving average, the file."""
    if not folder.is_dir():
        return []
    named = [(_OF_ROW.fullmatch(path.name), path) for path in sorted(folder.iterdir()) if path.is_file()]
    return [((match[1], int(match[2])), match[3] is not None, path) for match, path in named if match]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that tells something; empty where it is missing or damaged."""
    try:
        return read_object(path)
    except CheckpointError:
        return {}
