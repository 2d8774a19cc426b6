"""Checks from their headers that the weight files of a model directory are complete, before a launch.

The names that a model needs are checked by the training processes, which build it; here only what the files say of
themselves is compared: the index with its shards, each header with the length of its file.
"""

import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vfun_cli.checkpoints.safetensors import read_file
from vfun_cli.errors import CheckpointError
from vfun_cli.lfs import refuse_lfs_pointer
from vfun_cli.typed_json import Check, file_inside, mapping, read_object

POINT_AT_RELEASE = "Point --pretrained-model-name-or-path at the folder of the released model, fully downloaded."
INDEX = ".safetensors.index.json"
MODEL_FILES = frozenset({".safetensors", ".pth", ".bin", ".json", ".model", ".txt"})
"""Endings of what a model is read from. Pictures and films beside it need not be there."""
LISTED = 5
PLACES: Mapping[str, Check] = {"weight_map": mapping(file_inside)}
"""What an index states."""
ZIP_START = b"PK"


def check_weights(model_dir: Path) -> int:
    """Check every safetensors and ``.pth`` file under the directory; the number of files checked.

    Raises:
        CheckpointError: a shard is missing or cut short, or lacks a tensor that the index places in it; a file of the
            model is a git-lfs pointer.
    """
    for file in sorted(model_dir.rglob("*")):
        if file.suffix in MODEL_FILES:
            refuse_lfs_pointer(file)
    again = f"Download {model_dir} again: a part of it is missing or incomplete."
    files = sorted(model_dir.rglob("*.safetensors"))
    try:
        held = {file: read_file(file).keys() for file in files}
        for index in sorted(model_dir.rglob(f"*{INDEX}")):
            _check_index(index, held)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=again) from error
    pickles = sorted(path for path in model_dir.rglob("*.pth") if path.is_file())
    for file in pickles:
        with file.open("rb") as stream:
            start = stream.read(len(ZIP_START))
        # An archive's table of contents is at its end. Files from before torch 1.6 are no archives.
        if not start or (start == ZIP_START and not zipfile.is_zipfile(file)):
            raise CheckpointError(f"{file} is cut short: {file.stat().st_size} bytes are there.", hint=again)
    return len(files) + len(pickles)


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of one model: the shards of ``<stem>.safetensors.index.json``, else
    ``<stem>.safetensors``, else every ``*.safetensors`` in the folder, sorted by name.

    Raises:
        CheckpointError: there is none, or a shard of the index is missing.
    """
    index = folder / f"{stem}{INDEX}"
    single = folder / f"{stem}.safetensors"
    if index.is_file():
        return sorted(set(read_index(index).values()))
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no weights in {folder}: neither {index.name} nor {single.name} nor any other *.safetensors file.",
            hint=POINT_AT_RELEASE,
        )
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The released names of a model's tensors with their shapes, from the headers of its files.

    Raises:
        CheckpointError: there are no files, or they are damaged.
    """
    return {name: tensor.shape for file in weight_files(folder) for name, tensor in read_file(file).items()}


def read_index(index: Path) -> dict[str, Path]:
    """For every tensor that a ``*.safetensors.index.json`` names, the shard beside it that holds the tensor.

    Raises:
        CheckpointError: it is no index, or a shard is missing.
    """
    placed: dict[str, str] = read_object(index, PLACES, hint="Download the index file again.")["weight_map"]
    files = {name: index.parent / shard for name, shard in placed.items()}
    shards = sorted(set(files.values()))
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, and {len(missing)} of them are missing: {_some(missing)}.",
            hint=f"Download the missing files again into {index.parent}.",
        )
    return files


def refuse_mismatch(
    where: str,
    model: str,
    *,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
    hint: str = "Check that the folder is the model of this family, that its config.json belongs to the weights, and "
    "that the download is complete.",
) -> None:
    """Refuse tensors that are not exactly those of a model.

    Args:
        where: where the tensors lie.

    Raises:
        CheckpointError: with the first of each kind that there are.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lines = [f"  {len(names)} {kind}: {_some(names, most=2 * LISTED)}" for kind, names in kinds.items() if names]
    if lines:
        raise CheckpointError("\n".join([f"the tensors in {where} do not fit {model}:", *lines]), hint=hint)


def _check_index(index: Path, held: Mapping[Path, Collection[str]]) -> None:
    lost = [name for name, shard in read_index(index).items() if name not in held.get(shard, ())]
    if lost:
        raise CheckpointError(f"{index} places tensors in shards that do not hold them: {_some(lost)}.")


def _some(names: Sequence[str], most: int = LISTED) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
