"""Models of transformers from a local folder, strictly: what does not fit is an error."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from vfun_cli.checkpoints.released import POINT_AT_RELEASE
from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.frozen import EncoderSource
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.foreign import OTHER_MODEL, from_folder
from vfun_cli.modeling.pickled import load_pickled
from vfun_cli.modeling.weights import read_json


def load_model(kind: type[PreTrainedModel], folder: Path, *, dtype: torch.dtype, unused: Sequence[str] = ()) -> Any:
    """A frozen model of class ``kind`` from its folder, on the CPU, offline.

    unused: beginnings of names that may be missing or left over, because nothing reads them here.

    Raises:
        CheckpointError: the folder is incomplete or unreadable, or its weights do not fit its configuration.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no {kind.__name__} in {folder}: config.json is missing.",
            hint=POINT_AT_RELEASE,
            at=folder,
        )
    read_json(folder / "config.json")  # refuses what would keep transformers busy for ever
    if not any(folder.glob("model*.safetensors")):  # of which transformers would take nothing else
        for file in sorted(folder.glob("pytorch_model*.bin")):
            load_pickled(file, file, mapped=True)
    # Under ZeRO-3 accelerate tells transformers to shard whatever it loads, whatever zero3_init_flag says. A frozen
    # encoder outside the engine would be left with empty weights.
    unset_hf_deepspeed_config()
    model, report = from_folder(kind, folder, dtype=dtype, output_loading_info=True)
    wrong = {
        what: sorted(name for name in map(str, report.get(f"{what}_keys") or ()) if not name.startswith(tuple(unused)))
        for what in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        lines = [f"  {len(names)} {what}: {', '.join(names[:10])}" for what, names in wrong.items() if names]
        raise CheckpointError(
            "\n".join([f"the tensors in {folder} do not fit {kind.__name__}:", *lines]),
            hint=OTHER_MODEL,
            at=folder,
        )
    return freeze(model)


def padded_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, length] int64 of texts, cut and padded on the right."""
    tokens = tokenizer(
        list(texts), max_length=length, padding="max_length", padding_side="right", truncation=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


def causal_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores [B, 1, L, L] of ``dtype``: 0 where a token sees another one, else -inf.

    mask: [B, L], 0 at the padding on the right.

    transformers makes the same of ``mask`` itself, but first reads on the host whether it hides anything, to leave it
    out: so the host would wait for the device. A mask of four dimensions it takes as it is.
    """
    length = mask.shape[-1]
    seen = mask.bool()[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, -torch.inf)


def text_source(
    load: Callable[..., Any], model: Path, tokenizer: Path, *, dtype: torch.dtype, length: int
) -> EncoderSource:
    """A text encoder of two folders that ``load`` makes of them; captions have ``length`` tokens. Ranks may share it.

    Raises:
        CheckpointError: a folder is not there; said at once, because loading comes after gigabytes of other parts.
    """
    for folder in (model, tokenizer):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: there is no such folder.",
                hint=POINT_AT_RELEASE,
                at=folder,
            )
    return EncoderSource(
        load=lambda: load(model, tokenizer, dtype=dtype, length=length),
        files=(model, tokenizer),
        settings=f"{dtype} {length}",
        dummy_input="",
    )
