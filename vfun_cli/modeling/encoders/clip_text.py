"""The pooled CLIP caption embedding of HunyuanVideo."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from vfun_cli.modeling.encoders.captions import CLIP, CLIP_LIMIT, load_tokenizer
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.pretrained import load_model, padded_tokens
from vfun_cli.modeling.transfer import upload


class ClipPooledText(nn.Module):
    """Raw captions (no template) to the pooler output of CLIP's text tower."""

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_folders(cls, model: Path, tokenizer: Path, *, dtype: torch.dtype) -> "ClipPooledText":
        """From the text tower's and the tokenizer's folder, offline.

        Raises:
            CheckpointError: a folder is incomplete or does not fit.
        """
        return cls(load_model(CLIPTextModel, model, dtype=dtype), load_tokenizer(CLIP, tokenizer))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """[B, dim]. Captions are cut at 77 tokens and padded without an attention mask, as the model was trained."""
        ids, _ = padded_tokens(self.tokenizer, captions, CLIP_LIMIT)
        with torch.no_grad():
            pooled: Tensor = self.model(upload(ids, self.model.device)).pooler_output
        return pooled

    def outputs(self, inputs: Sequence[str]) -> list[Output]:
        """``pooled`` [dim] of each caption."""
        return [{"pooled": self.encode([caption])[0]} for caption in inputs]
