"""Captions through the language half of Qwen2-VL, as EasyAnimate V5.1 reads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLForConditionalGeneration

from vfun_cli.modeling.encoders.captions import QWEN, chat_prompts, load_tokenizer
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.encoders.pretrained import causal_mask, load_model, padded_tokens
from vfun_cli.modeling.transfer import upload


class Qwen2VLText(nn.Module):
    """Captions to [B, length, hidden]: what the last layer but one puts out, without a norm."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, length: int) -> None:
        super().__init__()
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self.length = length

    @classmethod
    def from_folders(cls, model: Path, tokenizer: Path, *, dtype: torch.dtype, length: int) -> "Qwen2VLText":
        """From the ``text_encoder`` and ``tokenizer`` folders.

        The visual tower and the output head (2.4 GB of the 7B model in bf16) are freed at once: captions need neither.

        Raises:
            CheckpointError: one of them is incomplete.
        """
        full = load_model(Qwen2VLForConditionalGeneration, model, dtype=dtype)
        return cls(full.model.language_model, load_tokenizer(QWEN, tokenizer), length=length)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [B, length] of each caption as a chat of one user message.

        Padded on the right. A caption too long loses its end and the template's closing tokens, as in training.
        """
        return padded_tokens(self.tokenizer, chat_prompts(self.tokenizer, captions), self.length)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Hidden states [B, length, hidden] in the encoder's dtype."""
        ids, mask = self.tokenize(captions)
        weight = next(self.model.parameters())
        with torch.no_grad():
            states = self.model(
                input_ids=upload(ids, weight.device),
                attention_mask=causal_mask(upload(mask, weight.device), weight.dtype),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        last_but_one: Tensor = states[-2]
        return last_but_one

    def outputs(self, inputs: Sequence[str]) -> list[Output]:
        """``states`` [length, hidden] of each caption."""
        return [{"states": self.encode([caption])[0]} for caption in inputs]
