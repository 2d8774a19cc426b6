"""The tensors of weights that are named instead of a model directory's own: see ``given``.

People have them as a safetensors file or shards, as ``export-bf16`` or the original scripts wrote them, or as a file of
``torch.save``. Only what the files say of their tensors is read here.
"""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints import safetensors
from vfun_cli.checkpoints.given import TRANSFORMER, VAE, typed
from vfun_cli.checkpoints.pickles import StoredTensor, TorchArchive
from vfun_cli.checkpoints.released import refuse_mismatch, weight_files
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.checkpoints.tensors import TensorSource
from vfun_cli.errors import CheckpointError
from vfun_cli.lfs import refuse_lfs_pointer

INSIDE = {TRANSFORMER: "transformer", VAE: "vae"}
"""Where they are in a whole model directory."""

WRAPPERS = ("module.", "model.", "diffusion_model.")
"""What stands before every name where a wrapper of the model was saved: DDP's, the original scripts' VAE of Wan, and
ComfyUI's (``model.diffusion_model.``)."""

STATE_DICT = ("state_dict", "module")
"""Under which some programs keep the tensors in a file of ``torch.save``: the second is DeepSpeed's, which the first
release of HunyuanVideo has."""

ANOTHER = "Name a safetensors file or a folder with such files, of the whole model: what vfun export-bf16 writes."


def files_of(place: Path, option: str) -> list[Path]:
    """The files that hold the weights.

    Raises:
        CheckpointError: there are none, or they are not here yet; names the option.
    """
    where = typed(option, place)
    if not place.exists():
        raise CheckpointError(f"{where}: there is no such file or folder.", hint=ANOTHER)
    if (place / STATE_FILE).is_file():
        raise CheckpointError(
            f"{where} is a checkpoint, whose tensors are those of a training run.",
            hint=f"vfun export-bf16 {shlex.quote(str(place))}, and name the folder that it writes.",
        )
    try:
        inside = place / INSIDE.get(option, "")
        files = [place] if place.is_file() else weight_files(inside if inside.is_dir() else place)
        for file in files:
            refuse_lfs_pointer(file)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint if place.is_file() else ANOTHER) from None
    return files


def stored_tensors(place: Path, option: str) -> dict[str, TensorSource]:
    """The tensors by their names without wrappers, unread.

    Raises:
        CheckpointError: as of :func:`files_of`; a file is damaged, or holds anything but tensors by name.
    """
    files = files_of(place, option)
    try:
        found = safetensors.read_files(files) if is_safetensors(files) else _pickled(files[0])
    except CheckpointError as error:
        raise CheckpointError(f"{typed(option, place)}: {error.message}", hint=error.hint or ANOTHER) from None
    wrapper = wrapper_of(found)
    return {name.removeprefix(wrapper): tensor for name, tensor in found.items()}


def is_safetensors(files: Collection[Path]) -> bool:
    """Whether they are safetensors files; else there is one, of ``torch.save``."""
    return all(file.suffix == ".safetensors" for file in files)


def state_dict_of(saved: Any, path: Path, tensor: type) -> Mapping[str, Any]:
    """The tensors by name of an object that ``torch.save`` wrote.

    Raises:
        CheckpointError: it holds anything else.
    """
    state = saved
    if isinstance(saved, Mapping):
        state = next((saved[name] for name in STATE_DICT if name in saved), saved)
    if not isinstance(state, Mapping) or not all(isinstance(value, tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict (tensors by name).", hint=ANOTHER, at=path)
    return state


def wrapper_of(names: Collection[str]) -> str:
    """What stands before all names because a wrapper of the model was saved."""
    start = ""
    while names and (
        inner := next((each for each in WRAPPERS if all(name.startswith(start + each) for name in names)), None)
    ):
        start += inner
    return start


def require_same_tensors(
    given: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], place: Path, option: str
) -> None:
    """Refuse weights that are not those of the model, tensor by tensor; the original scripts skip what does not fit.

    Args:
        given: shapes by name; ``own`` are the model's.

    Raises:
        CheckpointError: with all that is missing, unexpected or of another shape.
    """
    refuse_mismatch(
        typed(option, place),
        "the model",
        missing=[name for name in own if name not in given],
        unexpected=[name for name in given if name not in own],
        misshapen=[
            f"{name} is {list(shape)}, the model has {list(own[name])}"
            for name, shape in given.items()
            if name in own and shape != own[name]
        ],
        hint=f"{ANOTHER} A LoRA goes to --network-path.",
    )


def _pickled(path: Path) -> dict[str, TensorSource]:
    archive = TorchArchive(path)
    return {name: archive.source(each) for name, each in state_dict_of(archive.value, path, StoredTensor).items()}
