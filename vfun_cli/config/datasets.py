"""The data sets of a run: where each lies, how often an epoch shows it, and what its captions begin and end with.

Typed as ``a.json:2``, or written down in ``vfun.toml``:

    [[data]]
    meta = "b/"
    repeats = 0.5
    root = "/data/b"
    caption_prefix = "in the style of b"
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.files import possible
from vfun_cli.metadata.records import root_of

FINEST = 10_000
"""The largest denominator of repeats: four decimals."""
MOST_REPEATS = 10_000

_REPEATED = re.compile(r"(?P<meta>.+):(?P<repeats>\d+(?:\.\d*)?|\.\d+|\d+/\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of a run."""

    meta: Path
    """Its metadata, or the folder that it is."""
    repeats: Fraction = Fraction(1)
    """How often an epoch shows each of its clips, on average: at 1/2, each epoch shows half of them, and two epochs
    all."""
    root: Path | None = None
    """Folder that its paths start from; None: ``train_data_dir``."""
    caption_prefix: str | None = None
    """None: the run's."""
    caption_suffix: str | None = None

    def __str__(self) -> str:
        """As it is typed, without what can only be written down."""
        return f"{self.meta}" if self.repeats == 1 else f"{self.meta}:{in_decimals(self.repeats)}"

    def folder(self) -> Path:
        """Where its paths start from if nobody says so: the folder that it is, or that of its metadata."""
        return root_of(self.meta, None)

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to say of it but its metadata."""
        return self == DataSet(meta=self.meta)

    def to_json(self) -> Any:
        """Its metadata's path where that is all, else what is said of it by name."""
        if self.is_plain:
            return str(self.meta)
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: in_decimals(value) if isinstance(value, Fraction) else str(value)
            for name, value in said.items()
            if value is not None
        }

    def over_paths(self, change: Callable[[Path], Path]) -> "DataSet":
        """With its paths changed."""
        return replace(self, meta=change(self.meta), root=None if self.root is None else change(self.root))


def in_decimals(value: Fraction) -> str:
    """As it is typed: in decimals where that is exact."""
    decimals = f"{float(value):.10g}"
    return decimals if Fraction(decimals) == value else str(value)


def parse_data_sets(value: Any, where: str) -> tuple[DataSet, ...]:
    """Data sets from what was typed, written down or kept in a ``run.json``: one, or a list of them.

    Raises:
        ConfigError: a value that names none; ``where`` begins the message.
    """
    entries = value if isinstance(value, list | tuple) else [] if value is None else [value]
    found = tuple(_parse_one(entry, where) for entry in entries)
    twice = next((each for each in found if sum(each.meta == other.meta for other in found) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{where} names {twice.meta} more than once.",
            hint=f"{twice.meta}:2 shows each of its clips twice in an epoch.",
        )
    return found


def sets_to_json(sets: Sequence[DataSet]) -> Any:
    """The inverse of :func:`parse_data_sets`; one set alone is no list."""
    listed = [each.to_json() for each in sets]
    return listed[0] if len(listed) == 1 else listed


def sets_over_paths(value: Any, change: Callable[[Path], Path]) -> Any:
    """What :func:`sets_to_json` gave with its paths changed."""
    return sets_to_json([each.over_paths(change) for each in parse_data_sets(value, "data sets")])


def _parse_one(entry: Any, where: str) -> DataSet:
    match entry:
        case DataSet():
            return entry
        case Mapping():
            return _from_table(entry, where)
        case str() | Path():
            stated = _REPEATED.fullmatch(str(entry))
            if stated is None:
                return DataSet(meta=_without_repeats(_path(str(entry), where), where))
            return DataSet(meta=_path(stated["meta"], where), repeats=_repeats(stated["repeats"], where))
    raise ConfigError(f"{where} is {entry!r}; it takes a path.")


def _without_repeats(path: Path, where: str) -> Path:
    """A path in which a colon may stand, unless what is there is what stands before the colon."""
    meta, _, repeats = str(path).rpartition(":")
    there = os.path.exists  # Path.exists raises where it may not look, and for names that are too long
    if meta and there(meta) and not there(path):
        raise ConfigError(
            f"{where}: there is no {path}, and {repeats!r} does not say how often an epoch shows {meta}.",
            hint=f"{meta}:2 shows each of its clips twice, {meta}:0.5 half of them.",
        )
    return path


def _from_table(table: Mapping[str, Any], where: str) -> DataSet:
    known = [field.name for field in fields(DataSet)]
    for name in table:
        if name not in known:
            raise ConfigError(
                f"{where}: unknown key {name!r} of a data set.{did_you_mean(name, known)}",
                hint=f"Its keys: {', '.join(known)}.",
            )
    if "meta" not in table:
        raise ConfigError(f"{where}: a data set without meta, the path of its metadata or folder.")
    found: dict[str, Any] = {"meta": _path(table["meta"], where)}
    if "repeats" in table:
        found["repeats"] = _repeats(table["repeats"], where)
    if "root" in table:
        found["root"] = _path(table["root"], where)
    for name in ("caption_prefix", "caption_suffix"):
        if name in table:
            if not isinstance(table[name], str):
                raise ConfigError(f"{where}: {name} of {found['meta']} is {table[name]!r}; it takes text.")
            found[name] = table[name]
    return DataSet(**found)


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, str | Path):
        raise ConfigError(f"{where} is {value!r}; it takes a path.")
    try:
        return possible(value)
    except ValueError:
        empty = not str(value)
        raise ConfigError(
            f"{where} is {'empty' if empty else repr(str(value))}; it takes a path.",
            hint="Leave it out." if empty else None,
        ) from None


def _repeats(value: Any, where: str) -> Fraction:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        found = Fraction(str(value))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"{where}: repeats are {value!r}; they take a number, such as 2 or 0.5.") from None
    if not 0 < found <= MOST_REPEATS:
        raise ConfigError(
            f"{where}: repeats are {value}; they are above 0, and {MOST_REPEATS} at most.",
            hint="A set that is not to be trained is left out." if not found else None,
        )
    if found.denominator > FINEST:
        raise ConfigError(f"{where}: repeats are {value}; they have four decimals at most.")
    return found
