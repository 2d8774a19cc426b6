"""The bridge between a configuration and its plan: what ``plan-buckets`` prints and what the training core executes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import CheckpointError
from vfun_cli.families import detect
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import RunSegment, count_steps

ENDLESS_EPOCHS = 1_000_000
"""Epochs planned lazily when only the step limit ends a run."""


def plan_options(config: RunConfig, world_size: int | None = None) -> PlanOptions:
    """The options of the plan, which share their names with the configuration's."""
    return PlanOptions.pick(vars(config), world_size=world_size or config.num_processes or 1)


def read_dims(spec: FamilySpec, model_dir: Path | None) -> ModelDims:
    """The model's dimensions from its directory; those of the largest release when none is given.

    Raises:
        CheckpointError: the directory or its configuration is missing or damaged.
    """
    if model_dir is None:
        return spec.model.dims
    path = model_dir / spec.model.config_file
    if not model_dir.is_dir():
        raise CheckpointError(
            f"there is no model directory {model_dir}.",
            hint="Set --pretrained-model-name-or-path or MODEL_NAME to a downloaded model.",
        )
    fitting = detect.fitting(model_dir, families.FAMILIES.values())
    if fitting and spec.name not in fitting:
        raise CheckpointError(
            f"{model_dir} looks like a {' or '.join(fitting)} model, not like {spec.name}.",
            hint=f"vfun train {fitting[0]}, or point --pretrained-model-name-or-path at a {spec.name} model.",
        )
    if not path.is_file():
        raise CheckpointError(
            f"{model_dir} is no {spec.name} model: {spec.model.config_file} is missing.",
            hint=f"vfun train {spec.name} needs the model in its released layout.",
        )
    try:
        return spec.model.read_dims(
            json.loads(path.read_text(encoding="utf-8")) | spec.model.settings_beside(model_dir)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the configuration of a {spec.name} transformer: {type(error).__name__}: {error}.",
            hint="Download the file again.",
        ) from None


def total_steps(
    config: RunConfig, spec: FamilySpec, dims: ModelDims, table: ClipTable, earlier: Sequence[RunSegment] = ()
) -> int:
    """Optimizer steps of the run: the step limit if there is one, else what the epochs hold."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    return count_steps(spec, dims, table, plan_options(config), config.num_train_epochs, earlier)


def earlier_segments(state: Mapping[str, Any], slots: int) -> list[RunSegment]:
    """The sizes that steps had up to a checkpoint, for a continuation whose steps hold ``slots`` micro-batches.

    Args:
        state: the checkpoint's ``state.json``.
    """
    layouts = [RunSegment(**entry) for entry in state.get("layouts", ())]
    ran = state["world_size"] * state["run_config"]["gradient_accumulation_steps"]
    began = layouts[-1].until if layouts else 0
    if state["step"] > began and ran != slots:
        layouts.append(RunSegment(until=state["step"], slots=ran))
    elif state["step"] == began and layouts and layouts[-1].slots == slots:
        layouts.pop()  # back to the size it had before, without a step in between
    return layouts


def metadata_digest(path: Path) -> str:
    """SHA-256 of the metadata file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
