"""The image encoder of Wan2.1: the visual tower of its CLIP file in transformers' CLIPVisionModel."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.pixels import LoadedClip, float_pixels
from vfun_cli.modeling.weights import empty_model, load_pth, load_weights

WEIGHTS = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
HEADS = 16
"""Attention heads of ViT-H/14. The one size that no tensor's shape tells."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_NAMES = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
_BLOCK_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer\.(\d+)\.(.+)\.(weight|bias)")
_UNUSED = {"head"}
"""The projection to the text space: Wan reads the layer before the last, not the embedding."""


class ClipImageEncoder(nn.Module):
    """One image to the hidden states of the last layer but one, [tokens, width] (released: [257, 1280])."""

    def __init__(self, model: CLIPVisionModel) -> None:
        super().__init__()
        self.model = freeze(model)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def from_file(cls, path: Path, *, dtype: torch.dtype, heads: int = HEADS) -> "ClipImageEncoder":
        """The visual tower of the released file; its text tower is not read.

        Raises:
            CheckpointError: the file is missing, or its ``visual.*`` tensors do not fit.
        """
        visual = {
            name.removeprefix("visual."): tensor
            for name, tensor in load_pth(path).items()
            if name.startswith("visual.")
        }
        return cls(load_clip_vision(visual, dtype=dtype, where=str(path), heads=heads))

    @property
    def tokens(self) -> int:
        """Rows of the output: patches and the class token."""
        return int(self.model.embeddings.position_embedding.num_embeddings)

    @property
    def dim(self) -> int:
        """Width of the output."""
        return self.model.embeddings.embed_dim

    def preprocess(self, frames: Tensor) -> Tensor:
        """Model input [B, 3, S, S] of frames [B, 3, H, W] in [-1, 1].

        Frames are truncated to 8 bits, squashed to a square with bicubic interpolation without antialiasing and
        normalised: as the released models saw them. transformers' CLIPImageProcessor resizes the short side with
        antialiasing and crops, and gives other features.
        """
        eight_bit = ((frames.float() * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
        # The originals hold the image in the model's dtype from here on.
        image = (eight_bit.float() / 255 - 0.5).div(0.5).to(self.model.dtype)
        size = cast(int, self.model.embeddings.image_size)
        square = nn.functional.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)
        return (square.float() * 0.5 + 0.5 - self.mean) / self.std

    def encode(self, frames: Tensor) -> Tensor:
        """Hidden states [B, tokens, width] of frames [B, 3, H, W] in [-1, 1]."""
        return self.encode_pixel_values(self.preprocess(frames.to(self.model.device)))

    def outputs(self, inputs: Sequence[LoadedClip]) -> list[Output]:
        """``states`` [tokens, width] of clips of one frame, [1, 3, H, W] each."""
        return [{"states": self.encode(float_pixels(clip, self.model.device))[0]} for clip in inputs]

    def encode_pixel_values(self, pixel_values: Tensor) -> Tensor:
        """Hidden states [B, tokens, width] of preprocessed images [B, 3, S, S], one image at a time."""
        with torch.no_grad():
            return torch.cat(
                [
                    self.model(image[None].to(self.model.dtype), output_hidden_states=True).hidden_states[-2]
                    for image in pixel_values
                ]
            )


def load_clip_vision(state: Mapping[str, Tensor], *, dtype: torch.dtype, where: str, heads: int) -> CLIPVisionModel:
    """The tower from tensors in the original naming, ``visual.`` taken off; sizes are read off their shapes.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    config = clip_vision_config(state, where, heads)
    model = empty_model(lambda: CLIPVisionModel(config), where=where)
    load_weights(model, _converted(state), dtype=dtype, where=where)
    return freeze(model)


def clip_vision_config(state: Mapping[str, Tensor], where: str, heads: int) -> CLIPVisionConfig:
    """Sizes from the shapes of the patch and position embeddings and of block 0."""
    try:
        width, _, patch, _ = state["patch_embedding.weight"].shape
        tokens = state["pos_embedding"].shape[1]
        inner = state["transformer.0.mlp.0.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{where} is not a Wan CLIP: it has no tensor 'visual.{error.args[0]}'.",
            hint=f"Download {WEIGHTS} of the released model again.",
            at=Path(where),
        ) from None
    layers = {int(match[1]) for name in state if (match := _BLOCK.fullmatch(name))}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _converted(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under transformers' names: the joint qkv cut in three, singleton dimensions of embeddings removed."""
    for name, tensor in state.items():
        if name in _UNUSED:
            continue
        match = _BLOCK.fullmatch(name)
        if match and match[2] == "attn.to_qkv":
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}", piece
        elif match and match[2] in _BLOCK_PARTS:
            yield f"encoder.layers.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}", tensor
        elif name == "cls_embedding":
            yield _NAMES[name], tensor.flatten()
        elif name == "pos_embedding":
            yield _NAMES[name], tensor.squeeze(0)
        else:
            yield _NAMES.get(name, name), tensor
