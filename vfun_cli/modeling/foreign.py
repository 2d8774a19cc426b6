"""Objects of other libraries, made from the files of a model directory: offline, by none of its code.

The libraries answer odd values in a configuration with any kind of exception, and here all mean the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfun_cli.errors import CheckpointError, VfunError, first_line

OTHER_MODEL = "The folder is incomplete or holds another model: download it again."


@contextmanager
def made_of(where: str, folder: Path | None = None) -> Iterator[None]:
    """Inside, something is made of a file or folder; that it cannot be is an error of the file.

    Args:
        folder: the one that could be downloaded again.

    Raises:
        CheckpointError: any exception came out, except of memory that is too small.
    """
    try:
        yield
    except (VfunError, MemoryError):
        raise
    except Exception as error:
        what = first_line(error) if isinstance(error, OSError | ValueError | RuntimeError) else repr(error)
        raise CheckpointError(f"{where} cannot be loaded: {what}.", hint=OTHER_MODEL, at=folder) from error


def from_folder(kind: Any, folder: Path, **settings: Any) -> Any:
    """``kind.from_pretrained`` of a local folder.

    Raises:
        CheckpointError: the folder holds no such thing.
    """
    with made_of(f"{kind.__name__} of {folder}", folder):
        return kind.from_pretrained(str(folder), local_files_only=True, **settings)
