"""The caption and image states of HunyuanVideo image-to-video: LLaVA behind an instruction template."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedTokenizerBase,
)

from vfun_cli.errors import CheckpointError, MetadataError
from vfun_cli.modeling.encoders.captions import LLAMA, load_tokenizer
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.llama_prompt import HIDDEN_STATE
from vfun_cli.modeling.encoders.pretrained import causal_mask, load_model, padded_tokens
from vfun_cli.modeling.foreign import from_folder
from vfun_cli.modeling.pixels import LoadedClip, float_pixels
from vfun_cli.modeling.transfer import upload

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
CROP_START: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
"""Tokens before the caption (103), the image counted as one."""
IMAGE_START: int = DEFAULT_PROMPT_TEMPLATE["image_emb_start"]
"""Position of the image token (5)."""
IMAGE_LENGTH: int = DEFAULT_PROMPT_TEMPLATE["image_emb_len"]
"""Tokens an image takes (576)."""
ASSISTANT_LENGTH = 4
"""``<eot>``, start-header, ``assistant``, end-header: between the caption and the last line break."""
END_HEADER = "<|end_header_id|>"


class ImageInText(nn.Module):
    """LLaVA for prompts whose image is at one known place.

    Its own forward pass looks for the image's tokens in the ids, and the host waits until the device has found them.
    """

    def __init__(self, llava: LlavaModel) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, pixels: Tensor) -> Tensor:
        """Hidden states [B, n + 575, dim].

        Args:
            ids: [B, n], the image as one token.
            mask: [B, n + 575], with one entry for each token of the image; so have ``positions``.
            positions: [B, n + 575].
            pixels: [B, 3, height, width] as the image processor makes them.

        Raises:
            CheckpointError: the vision tower makes another number of tokens of an image.
        """
        text = self.llava.get_input_embeddings()(ids)
        image = torch.stack(self.llava.get_image_features(pixels.to(text.dtype)).pooler_output)
        if image.shape[1] != IMAGE_LENGTH:
            raise CheckpointError(
                f"the vision tower makes {image.shape[1]} tokens of an image, not {IMAGE_LENGTH}.",
                hint="The folders text_encoder and image_processor must come from the same released HunyuanVideo-I2V.",
            )
        states: Tensor = self.llava.language_model(
            inputs_embeds=_with_image(text, image),
            attention_mask=causal_mask(mask, text.dtype),
            position_ids=positions,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states[HIDDEN_STATE]
        return states


class LlavaPrompt(nn.Module):
    """Captions and first frames to hidden states and a mask: image states first, then the caption's."""

    def __init__(
        self,
        model: LlavaModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: CLIPImageProcessorPil,
        *,
        max_length: int = 256,
        interleave: int = 4,
    ) -> None:
        super().__init__()
        self.model = ImageInText(model)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length = max_length
        self.interleave = interleave
        self.image_token: int = model.config.image_token_index
        self.end_header: int = tokenizer.convert_tokens_to_ids(END_HEADER)

    @classmethod
    def from_folders(
        cls,
        model: Path,
        tokenizer: Path,
        image_processor: Path,
        *,
        dtype: torch.dtype,
        max_length: int = 256,
        interleave: int = 4,
    ) -> "LlavaPrompt":
        """From the folders of the text encoder, its tokenizer and its image processor, offline.

        Images are prepared with Pillow, as for the released model; transformers would take torchvision's other
        resampling wherever torchvision happens to be installed.

        Raises:
            CheckpointError: a folder is incomplete or does not fit.
        """
        llava = load_model(LlavaForConditionalGeneration, model, dtype=dtype)
        if not (image_processor / "preprocessor_config.json").is_file():
            raise CheckpointError(
                f"no image processor in {image_processor}: preprocessor_config.json is missing.",
                hint="Download the image_processor folder of the released HunyuanVideo-I2V.",
                at=image_processor,
            )
        return cls(
            llava.model,  # the language-model head would cost 128 thousand logits a token for nothing
            load_tokenizer(LLAMA, tokenizer),
            from_folder(CLIPImageProcessorPil, image_processor),
            max_length=max_length,
            interleave=interleave,
        )

    def encode(self, captions: Sequence[str], images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """States [B, L, dim] and mask [B, L] int64, valid rows first; L = 576 / interleave + max_length - 4.

        images: one [3, H, W] in [-1, 1] for each caption.

        Raises:
            MetadataError: a caption contains the image token.
        """
        ids, mask = self._tokenize(captions)
        pixels = self.image_processor([_to_pil(image) for image in images], return_tensors="pt").pixel_values
        mask = _with_image(mask, mask.new_ones(len(mask), IMAGE_LENGTH))
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        rows = torch.stack([self._rows(row) for row in ids])  # [B, L]
        device = self.model.llava.device
        ids, mask, positions, pixels, rows = (upload(each, device) for each in (ids, mask, positions, pixels, rows))
        with torch.no_grad():
            states = self.model(ids, mask, positions, pixels)
        return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1])), mask.gather(1, rows)

    def outputs(self, inputs: Sequence[tuple[str, LoadedClip]]) -> list[Output]:
        """``states`` [L, dim] and ``mask`` [L] of each caption with its image, a clip [1, 3, H, W]."""
        found = (self.encode([caption], [float_pixels(image)[0]]) for caption, image in inputs)
        return [{"states": states[0], "mask": mask[0]} for states, mask in found]

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, 103 + max_length], the image as one token."""
        for caption in captions:
            if self.tokenizer.convert_ids_to_tokens(self.image_token) in caption:
                raise MetadataError(
                    f"a caption contains the model's image token: {caption[:80]!r}.",
                    hint="Remove the token from the text of that metadata row.",
                )
        prompts = [TEMPLATE.format(caption) for caption in captions]
        ids, mask = padded_tokens(self.tokenizer, prompts, CROP_START + self.max_length)
        if (ids[:, IMAGE_START] != self.image_token).any():
            raise CheckpointError(
                f"the tokenizer does not put the image token {self.image_token} at position {IMAGE_START}.",
                hint="The folders tokenizer and text_encoder must come from the same released HunyuanVideo-I2V.",
            )
        return ids, mask

    def _rows(self, ids: Tensor) -> Tensor:
        """Positions in the expanded sequence that the transformer reads, for one row of unexpanded ids.

        The last line break stays and the assistant header before it goes. A caption that was cut has no assistant
        header, its last end-header lies in the instruction; then the last four tokens of the caption go, which keeps
        the length.
        """
        shift = IMAGE_LENGTH - 1
        last_header = int((ids == self.end_header).nonzero().max())
        line_break = last_header + 1 if last_header >= CROP_START else len(ids)
        return torch.cat(
            [
                torch.arange(IMAGE_START, IMAGE_START + IMAGE_LENGTH, self.interleave),
                torch.arange(CROP_START, line_break - ASSISTANT_LENGTH) + shift,
                torch.arange(line_break, len(ids)) + shift,
            ]
        )


def _with_image(text: Tensor, image: Tensor) -> Tensor:
    """[B, n, ...] with one entry for the image to [B, n + 575, ...] with those of ``image`` [B, 576, ...]."""
    return torch.cat([text[:, :IMAGE_START], image, text[:, IMAGE_START + 1 :]], dim=1)


def _to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to 8 bits, fractions dropped."""
    array = ((image.float() * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
