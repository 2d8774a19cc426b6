"""Imports of large packages."""

import gc
import importlib
import site
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError, EnvironmentFault


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


def installed(module: str) -> Path | None:
    """Where the package of this module is installed; None if it is not. Nothing of it is run, and only the folders that
    Python installs packages into are looked at, not the working directory nor PYTHONPATH.
    """
    spec = PathFinder.find_spec(module.partition(".")[0], _installation_folders())
    return None if spec is None or spec.origin is None else Path(spec.origin)


def require_installed(place: str, option: str) -> None:
    """Refuse a name that a user typed if it is not that of an installed package: it must not run what lies around.

    Args:
        place: ``module:name``.

    Raises:
        EnvironmentFault: its package is not installed.
    """
    module, _, name = place.partition(":")
    package = module.partition(".")[0]
    where = installed(module)
    if where is None:
        raise EnvironmentFault(
            f"{option} {module}.{name}: no package {package} is installed.",
            hint=f"Install it beside vfun, into {sysconfig.get_path('purelib')}; other folders are not looked at.",
        )


def named_installed(place: str, option: str) -> Any:
    """As :func:`named`, of an installed package.

    Raises:
        EnvironmentFault: as of :func:`require_installed`, or another package of that name comes first here.
        ConfigError: the package has no such module or name.
    """
    require_installed(place, option)
    module, _, name = place.partition(":")
    found = find_spec(module.partition(".")[0])
    if found is None or found.origin != str(installed(module)):
        raise EnvironmentFault(
            f"{option} {module}.{name}: {'nothing' if found is None else found.origin} comes before the installed "
            f"{installed(module)}.",
            hint="Take that folder out of PYTHONPATH.",
        )
    try:
        return named(place)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {module}.{name} cannot be imported: {error}.", option=option) from error


def _installation_folders() -> list[str]:
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    return [*sorted(own), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
