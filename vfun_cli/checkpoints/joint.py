"""A model's tensors in the names of another release that joins layers, and back; unread, so that they stream."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from vfun_cli.checkpoints.naming import LayerLocation, Span
from vfun_cli.checkpoints.tensors import Joined, TensorSource, rows_of
from vfun_cli.errors import CheckpointError

Locate = Callable[[str], LayerLocation | None]
"""From a layer's name to where the other release keeps it."""


class HasShape(Protocol):
    """Anything that has a tensor's shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""


T = TypeVar("T", bound=HasShape)


def joined(sources: Mapping[str, TensorSource], locate: Locate, where: Path) -> dict[str, TensorSource]:
    """The tensors of the other release.

    Args:
        sources: by the model's own names.

    Raises:
        CheckpointError: a tensor that has no place there, or a joint one that would have gaps.
    """
    pieces: dict[str, list[tuple[int, TensorSource]]] = {}
    rows: dict[str, int] = {}
    for name, source in sources.items():
        layer, _, kind = name.rpartition(".")
        location = locate(layer)
        if location is None:
            raise CheckpointError(f"{where}: the release in the original names has no place for {name}.")
        target, count = f"{location.name}.{kind}", source.shape[0]
        rows[target] = location.rows or count
        pieces.setdefault(target, []).extend(
            (there, _rows(source, here, length)) for here, there, length in location.spans(count)
        )
    tensors = {}
    for target, found in pieces.items():
        parts = [part for _, part in sorted(found, key=lambda piece: piece[0])]
        if sum(part.shape[0] for part in parts) != rows[target]:
            raise CheckpointError(f"{where}: the parts of {target} do not make up its {rows[target]} rows.")
        tensors[target] = Joined.of(parts, (rows[target], *parts[0].shape[1:]))
    return tensors


def split(
    stored: Mapping[str, T],
    shapes: Mapping[str, tuple[int, ...]],
    locate: Locate,
    take: Callable[[T, Sequence[Span]], T],
) -> dict[str, T]:
    """The other release's tensors by the model's own names; what fits no layer keeps its name.

    Args:
        shapes: of the model's own tensors.
        take: from a tensor and rows of it to the tensor that has these rows.
    """
    tensors, used = dict[str, T](), set[str]()
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        location = locate(layer)
        source = None if location is None else stored.get(f"{location.name}.{kind}")
        if location is None or source is None or source.shape[0] != (location.rows or shape[0]):
            continue
        used.add(f"{location.name}.{kind}")
        tensors[name] = take(source, location.spans(shape[0]))
    return tensors | {name: source for name, source in stored.items() if name not in used}


def taken(source: TensorSource, spans: Sequence[Span]) -> TensorSource:
    """Rows of a tensor that is still in its file."""
    parts = [_rows(source, there, length) for _, there, length in spans]
    return Joined.of(parts, (sum(part.shape[0] for part in parts), *source.shape[1:]))


def _rows(source: TensorSource, first: int, count: int) -> TensorSource:
    return source if count == source.shape[0] else rows_of(source, first, count)
