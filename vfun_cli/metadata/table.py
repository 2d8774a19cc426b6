"""The clips of a dataset as columns: all that the plan knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vfun_cli.disks.abilities import naming

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipTable:
    """One entry per metadata row, in file order. Zero means unknown, and an unknown size or length is dropped."""

    row: IntArray
    """Metadata row, counted from 0; identifies the clip in every random draw."""
    is_image: BoolArray
    width: IntArray
    """Pixels, as displayed."""
    height: IntArray
    frames: IntArray
    """Frames in the file; ignored for images."""
    fps_num: IntArray
    """Frame rate as a fraction; ignored for images."""
    fps_den: IntArray
    held_out: BoolArray
    """Rows that are validated on and never trained."""
    set: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which of the run's data sets the row is of; left out, all are of the first."""

    def __post_init__(self) -> None:
        if not len(self.set):
            object.__setattr__(self, "set", np.zeros(len(self.row), np.int64))
        for column in fields(self):
            kind = np.bool_ if column.name in ("is_image", "held_out") else np.int64
            values: NDArray[Any] = np.ascontiguousarray(getattr(self, column.name), dtype=kind)
            if values.shape != (len(self.row),):
                raise ValueError(f"column {column.name} has shape {values.shape}, the table has {len(self.row)} rows")
            object.__setattr__(self, column.name, values)

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def from_columns(
        cls,
        *,
        width: ArrayLike,
        height: ArrayLike,
        frames: ArrayLike,
        fps: Sequence[tuple[int, int]] | tuple[int, int],
        is_image: ArrayLike | None = None,
        row: ArrayLike | None = None,
    ) -> "ClipTable":
        """A table from sequences; ``fps`` is one (numerator, denominator) for all clips or one for each."""
        num_rows = len(np.atleast_1d(np.asarray(width)))
        rates = np.broadcast_to(np.asarray(fps, dtype=np.int64).reshape(-1, 2), (num_rows, 2))
        return cls(
            row=np.arange(num_rows) if row is None else np.asarray(row),
            is_image=np.zeros(num_rows, dtype=np.bool_) if is_image is None else np.asarray(is_image, dtype=np.bool_),
            width=np.asarray(width, dtype=np.int64),
            height=np.asarray(height, dtype=np.int64),
            frames=np.asarray(frames, dtype=np.int64),
            fps_num=rates[:, 0],
            fps_den=rates[:, 1],
            held_out=np.zeros(num_rows, dtype=np.bool_),
        )

    @classmethod
    def empty(cls) -> "ClipTable":
        """No clips."""
        return cls.from_columns(width=[], height=[], frames=[], fps=(1, 1))

    def save(self, path: Path) -> None:
        """Write the columns to an ``.npz`` file."""
        with naming(path), path.open("wb") as file:
            np.savez(file, **{column.name: getattr(self, column.name) for column in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "ClipTable":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as columns:  # the first version knew one set
            return cls(**{column.name: columns[column.name] for column in fields(cls) if column.name in columns})
