"""Folders at the top level of a checkout, which an installed package has inside."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder of this name."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
