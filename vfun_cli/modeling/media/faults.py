"""What is said of a file that cannot be decoded."""

from pathlib import Path

from vfun_cli.errors import MetadataError


def undecodable(path: str | Path, frame: int, error: Exception) -> MetadataError:
    """The error for frame ``frame`` of a file, with what the decoder said."""
    why = str(error).strip().splitlines() or [type(error).__name__]
    exists = Path(path).exists()
    return MetadataError(
        f"{path}: frame {frame} cannot be decoded ({why[-1][:200]})." if exists else f"{path}: there is no such file.",
        hint="Encode the file again, or leave its row out.",
    )
