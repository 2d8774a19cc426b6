"""A run's memory before it is launched: per phase and rank, whether it fits, and what would make it fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from typing import Any

from vfun_cli.config.checks import check
from vfun_cli.config.options import RunConfig, plain
from vfun_cli.errors import ConfigError, EnvironmentFault
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.ask import Measurer
from vfun_cli.forecast.batches import Batches
from vfun_cli.forecast.memory import GIB, Memory, memory
from vfun_cli.forecast.request import Batch, Measured, Question
from vfun_cli.forecast.ways import Way, possible_ways

ENOUGH_WAYS = 3
"""Ways that are named, at most; with smaller clips one more."""
SIZE_STEP = 32
"""Pixels of a side, between sizes that are tried."""
SMALLEST = 4
"""Clips become at most so many times smaller."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a forecast is of."""

    spec: FamilySpec
    config: RunConfig
    stated: Mapping[str, Any]
    """The transformer's ``config.json``."""
    ranks: int
    lora: bool
    batches: Batches
    memory: int | None
    """Bytes of each rank's device; None: unknown."""

    def measured(self, measurer: Measurer, batch: Batch, config: RunConfig) -> Measured:
        """What was measured of a micro-batch under these options.

        Raises:
            VfunError: it cannot be measured.
        """
        return measurer.ask(Question.of(self.spec.name, config, self.stated, self.ranks, batch, lora=self.lora))

    def needs(self, measurer: Measurer, batch: Batch, config: RunConfig | None = None) -> Memory:
        """What a rank needs for a micro-batch, under these options or others.

        Raises:
            VfunError: it cannot be measured.
        """
        config = config or self.config
        return memory(config, self.spec, self.measured(measurer, batch, config), self.ranks)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A way to make a run smaller, and what it then needs."""

    ways: tuple[Way, ...]
    peak: int
    """Bytes."""

    @property
    def typed(self) -> str:
        """As it is typed behind a command."""
        return " ".join(way.typed for way in self.ways)

    def __str__(self) -> str:
        return f"{self.typed}: {size(self.peak)} ({'; '.join(way.costs for way in self.ways)})"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        options = {name: plain(value) for way in self.ways for name, value in way.options.items()}
        return {"options": options, "typed": self.typed, "peak_bytes": self.peak}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was found."""

    subject: Subject
    heaviest: Memory
    typical: Memory | None = None
    """Of the median micro-batch, where that was asked for."""
    tried: Sequence[Tried] = ()
    """What would make it fit, if it does not."""

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is unknown."""
        known = self.subject.memory
        return None if known is None else self.heaviest.peak <= known

    @property
    def verdict(self) -> str:
        """One line."""
        known, peak = self.subject.memory, size(self.heaviest.peak)
        what = f"{self.subject.batches.heaviest} under {self.subject.config.strategy}"
        if known is None:
            return f"the heaviest micro-batch ({what}) needs {peak} of each GPU, in the {self.heaviest.binding} phase"
        if self.fits:
            return f"fits: {peak} of {size(known)} for the heaviest micro-batch ({what})"
        most = max(self.heaviest.parts[self.heaviest.binding].items(), key=lambda part: part[1])
        return (
            f"does not fit: the heaviest micro-batch ({what}) needs {peak} of each GPU, which has {size(known)}; the "
            f"{self.heaviest.binding} phase decides, most of it {most[0]} ({size(most[1])})"
        )

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        subject = self.subject
        return {
            "strategy": subject.config.strategy,
            "ranks": subject.ranks,
            "memory_bytes": subject.memory,
            "fits": self.fits,
            "verdict": self.verdict,
            "heaviest": {"batch": vars(subject.batches.heaviest), **self.heaviest.to_json()},
            "typical": None
            if self.typical is None
            else {"batch": vars(subject.batches.typical), **self.typical.to_json()},
            "ways": [each.to_json() for each in self.tried],
        }


def forecast(subject: Subject, measurer: Measurer, *, typical: bool = False, ways: bool = True) -> Forecast:
    """What the run needs and, where that is too much, the nearest options that fit.

    Args:
        typical: also what its median micro-batch needs.
        ways: whether options that fit are looked for.

    Raises:
        VfunError: it cannot be measured.
    """
    batches = subject.batches
    found = Forecast(
        subject=subject,
        heaviest=subject.needs(measurer, batches.heaviest),
        typical=subject.needs(measurer, batches.typical) if typical else None,
    )
    return replace(found, tried=_fitting(subject, measurer)) if ways and found.fits is False else found


def _fitting(subject: Subject, measurer: Measurer) -> list[Tried]:
    """Single changes that suffice; where none does, the first few together that do, with smaller clips if need be."""
    config, lora = subject.config, subject.lora
    possible = possible_ways(config, subject.ranks, lora=lora)
    candidates = [way for way in possible if allowed(way.applied(config), subject.spec, lora=lora)]
    fitting = (tried for way in candidates if (tried := _tried(subject, measurer, (way,))) is not None)
    found = list(islice(fitting, ENOUGH_WAYS))
    together: tuple[Way, ...] = ()
    for way in candidates if not found else ():
        together = (*(each for each in together if not each.options.keys() & way.options.keys()), way)
        tried = _tried(subject, measurer, together)
        if tried is not None:
            return [tried]
    smaller = _smaller(subject, measurer, () if found else together)
    return found + ([] if smaller is None else [smaller])


def _tried(subject: Subject, measurer: Measurer, together: tuple[Way, ...], batch: Batch | None = None) -> Tried | None:
    """These changes, if the run then fits."""
    config = reduce(lambda changed, way: way.applied(changed), together, subject.config)
    peak = subject.needs(measurer, batch or subject.batches.heaviest, config).peak
    assert subject.memory is not None
    return Tried(ways=together, peak=peak) if peak <= subject.memory else None


def _smaller(subject: Subject, measurer: Measurer, together: tuple[Way, ...]) -> Tried | None:
    """The same with the largest clips that fit, of as many frames."""
    side = max(subject.config.fix_sample_size, default=subject.config.video_sample_size)
    least = subject.spec.plan.smallest_side
    sizes = [size for size in range(SIZE_STEP, side, SIZE_STEP) if size >= max(least, side // SMALLEST)]
    found = None
    while sizes:  # halved, as memory grows with size
        middle = sizes[len(sizes) // 2]
        batch = _scaled(subject, middle / side)
        tried = _tried(subject, measurer, (*together, _sized(subject.config, middle, batch)), batch)
        found = tried or found
        sizes = [size for size in sizes if (size > middle if tried is not None else size < middle)]
    return found


def _sized(config: RunConfig, side: int, batch: Batch) -> Way:
    if config.fix_sample_size:
        return Way(options={"fix_sample_size": (batch.height, batch.width)}, costs="smaller clips")
    options = {"video_sample_size": side}
    if config.training_with_video_token_length:
        options["token_sample_size"] = min(side, config.token_sample_size)
    return Way(options=options, costs="smaller clips")


def _scaled(subject: Subject, factor: float) -> Batch:
    """The heaviest micro-batch at another size."""
    batch = subject.batches.heaviest
    high, wide = subject.spec.plan.grid
    height, width = (
        max(step, int(side * factor) // step * step) for side, step in ((batch.height, high), (batch.width, wide))
    )
    return replace(batch, height=height, width=width)


def allowed(config: RunConfig, spec: FamilySpec, *, lora: bool) -> bool:
    """Whether the options may be combined so, on a machine that has the devices."""
    try:
        check(replace(config, device="cuda"), spec, command="lora" if lora else "train")
    except (ConfigError, EnvironmentFault):
        return False
    return True


def size(value: float) -> str:
    """In the unit in which GPUs are sold."""
    return f"{value / GIB:.1f} GiB"
