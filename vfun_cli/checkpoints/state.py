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
        numbers = (content["step"], content["world_size"], content["run_config"]["gradient_accumulation_steps"])
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("it names no step, or no number of processes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} has no readable {STATE_FILE}: {error}.") from None
    return content
