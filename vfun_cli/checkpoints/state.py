"""``state.json``: where in its run a checkpoint was written, and under which options."""

import json
from pathlib import Path
from typing import Any

from vfun_cli.errors import CheckpointError

STATE_FILE = "state.json"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint of ours.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content["step"], int):
            raise ValueError("it names no step")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} has no readable {STATE_FILE}: {error}.") from None
    return content
