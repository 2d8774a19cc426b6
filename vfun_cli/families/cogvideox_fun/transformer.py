"""The CogVideoX transformer of diffusers with the positions of CogVideoX-Fun, and single images through V1.5."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import CogVideoXPatchEmbed, get_3d_sincos_pos_embed
from torch import Tensor
from torch.nn import functional as F

from vfun_cli.errors import CheckpointError
from vfun_cli.families.cogvideox_fun import FRAMES_PER_LATENT, POINT_AT
from vfun_cli.modeling.rope import rotary_table
from vfun_cli.modeling.weights import empty_model, load_weights, model_settings, safetensors_files


class ResizedPositions(CogVideoXPatchEmbed):
    """Patches with the one table of positions that the 2b models were trained with, resized to the clip.

    diffusers computes another table for every size instead, which is off by 0.7 in the prediction.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, use_positional_embeddings=False, use_learned_positional_embeddings=False)
        frames = (self.sample_frames - 1) // FRAMES_PER_LATENT + 1
        height, width = self.sample_height // self.patch_size, self.sample_width // self.patch_size
        table = get_3d_sincos_pos_embed(
            self.embed_dim,
            (width, height),
            frames,
            self.spatial_interpolation_scale,
            self.temporal_interpolation_scale,
            output_type="pt",
        )
        # float32, [1, D, F, H, W]. Computed, so in no checkpoint.
        table = table.float().view(1, frames, height, width, self.embed_dim).permute(0, 4, 1, 2, 3)
        self.register_buffer("positions", table.contiguous(), persistent=False)

    def forward(self, text: Tensor, latents: Tensor) -> Tensor:
        """Tokens [B, text + F * H/p * W/p, D] of text states [B, text, channels] and latents [B, F, C, H, W].

        The text gets no positions.

        Raises:
            ValueError: more frames than the table has.
        """
        tokens: Tensor = super().forward(text, latents)
        frames, height, width = latents.shape[1], *(side // self.patch_size for side in latents.shape[3:])
        known: int = self.positions.shape[2]
        if frames > known:
            raise ValueError(f"{frames} latent frames, but this model has positions for {known}")
        resized = F.interpolate(self.positions, (known, height, width), mode="trilinear", align_corners=False)
        table = resized[:, :, :frames].flatten(2).transpose(1, 2)  # [1, F * H/p * W/p, D]
        return tokens + F.pad(table, (0, 0, text.shape[1], 0)).to(tokens)


class CogVideoXFunTransformer(CogVideoXTransformer3DModel):
    """diffusers' model under diffusers' names; it computes the rotary positions from the latents."""

    def __init__(self, *, add_noise_in_inpaint_model: bool = False, **config: Any) -> None:
        super().__init__(**config)
        # diffusers does not know this key, which says how the model wants its known pixels (V1.1 and later).
        self.register_to_config(add_noise_in_inpaint_model=add_noise_in_inpaint_model)
        if not self.config.use_rotary_positional_embeddings:
            self.patch_embed = ResizedPositions(**_patch_arguments(self.config))

    def forward(self, latents: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction [B, F, out, H, W] for latents [B, F, in, H, W], text [B, length, channels], timesteps [B].

        V1.5 takes a single latent frame, or an even number of them.
        """
        frames, pair = latents.shape[1], self.config.patch_size_t or 1
        if frames == 1 and pair > 1:
            latents = F.pad(latents, (0, 0) * 3 + (0, pair - 1))
        prediction: Tensor = super().forward(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=timesteps,
            image_rotary_emb=self._rotary(latents),
            return_dict=False,
        )[0]
        return prediction[:, :frames]

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the clip's own tokens; none for the 2b models."""
        config = self.config
        if not config.use_rotary_positional_embeddings:
            return None
        height, width = (side // config.patch_size for side in latents.shape[3:])
        # V1.5 counts tokens; 1.0 and 1.1 stretch every clip onto the grid they were trained on.
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        if config.patch_size_t:
            base = (height, width)
        frames = latents.shape[1] // (config.patch_size_t or 1)
        return rotary_table(config.attention_head_dim, frames, height, width, base=base, device=latents.device)


def build_transformer(config: Mapping[str, Any]) -> CogVideoXFunTransformer:
    """The model of a released ``transformer/config.json``, with random weights (or none under ``empty_model``).

    Raises:
        CheckpointError: the configuration is another model's.
    """
    known = {*signature(CogVideoXTransformer3DModel.__init__).parameters, "add_noise_in_inpaint_model"}
    given = model_settings(config, known, model="CogVideoX-Fun")
    foreign = [name for name in ("use_learned_positional_embeddings", "ofs_embed_dim") if given.get(name)]
    if foreign:
        raise CheckpointError(
            f"the transformer's config.json sets {', '.join(foreign)}: this is an image-to-video model of CogVideoX, "
            "not CogVideoX-Fun.",
            hint=POINT_AT,
        )
    return CogVideoXFunTransformer(**given)


def load_transformer(folder: Path, config: Mapping[str, Any], given: Path | None = None) -> CogVideoXFunTransformer:
    """The transformer of a released model directory in float32 on the CPU, with other weights if they are given.

    Raises:
        CheckpointError: files are missing or do not fit.
    """
    model = empty_model(lambda: build_transformer(config), where=str(folder))
    load_weights(model, safetensors_files(folder), where=str(folder), transformer=True, given=given)
    return model


def _patch_arguments(config: Any) -> dict[str, Any]:
    """The arguments of diffusers' patch embedding that a transformer's configuration means."""
    same = (
        "patch_size",
        "patch_size_t",
        "in_channels",
        "text_embed_dim",
        "sample_width",
        "sample_height",
        "sample_frames",
        "max_text_seq_length",
        "spatial_interpolation_scale",
        "temporal_interpolation_scale",
    )
    dim = config.num_attention_heads * config.attention_head_dim
    return {name: config[name] for name in same} | {"embed_dim": dim, "bias": config.patch_bias}
