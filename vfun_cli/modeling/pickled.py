"""Loads what torch has pickled, by torch's own restricted reader: tensors, plain values and the classes that are named.

torch's other reader runs whatever function a file names.
"""

import pickle
import zipfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch

from vfun_cli.checkpoints.pickles import TorchArchive
from vfun_cli.errors import CheckpointError, first_line


def load_pickled(
    source: Path | IO[bytes],
    where: Path,
    *,
    classes: Iterable[tuple[str, str]] = (),
    map_location: Any = "cpu",
    mapped: bool = False,
) -> Any:
    """The object of a ``torch.save`` file. Runs nothing that it asks for.

    Args:
        where: the file, for messages.
        classes: modules and names of what it may hold beside tensors and plain values.
        mapped: leave the tensors in the file until they are read, where that is possible.

    Raises:
        CheckpointError: the file is damaged, or asks for anything else.
    """
    # Files from before torch 1.6 are not zip archives and cannot be mapped.
    mapped = mapped and zipfile.is_zipfile(source)
    # Files of other versions of a library may hold classes that this one lacks.
    known: list[Any] = [
        (found, f"{module}.{name}") for module, name in classes if (found := getattr(import_module(module), name, None))
    ]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(source, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # the restricted reader answers garbage with anything, even IndexError
        if isinstance(error, pickle.UnpicklingError):
            if where.is_file():
                TorchArchive(where)  # says which function it asks for
            raise CheckpointError(
                f"{where} is refused: its pickle asks for more than tensors; nothing was run.",
                hint="Take the file from a source that you trust.",
            ) from None
        raise CheckpointError(
            f"cannot read {where} ({where.stat().st_size} bytes): {first_line(error)}.",
            hint="The file is incomplete or damaged: download or copy it again.",
            at=where,
        ) from error
