"""The caption states of HunyuanVideo text-to-video: a Llama decoder behind an instruction template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerBase

from vfun_cli.modeling.encoders.captions import LLAMA, load_tokenizer
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.pretrained import causal_mask, load_model, padded_tokens
from vfun_cli.modeling.transfer import upload

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
CROP_START: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
"""Tokens of the instruction before the caption (95), cut off after encoding."""
HIDDEN_STATE = -3
"""The raw output of the last layer but two, before the final norm."""


class LlamaPrompt(nn.Module):
    """Captions to hidden states and a mask, instruction removed."""

    def __init__(self, model: LlamaModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_folders(cls, model: Path, tokenizer: Path, *, dtype: torch.dtype, max_length: int = 256) -> "LlamaPrompt":
        """From the folders of the text encoder and its tokenizer, offline.

        Raises:
            CheckpointError: a folder is incomplete or does not fit.
        """
        llama = load_model(LlamaModel, model, dtype=dtype)
        return cls(llama, load_tokenizer(LLAMA, tokenizer), max_length)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [B, max_length, dim] and mask [B, max_length] int64 with the valid rows first."""
        prompts = [TEMPLATE.format(caption) for caption in captions]
        tokens = padded_tokens(self.tokenizer, prompts, CROP_START + self.max_length)
        ids, mask = (upload(each, self.model.device) for each in tokens)
        with torch.no_grad():
            states = self.model(
                ids,
                attention_mask=causal_mask(mask, self.model.dtype),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        return states[HIDDEN_STATE][:, CROP_START:], mask[:, CROP_START:]

    def outputs(self, inputs: Sequence[str]) -> list[Output]:
        """``states`` [max_length, dim] and ``mask`` [max_length] of each caption."""
        found = (self.encode([caption]) for caption in inputs)
        return [{"states": states[0], "mask": mask[0]} for states, mask in found]
