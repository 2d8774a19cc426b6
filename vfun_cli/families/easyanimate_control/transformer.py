"""The EasyAnimate transformer of diffusers, built from the released configuration and named as released.

diffusers renamed the text half of an MMDiT block, and its rotary positions are wrong for crops that do not start at
zero; both are corrected here. Everything else of the model, V5's two text streams included, is diffusers' own.
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import EasyAnimateTransformer3DModel
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.families.easyanimate_control import CONFIG_DEFAULTS, POINT_AT
from vfun_cli.families.easyanimate_control.names import diffusers_name
from vfun_cli.modeling.rope import rotary_table
from vfun_cli.modeling.weights import empty_model, load_weights, model_settings, safetensors_files

NOT_MODEL_SHAPE = frozenset(
    {
        "transformer_type",
        "add_ref_latent_in_control_model",
        "position_of_clip_embedding",
        "enable_clip_in_inpaint",  # the original's own settings turn it off, whatever is written here
    }
)
"""Released configuration keys that say how the model is used, not what it is made of."""

UNSUPPORTED = ("ref_channels", "clip_channels", "swa_layers")
"""Released configuration keys that add layers which no Control model has."""


class EndpointExclusiveRope(nn.Module):
    """Rotary tables of the video tokens, computed for the latents at hand."""

    def __init__(self, patch_size: int, head_dim: int, base: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size, self.head_dim, self.base = patch_size, head_dim, base

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [F * H/p * W/p, head_dim] each, for latents [B, C, F, H, W]."""
        frames, height, width = latents.shape[2], *(side // self.patch_size for side in latents.shape[3:])
        return rotary_table(self.head_dim, frames, height, width, base=self.base, device=latents.device)


def build_transformer(config: Mapping[str, Any]) -> EasyAnimateTransformer3DModel:
    """The model of a released ``transformer/config.json``, with random weights (or none under ``empty_model``).

    Raises:
        CheckpointError: the configuration has layers that diffusers' class has not.
    """
    model = EasyAnimateTransformer3DModel(**model_arguments(config))
    # No parameters in it, so swapping it changes no name in the state dict. 90 x 60 latents are what the released
    # models' rotary grid is made for, whatever sample_width and sample_height say.
    patch = model.config.patch_size
    model.rope_embedding = EndpointExclusiveRope(patch, model.config.attention_head_dim, (60 // patch, 90 // patch))
    return model


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of diffusers' class that a released configuration means."""
    unsupported = {name: config[name] for name in UNSUPPORTED if config.get(name)}
    if unsupported:
        raise CheckpointError(
            f"the transformer's config.json states layers that the Control models do not have: {unsupported}.",
            hint=POINT_AT,
        )
    given = {k: v for k, v in config.items() if k not in NOT_MODEL_SHAPE and k not in UNSUPPORTED}
    known = signature(EasyAnimateTransformer3DModel.__init__).parameters
    return {**CONFIG_DEFAULTS, **model_settings(given, known, model="EasyAnimate Control")}


def load_transformer(
    folder: Path, config: Mapping[str, Any], given: Path | None = None
) -> EasyAnimateTransformer3DModel:
    """The transformer of a released model directory in float32 on the CPU, with other weights if they are given.

    Raises:
        CheckpointError: files are missing or do not fit.
    """
    model = empty_model(lambda: build_transformer(config), where=str(folder))
    load_weights(
        model,
        safetensors_files(folder),
        rename=diffusers_name,
        dtype=torch.float32,
        where=str(folder),
        transformer=True,
        given=given,
    )
    return model
