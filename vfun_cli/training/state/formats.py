"""How each strategy writes its weights, their moving average and the optimizer, and reads weights and optimizer back.

The average is read by ``load_average``, for which it does not matter who wrote it.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from vfun_cli.checkpoints.manifest import files_of
from vfun_cli.checkpoints.naming import PARAMETER_GROUPS, by_parameter
from vfun_cli.checkpoints.pickles import Listed, listed_classes, load_pickle
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import CheckpointError, VfunError, first_line
from vfun_cli.modeling.pickled import load_pickled
from vfun_cli.modeling.shards import shard_here
from vfun_cli.modeling.tensor_files import save_tensors
from vfun_cli.modeling.weights import read_safetensors
from vfun_cli.training.agreement import all_or_none
from vfun_cli.training.state.averaged import average_by_parameter, average_of_rank
from vfun_cli.training.state.gather import restore
from vfun_cli.training.state.live import TrainedState, require_names, trained_parameters
from vfun_cli.training.state.moments import Kept, counts, kept, of_a_rank, place, place_counts
from vfun_cli.training.waiting import patient_group, wait_for_all
from vfun_cli.typed_json import stays_inside

WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"


@dataclass(frozen=True)
class CheckpointFormat:
    """How one kind of strategy writes its state."""

    save: Callable[[TrainedState, Path], None]
    load: Callable[[TrainedState, Path], None]
    shards: str | None = None
    """Which files each rank writes, as a pattern with its ``{rank}``; all others are written by rank 0."""
    any_world_size: bool = True
    """Whether ``load`` reads what another number of processes wrote."""

    def written_by(self, rank: int, folder: Path) -> list[Path]:
        """The files of the folder that this rank has written."""
        if self.shards is None:
            return files_of(folder) if rank == 0 else []
        own = list(folder.glob(self.shards.format(rank=rank)))
        if rank == 0:
            own += set(files_of(folder)) - set(folder.glob(self.shards.format(rank="*")))
        return sorted(own)


def _save_plain(state: TrainedState, folder: Path) -> None:
    """Whole tensors from rank 0: float32 weights, and what the optimizer keeps as ``<parameter>.<moment>``."""
    if not state.accelerator.is_main_process:
        return
    trained = trained_parameters(state)
    save_tensors({name: parameter.detach().contiguous() for name, parameter in trained.items()}, folder / WEIGHTS_FILE)
    moments = {f"{PARAMETER_GROUPS}{key}": value for key, value in counts(state).items()}
    for name, found in kept(state).items():
        moments |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
    save_tensors(moments, folder / OPTIMIZER_FILE)
    if state.average is not None:
        save_tensors(average_by_parameter(state), folder / EMA_FILE)


def _load_plain(state: TrainedState, folder: Path) -> None:
    weights, moments = (dict(read_safetensors([folder / file])) for file in (WEIGHTS_FILE, OPTIMIZER_FILE))
    trained = trained_parameters(state)
    require_names(set(trained), set(weights), folder)
    restore(state, weights, by_parameter(moments, trained), counted_in(moments))


def counted_in(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer's file holds for groups of parameters, as ``<group>.<name>``."""
    return {
        key.removeprefix(PARAMETER_GROUPS): value for key, value in moments.items() if key.startswith(PARAMETER_GROUPS)
    }


def _save_sharded(state: TrainedState, folder: Path) -> None:
    """torch.distributed.checkpoint, every rank its own shards."""
    moments = {name: found for name, found in kept(state).items() if found}
    content = _sharded(state, moments, counts(state))
    if state.average is not None:
        content["ema"] = average_by_parameter(state)
    save_distributed(content, checkpoint_id=folder, process_group=patient_group())


def _load_sharded(state: TrainedState, folder: Path) -> None:
    reader = _ListedReader(folder)
    moments, counted = _stored(state, reader.read_metadata())
    content = _sharded(state, moments, counted)
    try:
        load_distributed(
            content,
            storage_reader=reader,
            planner=_ListedPlanner(folder),
            process_group=patient_group(),
        )
    except CheckpointException as error:  # torch's own, of all ranks together
        first = reader.refused or next(failure for failure, _ in error.failures.values())
        if isinstance(first, VfunError):
            raise first from None
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(first)}.") from error
    set_model_state_dict(state.model, content["model"], options=StateDictOptions(strict=False))
    with torch.no_grad():
        place(state, moments)
    place_counts(state, counted)


def _sharded(state: TrainedState, moments: Kept, counted: Mapping[str, Tensor]) -> dict[str, Any]:
    """What DCP saves, or reads into."""
    optimizer = {name: found for name, found in (("state", moments), ("groups", counted)) if found}
    content = {"model": get_model_state_dict(state.model, options=StateDictOptions(ignore_frozen_params=True))}
    return content | ({"optimizer": optimizer} if optimizer else {})


def _stored(state: TrainedState, metadata: Metadata) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Room for what the folder holds of the optimizer, as far as it is this rank's."""
    trained = trained_parameters(state)
    own = {name: (None, shard_here(weight)) for name, weight in trained.items() if isinstance(weight, DTensor)}
    moments: dict[str, dict[str, Tensor]] = {}
    counted: dict[str, Tensor] = {}
    for entry, path in (metadata.planner_data or {}).items():
        kind, described = path[:2], metadata.state_dict_metadata[entry]
        if not isinstance(described, TensorStorageMetadata):
            continue
        room = partial(torch.zeros, described.size, dtype=described.properties.dtype)
        if kind == ("optimizer", "groups"):
            counted[path[2]] = room()
        elif kind == ("optimizer", "state") and path[2] in own and of_a_rank(path[3]) in own[path[2]]:
            name, key = path[2:]
            shared = of_a_rank(key) is None and described.size == trained[name].shape
            moments.setdefault(name, {})[key] = torch.zeros_like(trained[name]).detach() if shared else room()
    return moments, counted


class _ListedReader(FileSystemReader):
    """torch reads ``.metadata`` with a pickle that runs whatever it asks for; here only what is on the list."""

    refused: CheckpointError | None = None
    """Why; torch 2.9 keeps to itself what ``read_metadata`` raised."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the shards hold and where.

        Raises:
            CheckpointError: it is damaged, asks for something else, or points outside of the folder.
        """
        try:
            return self._listed_metadata()
        except CheckpointError as error:
            self.refused = error
            raise

    def _listed_metadata(self) -> Metadata:
        file = Path(self.path) / ".metadata"
        metadata = load_pickle(file, Listed)
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{file} is damaged: it holds no description of a DCP checkpoint.")
        for part in (metadata.storage_data or {}).values():
            if not stays_inside(part.relative_path):
                raise CheckpointError(f"{file} is damaged: it points outside of the checkpoint.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _ListedPlanner(DefaultLoadPlanner):
    """The same of the shards' parts that are no tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take one of them, once the restricted reader has.

        Raises:
            CheckpointError: it asks for something to be run.
        """
        load_pickled(value, self._folder)
        value.seek(0)
        super().load_bytes(read_item, value)


_TAG = "state"


def _save_engine(state: TrainedState, folder: Path) -> None:
    """DeepSpeed's own checkpoint, and a file of each rank's part of the average; the frozen base is not in it."""
    engine: Any = state.model
    engine._change_recovery_script_permissions = lambda script: None  # to run it; not every disk can
    with _patient_waits(engine.optimizer):
        engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True, save_latest=False)
    if state.average is not None:
        file = f"zero_pp_rank_{state.accelerator.process_index}_mp_rank_00_ema.safetensors"  # as DeepSpeed's own
        with all_or_none():  # which waits, too: nobody may list the folder while a rank still writes
            save_tensors(average_of_rank(state), folder / _TAG / file)


@contextmanager
def _patient_waits(optimizer: Any) -> Iterator[None]:
    """Let DeepSpeed's ranks wait for each other's files as ours do.

    Its barrier is not all: when a rank has written its shard, ZeRO-3 gathers small weights again, by a collective of
    the training. All begin that together, or a rank that writes half an hour longer than another ended the job.
    """
    from deepspeed import comm

    barrier, gather_again = comm.barrier, getattr(optimizer, "checkpoint_event_epilogue", lambda: None)

    def gather_together() -> None:
        wait_for_all()
        gather_again()

    comm.barrier, optimizer.checkpoint_event_epilogue = wait_for_all, gather_together
    try:
        yield
    finally:
        comm.barrier = barrier
        del optimizer.checkpoint_event_epilogue


def _load_engine(state: TrainedState, folder: Path) -> None:
    engine: Any = state.model
    engine.checkpoint_engine.load = _load_listed
    loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found no state in {folder}.")


def _load_listed(path: str, map_location: Any = None) -> Any:
    """In the place of DeepSpeed's function, which runs whatever a file asks for."""
    return load_pickled(Path(path), Path(path), classes=listed_classes("deepspeed"), map_location=map_location)


FORMATS = {
    "plain": CheckpointFormat(_save_plain, _load_plain),
    "dcp": CheckpointFormat(_save_sharded, _load_sharded, shards="__{rank}_*.distcp"),
    "deepspeed": CheckpointFormat(
        _save_engine, _load_engine, shards=f"{_TAG}/*zero_pp_rank_{{rank}}_mp_rank_*", any_world_size=False
    ),
}


def format_of(strategy: str) -> CheckpointFormat:
    """In what form a strategy of this name keeps its state."""
    return FORMATS[STRATEGIES[strategy].checkpoint_format]
