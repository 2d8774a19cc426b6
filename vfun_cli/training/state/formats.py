"""How each strategy writes its weights and optimizer, and reads them back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.tensor_files import save_tensors
from vfun_cli.training.state.live import MOMENTS, TrainedState, inner_optimizer, require_names, trained_parameters

WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class CheckpointFormat:
    """How one kind of strategy writes its weights and optimizer."""

    save: Callable[[TrainedState, Path], None]
    load: Callable[[TrainedState, Path], None]
    any_world_size: bool = True
    """Whether ``load`` reads what another number of processes wrote."""


def _save_plain(state: TrainedState, folder: Path) -> None:
    """Whole tensors from rank 0: float32 weights, and the moments as ``<parameter>.<moment>``."""
    if not state.accelerator.is_main_process:
        return
    trained = trained_parameters(state)
    save_tensors({name: parameter.detach().contiguous() for name, parameter in trained.items()}, folder / WEIGHTS_FILE)
    moments = {}
    for name, parameter in trained.items():
        for moment, value in inner_optimizer(state.optimizer).state[parameter].items():
            moments[f"{name}.{moment}"] = value.detach().contiguous()
    save_tensors(moments, folder / OPTIMIZER_FILE)


def _load_plain(state: TrainedState, folder: Path) -> None:
    weights, moments = load_file(folder / WEIGHTS_FILE), load_file(folder / OPTIMIZER_FILE)
    trained = trained_parameters(state)
    require_names(set(trained), set(weights), folder)
    optimizer = inner_optimizer(state.optimizer)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            found = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in moments}
            if found:  # a checkpoint of step 0 has no moments yet
                # AdamW keeps its step count on the CPU unless it is fused.
                fused = optimizer.defaults["fused"]
                optimizer.state[parameter] = {
                    moment: value.to(parameter.device) if moment != "step" or fused else value
                    for moment, value in found.items()
                }


def _save_sharded(state: TrainedState, folder: Path) -> None:
    """torch.distributed.checkpoint, every rank its own shards."""
    save_distributed(_sharded(state), checkpoint_id=folder)


def _load_sharded(state: TrainedState, folder: Path) -> None:
    content = _sharded(state)
    load_distributed(content, checkpoint_id=folder)
    model, optimizer = state.model, inner_optimizer(state.optimizer)
    set_model_state_dict(model, content["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, content["optimizer"], options=_TRAINED_ONLY)


_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


def _sharded(state: TrainedState) -> dict[str, Any]:
    model, optimizer = state.model, inner_optimizer(state.optimizer)
    return {
        "model": get_model_state_dict(model, options=_TRAINED_ONLY),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED_ONLY),
    }


_TAG = "state"


def _save_engine(state: TrainedState, folder: Path) -> None:
    """DeepSpeed's own checkpoint; the frozen base is not in it."""
    engine: Any = state.model
    engine._change_recovery_script_permissions = lambda script: None  # to run it; not every disk can
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True, save_latest=False)


def _load_engine(state: TrainedState, folder: Path) -> None:
    engine: Any = state.model
    loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found no state in {folder}.")


FORMATS = {
    "plain": CheckpointFormat(_save_plain, _load_plain),
    "dcp": CheckpointFormat(_save_sharded, _load_sharded),
    "deepspeed": CheckpointFormat(_save_engine, _load_engine, any_world_size=False),
}


def format_of(strategy: str) -> CheckpointFormat:
    """In what form a strategy of this name keeps its state."""
    return FORMATS[STRATEGIES[strategy].checkpoint_format]
