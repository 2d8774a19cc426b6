"""Sizes of memory as people write them."""

import re

from vfun_cli.errors import ConfigError

_GIB = 1 << 30
UNITS = {"": _GIB, "g": _GIB, "gib": _GIB, "gb": 10**9, "mib": 1 << 20, "mb": 10**6, "tib": 1 << 40, "tb": 10**12}
"""Bytes; without a unit, and with a mere G, it is GiB, as nvidia-smi and shops mean it."""


def memory_bytes(text: str) -> int:
    """``80GiB``, ``24 GB``, ``80``.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text.lower())
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0
    if not size:
        raise ConfigError(f"--memory is {text!r}; it takes a size such as 80GiB or 24GB.", option="--memory")
    return int(size)
