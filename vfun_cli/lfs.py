"""git-lfs pointers: what a clone without git-lfs has in the place of large files.

The pointer's form: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

from pathlib import Path

from vfun_cli.errors import CheckpointError
from vfun_cli.files import regular_status

START = b"version https://git-lfs.github.com/spec/v1"
LONGEST = 1023
"""Bytes: the form wants a pointer to be shorter than 1024."""

WHAT = "a git-lfs pointer, not the file itself: git lfs pull fetches it"


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether the file is a pointer; of a longer file than one can be, nothing is read. False where there is none."""
    try:
        if regular_status(path).st_size > LONGEST:
            return False
        with Path(path).open("rb") as file:
            return file.read(len(START)) == START
    except OSError:
        return False


def refuse_lfs_pointer(path: Path) -> None:
    """Call a pointer in the place of a model's file that.

    Raises:
        CheckpointError: it is one.
    """
    if is_lfs_pointer(path):
        raise CheckpointError(
            f"{path} is {WHAT}.", hint=f"Run git lfs pull in {path.parent}, or download the file itself.", at=path
        )
