"""The transformer of Wan2.1-Fun Control: diffusers' Wan transformer plus the reference image of V1.1."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from vfun_cli.errors import CheckpointError
from vfun_cli.families.wan_fun_control import HINT, LATENT_CHANNELS, SPEC, check_variant, read_dims
from vfun_cli.modeling.weights import empty_model


class RotaryTables(nn.Module):
    """Rotary cosines and sines of a (frames, height, width) grid of tokens.

    diffusers keeps these as buffers: ``module.bfloat16()`` (DeepSpeed) would round them, and a model built on the
    meta device would have none. A few hundred values per forward cost nothing to compute.
    """

    def __init__(self, head_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.widths = (head_dim - 2 * side, side, side)
        self.patch_size = patch_size

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 tables [1, tokens, 1, head_dim] for latents [B, C, F, H, W]."""
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        cosines: list[Tensor] = []
        sines: list[Tensor] = []
        for axis, (size, width) in enumerate(zip(grid, self.widths, strict=True)):
            positions = torch.arange(size, dtype=torch.float64, device=hidden_states.device)
            tables = get_1d_rotary_pos_embed(
                width, positions, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            shape = [size if other == axis else 1 for other in range(3)]
            for table, parts in zip(tables, (cosines, sines), strict=True):
                parts.append(table.view(*shape, width).expand(*grid, width))
        cos, sin = (torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None] for parts in (cosines, sines))
        return cos, sin


class ReferencePatchEmbedding(nn.Conv3d):
    """Wan's patch embedding for latents whose first frame is a reference image with an embedding of its own."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.ref_conv = nn.Conv2d(LATENT_CHANNELS, dim, kernel_size=patch_size[1:], stride=patch_size[1:])

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, 1 + F, H, W] -> [B, dim, 1 + F, H / 2, W / 2]; the reference is in the first 16 channels."""
        reference = self.ref_conv(latents[:, :LATENT_CHANNELS, 0])
        return torch.cat([reference.unsqueeze(2), super().forward(latents[:, :, 1:])], dim=2)


class WanFunControlTransformer(WanTransformer3DModel):
    """Wan's image-to-video transformer over noisy | control | start image latents, V1.0 and V1.1.

    The reference image of V1.1 is one more latent frame before the clip: it takes temporal position 0 of the rotary
    embedding (the clip moves to 1..F), shares the timestep, and its prediction is thrown away.
    """

    # The trainer decides about types for the whole model; the forward casts where diffusers wants float32.
    _keep_in_fp32_modules = None

    def __init__(self, *, has_reference: bool, **config: Any) -> None:
        super().__init__(**config)
        self.has_reference = has_reference
        self.rope = RotaryTables(self.config.attention_head_dim, self.config.patch_size)
        if has_reference:
            dim = self.config.num_attention_heads * self.config.attention_head_dim
            self.patch_embedding = ReferencePatchEmbedding(self.config.in_channels, dim, self.config.patch_size)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        image: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Predict [B, 16, F, H, W].

        ``latents`` [B, 48, F, H, W]; ``timesteps`` [B], 0..1000; ``text`` [B, 512, text_dim], padded with zeros;
        ``image`` [B, 257, image_dim], the CLIP embedding; ``reference`` [B, 16, H, W], given exactly when the
        checkpoint has ``ref_conv`` (zeros where there is none, as at inference, so that no parameter goes unused).
        """
        if (reference is not None) != self.has_reference:
            raise ValueError(f"reference given: {reference is not None}, checkpoint has ref_conv: {self.has_reference}")
        if reference is not None:
            padding = latents.shape[1] - reference.shape[1]
            frame = F.pad(reference.unsqueeze(2), (0, 0, 0, 0, 0, 0, 0, padding))
            latents = torch.cat([frame, latents], dim=2)
        (prediction,) = super().forward(latents, timesteps, text, image, return_dict=False)
        return prediction if reference is None else prediction[:, :, 1:]


Shapes = Mapping[str, tuple[int, ...]]


def transformer_config(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``WanFunControlTransformer`` from the released tensors' shapes, checked against ``config.json``.

    Only the number of heads and eps cannot be seen in the tensors and are read from ``config``.

    Raises:
        CheckpointError: the tensors are another model's, or ``config.json`` contradicts them.
    """
    _refuse_other_models(shapes)
    dim, in_dim = shapes["patch_embedding.weight"][:2]
    patch_size = shapes["patch_embedding.weight"][2:]
    found = {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": shapes["head.head.weight"][0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "image_dim": shapes["img_emb.proj.0.weight"][0],
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "add_ref_conv": "ref_conv.weight" in shapes,
    }
    # An absent add_ref_conv means none: the plan counts its tokens from config.json alone.
    stated = {"add_ref_conv": False, **config}
    wrong = [
        f"{key} is {stated[key]!r}, the tensors say {value!r}"
        for key, value in found.items()
        if key in stated and stated[key] != value
    ]
    if wrong:
        raise CheckpointError(
            f"config.json contradicts the weights beside it: {'; '.join(wrong)}.",
            hint="Correct config.json, or fetch the model directory again.",
        )
    heads = config.get("num_heads")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise CheckpointError(f"config.json: num_heads is {heads!r}; it must divide dim {dim}.")
    return _arguments({**config, **found}, patch_size)


def blank_transformer(config: Mapping[str, Any]) -> WanFunControlTransformer:
    """The transformer of a released ``config.json`` alone, its parameters on meta.

    Raises:
        CheckpointError: it is another model's.
    """
    dims = read_dims(config)
    stated = {"out_dim": LATENT_CHANNELS, **config, **dims.extra, "add_ref_conv": bool(dims.extra["reference"])}
    return empty_model(lambda: WanFunControlTransformer(**_arguments(stated, (1, *SPEC.plan.patch_size[1:]))))


def _arguments(stated: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """Arguments of ``WanFunControlTransformer`` from the released keys."""
    dim, heads = stated["dim"], stated["num_heads"]
    same = ("text_dim", "freq_dim", "ffn_dim", "num_layers", "image_dim")
    return {
        "has_reference": stated["add_ref_conv"],
        "patch_size": tuple(patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": stated["in_dim"],
        "out_channels": stated["out_dim"],
        "eps": stated.get("eps", 1e-6),
        "added_kv_proj_dim": dim,
        **{name: stated[name] for name in same},
    }


def _refuse_other_models(shapes: Shapes) -> None:
    """Name the Wan models that look alike and are not this family."""
    if any(name.startswith("casual_audio_encoder.") for name in shapes):
        raise CheckpointError(
            "these are the weights of Wan2.2-S2V, not of a Wan2.1-Fun Control model.",
            hint="Train wan-s2v, or name another model.",
        )
    needed = ("patch_embedding", "head.head", "blocks.0.ffn.0", "time_embedding.0", "text_embedding.0")
    if missing := [name for name in needed if f"{name}.weight" not in shapes]:
        raise CheckpointError(
            f"this is no Wan transformer in the released naming: it has no {', '.join(missing)}.", hint=HINT
        )
    camera = any(name.startswith("control_adapter.") for name in shapes)
    check_variant(shapes["patch_embedding.weight"][1], camera=camera)
    if "img_emb.proj.0.weight" not in shapes:
        raise CheckpointError(
            "the transformer has no image branch (img_emb): it is a text-to-video Wan model.", hint=HINT
        )
