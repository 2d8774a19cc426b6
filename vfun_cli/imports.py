"""Imports of large packages."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector.

    Nothing of what an import makes is garbage, and the collector walks it again and again: for half a second of the
    five, of processor time, that a rank imports for.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def named(place: str) -> Any:
    """What ``module:name`` says, its module imported now."""
    module, _, name = place.partition(":")
    with uncollected():
        return getattr(importlib.import_module(module), name)
