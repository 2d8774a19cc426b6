"""``state.json``: where in its run a checkpoint was written, and under which options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints.given import TRANSFORMER, VAE
from vfun_cli.typed_json import (
    LARGEST_NUMBER,
    Check,
    file_path,
    items,
    mapping,
    number,
    optional,
    read_object,
    record,
    text,
    text_or_path,
    whole,
)

STATE_FILE = "state.json"

MOST_PROCESSES = 1_000_000
LAYOUTS = items(record({"until": whole(), "slots": whole(1)}))
"""The sizes that steps had in the parts of a run that are over."""


def setting(name: str, value: Any) -> None:
    """The value of an option, as far as every option's can be: a number, text, true or false, a data set, a list."""
    if isinstance(value, list):
        items(_entry)(name, value)
    elif isinstance(value, dict):
        _entry(name, value)
    elif isinstance(value, str):
        text_or_path(name, value)
    elif isinstance(value, float):
        number()(name, value)
    elif value is not None and not isinstance(value, bool):
        whole(-LARGEST_NUMBER, LARGEST_NUMBER)(name, value)


def _entry(name: str, value: Any) -> None:
    """Of a list: text, a number, or a data set with all that is said of it."""
    check = mapping(text_or_path) if isinstance(value, dict) else whole() if isinstance(value, int) else text_or_path
    check(name, value)


READ_WITHOUT_A_RUN: Mapping[str, Check] = {
    **dict.fromkeys((TRANSFORMER, VAE), optional(file_path)),
    "train_mode": optional(text()),
}
"""Options that an export and ``vfun generate`` take from a checkpoint, and that may be left out."""


def options(*paths: str, data: str | None = None) -> Check:
    """The options of a run; ``paths`` name those that must be there and are paths, ``data`` its data sets'."""
    counted = {"num_processes": whole(1, MOST_PROCESSES), "gradient_accumulation_steps": whole(1),
               "fsdp_shard_size": optional(whole(1, MOST_PROCESSES))}  # fmt: skip
    sets = {} if data is None else {data: setting}
    fields = record({**counted, **dict.fromkeys(paths, file_path), **sets, **READ_WITHOUT_A_RUN})
    values = mapping(setting)

    def check(name: str, value: Any) -> None:
        values(name, value)
        fields(name, value)

    return check


STATE: Mapping[str, Check] = {
    "step": whole(),
    "strategy": text(),
    "world_size": whole(1, MOST_PROCESSES),
    "family": text(),
    "run_id": optional(text()),
    "kind": text(),
    "layouts": optional(LAYOUTS),
    "run_config": options("pretrained_model_name_or_path"),
}
"""What every state.json states."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint of ours.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_object(checkpoint / STATE_FILE, STATE)
