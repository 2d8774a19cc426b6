"""Which family a model directory fits, from its configuration files alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from vfun_cli.families.spec import FamilySpec


def fitting(model_dir: Path, families: Iterable[FamilySpec]) -> list[str]:
    """Names of the families whose transformer configuration the directory holds; none if it cannot be read."""
    return [
        spec.name for spec in families if (config := read_config(model_dir, spec)) and spec.model.recognises(config)
    ]


def read_config(model_dir: Path, spec: FamilySpec) -> dict[str, object]:
    """The transformer configuration where this family keeps it; empty if there is none or it is damaged."""
    try:
        found = json.loads((model_dir / spec.model.config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
