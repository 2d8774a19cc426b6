"""Captions through BERT and mT5 side by side, as EasyAnimate V5 reads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertModel, PreTrainedTokenizerBase, T5EncoderModel

from vfun_cli.modeling.encoders.captions import BERT, T5, load_tokenizer
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.encoders.pretrained import load_model, padded_tokens
from vfun_cli.modeling.transfer import upload


class PaddedText(nn.Module):
    """Captions to the last hidden states [B, length, hidden] of one encoder that sees its padding.

    Special tokens are added and no attention mask is given, as the released model samples. (Its training script
    left the special tokens out, so every caption of a fine-tune looked unlike every prompt.)
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, length: int) -> None:
        super().__init__()
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self.length = length

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, length], padded on the right or cut."""
        return padded_tokens(self.tokenizer, captions, self.length)[0]

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Hidden states [B, length, hidden] in the encoder's dtype."""
        ids = self.tokenize(captions)
        ids = upload(ids, next(self.model.parameters()).device)
        with torch.no_grad():
            states: Tensor = self.model(input_ids=ids).last_hidden_state
        return states

    def outputs(self, inputs: Sequence[str]) -> list[Output]:
        """``states`` [length, hidden] of each caption."""
        return [{"states": self.encode([caption])[0]} for caption in inputs]


def load_bert(model: Path, tokenizer: Path, *, dtype: torch.dtype, length: int) -> PaddedText:
    """From a BertModel folder and a BertTokenizer folder.

    Raises:
        CheckpointError: one of them is incomplete.
    """
    encoder = load_model(BertModel, model, dtype=dtype, unused=("pooler.", "cls."))
    return PaddedText(encoder, load_tokenizer(BERT, tokenizer), length=length)


def load_t5(model: Path, tokenizer: Path, *, dtype: torch.dtype, length: int) -> PaddedText:
    """From a T5EncoderModel folder and a T5Tokenizer folder.

    Raises:
        CheckpointError: one of them is incomplete.
    """
    # Folders made from the whole model still hold the decoder.
    encoder = load_model(T5EncoderModel, model, dtype=dtype, unused=("decoder.", "lm_head."))
    return PaddedText(encoder, load_tokenizer(T5, tokenizer), length=length)
