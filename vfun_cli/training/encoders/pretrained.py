"""Frozen encoders stored in the transformers layout, loaded offline and strictly."""

from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vfun_cli.errors import CheckpointError
from vfun_cli.training.encoders.placement import freeze

Model = TypeVar("Model", bound=PreTrainedModel)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def load_pretrained(kind: type[Model], folder: Path, *, dtype: torch.dtype) -> Model:
    """``kind.from_pretrained(folder)`` on the CPU, frozen, without its silent random initialisation.

    Raises CheckpointError if the folder is incomplete or a tensor is missing, unexpected or of another shape.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no {kind.__name__} in {folder}: config.json is missing",
            hint="point --pretrained_model_name_or_path at the folder of the released model, fully downloaded",
        )
    try:
        model, info = kind.from_pretrained(str(folder), dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot load {kind.__name__} from {folder}: {(str(error) or type(error).__name__).splitlines()[0]}",
            hint="the folder is incomplete or holds another model: download it again",
        ) from error
    wrong = {what: sorted(map(str, info.get(f"{what}_keys") or ())) for what in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        lines = [f"  {len(names)} {what}: {', '.join(names[:10])}" for what, names in wrong.items() if names]
        raise CheckpointError(
            "\n".join([f"the tensors in {folder} do not fit {kind.__name__}:", *lines]),
            hint="the folder is incomplete or holds another model: download it again",
        )
    return freeze(model)


def load_tokenizer(kind: type[Tokenizer], folder: Path) -> Tokenizer:
    """A tokenizer folder, offline, padding on the right. Raises CheckpointError if it cannot be read."""
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"no tokenizer in {folder}: tokenizer_config.json is missing",
            hint="point --pretrained_model_name_or_path at the folder of the released model, fully downloaded",
        )
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, padding_side="right")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the tokenizer in {folder}: {(str(error) or type(error).__name__).splitlines()[0]}",
            hint="download the folder again",
        ) from error
