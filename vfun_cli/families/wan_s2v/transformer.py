"""The Wan2.2-S2V transformer: speech, a reference image, a control video and earlier motion drive a video.

diffusers has no class for it. Modules carry the names of the released checkpoint, so weights load and export without
a rename.

Rules that keep one forward correct under FSDP2, ZeRO-3 and LoRA:
- a parameter is read only inside the forward of the module that owns it, where sharding hooks have gathered it;
- rope tables travel in an object, not as tensor arguments: FSDP2 casts floating-point arguments to bfloat16 (the
  caller must keep it from doing so to ``timestep``, with ``cast_forward_inputs=False``: 999 would become 1000);
- every cast is written out, and nothing in the forward waits for the accelerator.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from vfun_cli.errors import ConfigError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.families.wan_s2v.sizes import MOTION_FRAMES, MOTION_LATENTS, NUM_AUDIO_LAYERS
from vfun_cli.modeling.transfer import upload
from vfun_cli.modeling.weights import empty_model, load_weights, model_settings, read_json, safetensors_files

SUPPORTED: dict[str, Any] = {
    "model_type": "s2v",
    "patch_size": (1, 2, 2),
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "add_last_motion": True,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "enable_motioner": False,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
}
"""Configuration keys for which the released value is the only one that has weights."""

REFERENCE_POSITION = 30
"""Temporal rope position of the reference image."""

ADAIN_EPS = 1e-5
"""LayerNorm epsilon before audio injection; the blocks' own comes from the configuration (1e-6)."""


class RotaryTable:
    """cos and sin of the rope angles, each [L, head_dim / 2] float32.

    A plain object on purpose: FSDP2 walks tuples, dictionaries and dataclasses it knows and would round the tables.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def first(self, length: int) -> "RotaryTable":
        """The table of the first ``length`` tokens."""
        return RotaryTable(self.cos[:length], self.sin[:length])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of x [B, L, heads, head_dim] in float32; the dtype of x comes back."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotary_positions(frames: int, height: int, width: int) -> np.ndarray:
    """Rope positions (t, h, w) of all tokens as float64 [L, 3], for latent sizes F, H, W.

    Order: video, reference, motion 1x, 2x, 4x. Motion lies at negative times, nearest first. The coarser motion
    grids are spread over the fine one and truncated towards zero, in float64 as the released model does.
    """
    rows, columns = height // 2, width // 2

    def grid(times: Sequence[float] | np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
        h = np.trunc(np.linspace(0, rows - 1, num_rows))
        w = np.trunc(np.linspace(0, columns - 1, num_columns))
        t, h, w = np.meshgrid(np.asarray(times, dtype=np.float64), h, w, indexing="ij")
        return np.stack((t, h, w), axis=-1).reshape(-1, 3)

    return np.concatenate(
        (
            grid(np.arange(frames), rows, columns),
            grid([REFERENCE_POSITION], rows, columns),
            grid([-1], rows, columns),
            grid([-3], height // 4, width // 4),
            grid(-np.trunc(np.linspace(MOTION_LATENTS, 4, 4)), height // 8, width // 8),
        )
    )


@lru_cache(maxsize=32)
def rotary_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> RotaryTable:
    """Rope angles of ``rotary_positions``, kept for each shape.

    A head of d splits into d - 4⌊d/6⌋ for time and 2⌊d/6⌋ each for height and width.
    """
    third = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * third, third, third)
    positions = rotary_positions(frames, height, width)
    angles = np.concatenate(
        [
            positions[:, axis, None] * 10000.0 ** (-np.arange(0, size, 2, dtype=np.float64) / size)
            for axis, size in enumerate(sizes)
        ],
        axis=1,
    )
    # A table born under inference_mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        cos, sin = (upload(torch.from_numpy(f(angles).astype(np.float32)), device) for f in (np.cos, np.sin))
    return RotaryTable(cos, sin)


def timestep_sinusoid(timestep: Tensor, size: int) -> Tensor:
    """[B] timesteps (0..1000) to [B, size] float32: cosines first, angles in float64."""
    half = size // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


class WanS2VRMSNorm(nn.Module):
    """RMS norm over the whole hidden size, before heads are split; torch computes it in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class WanS2VLayerNorm(nn.Module):
    """Affine LayerNorm whose result has the dtype of its input, whatever the parameters' dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def plain_layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters; the dtype of x comes back, rounded once."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def to_tokens(grid: Tensor) -> Tensor:
    """[B, D, F, H, W] -> [B, F * H * W, D]."""
    return grid.flatten(2).transpose(1, 2)


class WanS2VAttention(nn.Module):
    """Multi-head attention of x to context, with q and k normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanS2VRMSNorm(dim, eps)
        self.norm_k = WanS2VRMSNorm(dim, eps)

    def forward(
        self, x: Tensor, context: Tensor, rotary: RotaryTable | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, L, D], context [B, T, D], mask bool [B, 1, 1, T] (False: key left out) -> [B, L, D]."""
        split = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, split)
        k = self.norm_k(self.k(context)).unflatten(-1, split)
        v = self.v(context).unflatten(-1, split)
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, heads, tokens, head_dim]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(2))


class WanS2VBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward, modulated by time in two segments.

    Video tokens see the sample's timestep, reference and motion tokens see timestep 0. Two rows of modulation are
    applied to two slices, which spares an L x 6 x D tensor (2.2 GB in bfloat16 at 36,000 tokens).
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = WanS2VAttention(dim, num_heads, eps)
        self.norm3 = WanS2VLayerNorm(dim, eps)
        self.cross_attn = WanS2VAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        rotary: RotaryTable,
        num_video_tokens: int,
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, L, D], time [B, 2, 6, D] (row 0: video, row 1: the rest), text [B, T, D] -> [B, L, D]."""
        modulation = (self.modulation[:, None].to(x.dtype) + time.to(x.dtype)).unbind(2)  # six of [B, 2, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        sizes = (num_video_tokens, x.shape[1] - num_video_tokens)

        def added(bias: Sequence[Tensor], value: Tensor, factor: Tensor) -> Tensor:
            """bias + value * factor, segment by segment: read once and written twice, the second time side by side."""
            parts = value.to(x.dtype).split(sizes, dim=1)
            return torch.cat([torch.addcmul(bias[i], part, factor[:, i, None]) for i, part in enumerate(parts)], dim=1)

        def modulate(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return added(shift[:, :, None].unbind(1), plain_layer_norm(value, self.eps), 1 + scale)

        def gated(value: Tensor, change: Tensor, gate: Tensor) -> Tensor:
            return added(value.split(sizes, dim=1), change, gate)

        normed = modulate(x, shift1, scale1)
        x = gated(x, self.self_attn(normed, normed, rotary, mask), gate1)
        x = x + self.cross_attn(self.norm3(x), text).to(x.dtype)
        return gated(x, self.ffn(modulate(x, shift2, scale2)), gate2)


class CausalConv1d(nn.Module):
    """Kernel 3 over time that sees the present and two earlier frames; the start is replicated."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, C] -> [N, ⌈T / stride⌉, C']."""
        return self.conv(F.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2)


class AudioMotionEncoder(nn.Module):
    """Audio features at video rate to tokens at latent rate: local and global streams share the later convolutions."""

    def __init__(self, audio_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.conv1_local = CausalConv1d(audio_dim, dim // 4 * num_tokens)
        self.conv1_global = CausalConv1d(audio_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> local [B, ⌈T/4⌉, num_tokens + 1, D], global [B, ⌈T/4⌉, D]."""
        batch = x.shape[0]
        local = self.conv1_local(x).unflatten(-1, (self.num_tokens, -1)).transpose(1, 2).flatten(0, 1)
        local = self._downsample(local).unflatten(0, (batch, self.num_tokens)).transpose(1, 2)
        padding = self.padding_tokens.to(local.dtype).expand(batch, local.shape[1], 1, -1)
        return torch.cat((local, padding), dim=2), self.final_linear(self._downsample(self.conv1_global(x)))

    def _downsample(self, x: Tensor) -> Tensor:
        for conv in (self.conv2, self.conv3):
            x = conv(F.silu(plain_layer_norm(x, 1e-6)))
        return F.silu(plain_layer_norm(x, 1e-6))


class CausalAudioEncoder(nn.Module):
    """A learned mixture of the 25 wav2vec2 states, then the motion encoder."""

    def __init__(self, audio_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, NUM_AUDIO_LAYERS, 1, 1), 0.01))
        self.encoder = AudioMotionEncoder(audio_dim, dim, num_tokens)

    def forward(self, audio: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """audio [B, 25, C, n] -> local [B, ⌈(73+n)/4⌉-19, tokens + 1, D], global [B, ⌈(73+n)/4⌉-19, D] in ``dtype``.

        The first frame is repeated for the motion history, whose latents are then dropped.
        """
        weights = F.silu(self.weights.float())
        mixed = (audio.float() * weights).sum(dim=1) / weights.sum(dim=1)
        mixed = torch.cat((mixed[..., :1].expand(-1, -1, MOTION_FRAMES), mixed), dim=-1)
        local, overall = self.encoder(mixed.transpose(1, 2).to(dtype))
        return local[:, MOTION_LATENTS:], overall[:, MOTION_LATENTS:]


class AudioAdaNorm(nn.Module):
    """LayerNorm of video tokens, shifted and scaled by the global audio vector of their frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x [N, T, D], vector [N, D] -> [N, T, D]."""
        shift, scale = self.linear(F.silu(vector))[:, None].to(x.dtype).chunk(2, dim=-1)
        return plain_layer_norm(x, ADAIN_EPS) * (1 + scale) + shift


class InjectedAttention(WanS2VAttention):
    """Attention to audio: a class of its own, which FSDP gathers alone, as it does a block."""


class AudioInjector(nn.Module):
    """Cross-attention of each latent frame to the audio tokens of that frame, one set of weights for each layer."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, eps: float) -> None:
        super().__init__()
        self.injector = nn.ModuleList(InjectedAttention(dim, num_heads, eps) for _ in range(num_layers))
        self.injector_adain_layers = nn.ModuleList(AudioAdaNorm(dim) for _ in range(num_layers))

    def forward(self, index: int, x: Tensor, local: Tensor, overall: Tensor) -> Tensor:
        """What to add to the video tokens x [B, S, D]; local [B, F, tokens, D], overall [B, F, D] -> [B, S, D]."""
        frames = x.unflatten(1, (local.shape[1], -1)).flatten(0, 1)  # [B * F, S / F, D]
        normed = self.injector_adain_layers[index](frames, overall.flatten(0, 1))
        out = self.injector[index](normed, local.flatten(0, 1))
        return out.to(x.dtype).reshape(x.shape)


class FramePacker(nn.Module):
    """Motion latents to tokens, the older the coarser."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_dim, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.proj_2x = nn.Conv3d(in_dim, dim, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        self.proj_4x = nn.Conv3d(in_dim, dim, kernel_size=(4, 8, 8), stride=(4, 8, 8))

    def forward(self, motion: Tensor) -> Tensor:
        """motion [B, C, Lm, H, W], newest last, padded or cut to 19 -> [B, T, D], the newest frame's tokens first."""
        motion = F.pad(motion[:, :, -MOTION_LATENTS:], (0, 0, 0, 0, max(MOTION_LATENTS - motion.shape[2], 0), 0))
        oldest, older, newest = motion.split((16, 2, 1), dim=2)
        scales = (self.proj(newest), self.proj_2x(older), self.proj_4x(oldest))
        return torch.cat([to_tokens(scale) for scale in scales], dim=1)


class TimeProjection(nn.Sequential):
    """From the time embedding to the modulation of blocks; a class of its own, as above."""


class Head(nn.Module):
    """Modulated LayerNorm and the projection to patches."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, S, D], time [B, D] -> [B, S, out_features]."""
        shift, scale = (self.modulation.to(x.dtype) + time[:, None].to(x.dtype)).chunk(2, dim=1)
        return self.head(plain_layer_norm(x, self.eps) * (1 + scale) + shift)


class WanS2VTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Wan2.2-S2V: latents, timestep, text, control, reference, motion and audio to the flow-matching velocity.

    The arguments are the keys of the released ``config.json``; keys of SUPPORTED admit one value, others raise
    ConfigError. ``zero_init`` and ``motion_token_num`` are accepted and have no effect: the first describes an
    initialisation that loading overwrites, the second belongs to the motioner.

    Injector k sits after the k-th smallest id of ``audio_inject_layers``. (The original matches ids as substrings of
    module names, so that id 1 would also hit layers 10 to 19; for the released list both give the same map.)
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("WanS2VBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        model_type: str = "s2v",
        dim: int = 5120,
        ffn_dim: int = 13824,
        num_heads: int = 40,
        num_layers: int = 40,
        in_dim: int = 16,
        out_dim: int = 16,
        freq_dim: int = 256,
        text_len: int = 512,
        text_dim: int = 4096,
        eps: float = 1e-6,
        cond_dim: int = 16,
        audio_dim: int = 1024,
        num_audio_token: int = 4,
        audio_inject_layers: Sequence[int] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        patch_size: Sequence[int] = (1, 2, 2),
        window_size: Sequence[int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        enable_adain: bool = True,
        adain_mode: str = "attn_norm",
        zero_timestep: bool = True,
        zero_init: bool = True,
        add_last_motion: bool = True,
        enable_tsm: bool = False,
        trainable_token_pos_emb: bool = False,
        enable_motioner: bool = False,
        motion_token_num: int = 1024,
        enable_framepack: bool = True,
        framepack_drop_mode: str = "padd",
    ) -> None:
        super().__init__()
        refuse_unsupported(self.config)
        layers = sorted(audio_inject_layers)
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(num_layers)):
            raise ConfigError(
                f"audio_inject_layers = {list(audio_inject_layers)}: not different layers below {num_layers}."
            )
        self.injector_of_layer = {layer: index for index, layer in enumerate(layers)}

        patch = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=patch, stride=patch)
        self.cond_encoder = nn.Conv3d(cond_dim, dim, kernel_size=patch, stride=patch)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = TimeProjection(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanS2VBlock(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, math.prod(patch) * out_dim, eps)
        self.casual_audio_encoder = CausalAudioEncoder(audio_dim, dim, num_audio_token)  # spelt as released
        self.audio_injector = AudioInjector(dim, num_heads, len(layers), eps)
        self.frame_packer = FramePacker(in_dim, dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control_latents: Tensor,
        ref_latents: Tensor,
        motion_latents: Tensor,
        audio: Tensor,
        drop_motion: Sequence[bool],
    ) -> Tensor:
        """Predict the velocity [B, 16, F, H, W].

        hidden_states [B, 16, F, H, W]: noisy latents. timestep [B]: 0..1000.
        encoder_hidden_states [B, text_len, text_dim]: text states, zeros after the prompt's end. Every row is attended.
        control_latents [B, 16, F, H, W]; ref_latents [B, 16, 1, H, W]; motion_latents [B, 16, Lm, H, W], newest last.
        audio [B, 25, audio_dim, n]: wav2vec2 states at the video's frame rate, n = 4 F.
        drop_motion: for each sample whether it does not see the motion tokens. If all drop them they are left out of
        the sequence (their parameters still get a gradient, of zero); in a mixed batch they are masked. No tensor: DDP
        and FSDP would move it to the accelerator, and reading it there makes the host wait.

        Raises:
            ValueError: shapes that the released model would accept and train misaligned.
        """
        self._check_shapes(hidden_states, encoder_hidden_states, drop_motion)
        frames, height, width = hidden_states.shape[2:]
        dtype = self.patch_embedding.weight.dtype

        video = to_tokens(self.patch_embedding(hidden_states.to(dtype)))
        video = video + to_tokens(self.cond_encoder(control_latents.to(dtype)))
        reference = to_tokens(self.patch_embedding(ref_latents.to(dtype)))
        motion = self.frame_packer(motion_latents.to(dtype))
        if all(drop_motion):
            motion = motion[:, :0]
        x, mask = self._sequence(video, reference, motion, drop_motion)
        rotary = rotary_table(frames, height, width, self.config["dim"] // self.config["num_heads"], x.device)
        rotary = rotary.first(x.shape[1])

        time, modulation = self._time(timestep, dtype)
        text = self.text_embedding(encoder_hidden_states.to(dtype)).to(x.dtype)
        local, overall = self.casual_audio_encoder(audio, dtype)
        if local.shape[1] != frames:
            raise ValueError(
                f"audio of {audio.shape[-1]} frames gives {local.shape[1]} latent frames, the video has {frames}: "
                f"pass {4 * frames} audio frames"
            )
        local, overall = local.to(x.dtype), overall.to(x.dtype)

        for layer in range(len(self.blocks)):
            arguments = (layer, x, modulation, text, rotary, video.shape[1], mask, local, overall)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(self._run_layer, *arguments)
            else:
                x = self._run_layer(*arguments)
        patches = self.head(x[:, : video.shape[1]], time)
        return self._unpatchify(patches, frames, height, width)

    def _run_layer(
        self,
        layer: int,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        rotary: RotaryTable,
        num_video_tokens: int,
        mask: Tensor | None,
        local: Tensor,
        overall: Tensor,
    ) -> Tensor:
        """A block and the audio injection behind it: one unit, so that checkpointing keeps one tensor for both."""
        x = self.blocks[layer](x, modulation, text, rotary, num_video_tokens, mask)
        index = self.injector_of_layer.get(layer)
        if index is None:
            return x
        video, rest = x.tensor_split((num_video_tokens,), dim=1)
        return torch.cat((video + self.audio_injector(index, video, local, overall), rest), dim=1)

    def behind_block(self, layer: int) -> tuple[nn.Module, ...]:
        """The audio injection of a layer, where it has one."""
        index = self.injector_of_layer.get(layer)
        if index is None:
            return ()
        return self.audio_injector.injector[index], self.audio_injector.injector_adain_layers[index]

    def _sequence(
        self, video: Tensor, reference: Tensor, motion: Tensor, drops: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, L, D] with their segment embedding, and the key mask [B, 1, 1, L] of a mixed batch."""
        kinds = self.trainable_cond_mask(torch.arange(3, device=video.device)).to(video.dtype)
        segments = (video, reference, motion.to(video.dtype))
        x = torch.cat([segment + kind for segment, kind in zip(segments, kinds.unbind(0), strict=True)], dim=1)
        if all(drops) or not any(drops):
            return x, None
        kept = torch.ones(len(drops), 1, 1, x.shape[1], dtype=torch.bool)
        kept[torch.tensor(drops), :, :, x.shape[1] - motion.shape[1] :] = False
        return x, upload(kept, x.device)

    def _time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Time embedding [B, D] and modulation [B, 2, 6, D]: the sample's time, then timestep 0."""
        times = torch.cat((timestep.double(), timestep.new_zeros(1, dtype=torch.float64)))
        embedding = self.time_embedding(timestep_sinusoid(times, self.config["freq_dim"]).to(dtype))
        modulation = self.time_projection(embedding).unflatten(-1, (6, -1))  # [B + 1, 6, D]
        own, zero = modulation[:-1], modulation[-1:]
        return embedding[:-1], torch.stack((own, zero.expand_as(own)), dim=1)

    def _unpatchify(self, patches: Tensor, frames: int, height: int, width: int) -> Tensor:
        """[B, S, 2 * 2 * C], channel last in a patch -> [B, C, F, H, W]."""
        grid = patches.unflatten(1, (frames, height // 2, width // 2)).unflatten(-1, (2, 2, -1))
        return grid.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _check_shapes(self, hidden_states: Tensor, text: Tensor, drops: Sequence[bool]) -> None:
        batch, *_, height, width = hidden_states.shape
        if min(height, width) < 8 or height % 2 or width % 2:
            raise ValueError(f"latents of {height}x{width}: both sides must be even and at least 8 (64 pixels)")
        if text.shape[1] != self.config["text_len"]:
            raise ValueError(f"text of {text.shape[1]} rows: pad it with zeros to text_len = {self.config['text_len']}")
        if len(drops) != batch:
            raise ValueError(f"drop_motion has {len(drops)} values for a batch of {batch}")


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Refuse a configuration in which a key of SUPPORTED has another value.

    Raises:
        ConfigError: for the first such key.
    """
    for key, only in SUPPORTED.items():
        value = config[key]
        if (tuple(value) if isinstance(only, tuple) else value) != only:
            raise ConfigError(
                f"Wan-S2V: {key} = {value!r} is not supported, only {only!r}: no released weights have another value.",
                hint="Check config.json in the model directory against the released one.",
            )


def empty_transformer(config: Mapping[str, Any], *, where: str = "the configuration") -> WanS2VTransformer3DModel:
    """The transformer of a released ``config.json``, its parameters on meta.

    Raises:
        CheckpointError: a key is unknown, or no model can be made of it.
    """
    known = WanS2VTransformer3DModel._get_init_keys(WanS2VTransformer3DModel)
    settings = model_settings(config, known, model="Wan2.2-S2V")
    return empty_model(lambda: WanS2VTransformer3DModel(**settings), where=where)


def load_transformer(model_dir: Path, given: Path | None = None) -> WanS2VTransformer3DModel:
    """The transformer of a released model directory, float32 on the CPU; every tensor must fit. With other weights if
    they are given.

    Raises:
        CheckpointError: files are missing, damaged or do not fit, or a key is unknown.
    """
    model = empty_transformer(read_json(model_dir / SPEC.model.config_file), where=str(model_dir))
    load_weights(model, safetensors_files(model_dir), where=str(model_dir), transformer=True, given=given)
    return model
