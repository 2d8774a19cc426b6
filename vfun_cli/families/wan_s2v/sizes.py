"""Tokens and FLOPs of Wan-S2V as arithmetic, equal to the live transformer."""

from collections.abc import Mapping
from typing import cast

from vfun_cli.families.spec import LAYERS, SIZE, ClipShape, ModelDims
from vfun_cli.typed_json import Check, check_fields, items, optional

MOTION_FRAMES = 73
"""Pixel frames of history that the model reads."""

MOTION_LATENTS = (MOTION_FRAMES + 3) // 4
"""Latent frames of that history: 19."""

NUM_AUDIO_LAYERS = 25
"""States of the 24-layer wav2vec2: its embedding and each layer."""

RELEASED = ModelDims(
    dim=5120,
    ffn_dim=13824,
    num_layers=40,
    extra={
        "num_heads": 40,
        "text_len": 512,
        "text_dim": 4096,
        "freq_dim": 256,
        "audio_dim": 1024,
        "num_audio_token": 4,
        "audio_layers": 12,
        "in_dim": 16,
        "out_dim": 16,
    },
)
"""Wan2.2-S2V-14B."""

RELEASED_CONFIG: Mapping[str, object] = {
    "num_layers": RELEASED.num_layers,
    "audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
}
"""All else of its configuration is as the transformer's class has it."""


def with_layers(counts: Mapping[str, int]) -> Mapping[str, object]:
    """Layers of which the last ones inject audio, as the very last one does when released."""
    layers, audio = counts["num_layers"], counts["audio_inject_layers"]
    return {"num_layers": layers, "audio_inject_layers": list(range(layers - audio, layers))}


_READ = ("num_heads", "text_len", "text_dim", "freq_dim", "audio_dim", "num_audio_token", "in_dim", "out_dim")

CONFIG: Mapping[str, Check] = {
    **dict.fromkeys(("dim", "ffn_dim", *_READ), optional(SIZE)),
    "num_layers": optional(LAYERS),
    "audio_inject_layers": optional(items(LAYERS, most=10_000)),
}


def read_dims(config: Mapping[str, object]) -> ModelDims:
    """Dimensions from ``config.json``; a key that the file leaves out has the released value.

    Raises:
        CheckpointError: no model has these.
    """
    check_fields(config, CONFIG, "the transformer's configuration")

    def number(key: str, default: int) -> int:
        return cast(int, default if config.get(key) is None else config[key])

    extra = {key: number(key, RELEASED.extra[key]) for key in _READ}
    layers = cast(list[int] | None, config.get("audio_inject_layers"))
    extra["audio_layers"] = RELEASED.extra["audio_layers"] if layers is None else len(layers)
    return ModelDims(
        dim=number("dim", RELEASED.dim),
        ffn_dim=number("ffn_dim", RELEASED.ffn_dim),
        num_layers=number("num_layers", RELEASED.num_layers),
        extra=extra,
    )


def token_counts(shape: ClipShape) -> tuple[int, int, int]:
    """Video, reference and motion tokens; pixels to latents by (4, 8, 8), latents to tokens by (1, 2, 2).

    Motion has one frame of fine tokens, one of 2x and four of 4x coarser ones, each grid rounded down.
    """
    frames, height, width = shape.frames // 4, shape.height // 8, shape.width // 8
    fine = (height // 2) * (width // 2)
    motion = fine + (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8)
    return frames * fine, fine, motion


def sequence_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """Length of the self-attention sequence with motion kept: 36,000 for 80 frames of 640 x 640."""
    return sum(token_counts(shape))


def forward_flops(shape: ClipShape, dims: ModelDims) -> float:
    """FLOPs of one forward pass with motion kept: every matrix product and convolution, two for a multiply-add."""
    video, reference, motion = token_counts(shape)
    length, frames, dim, extra = video + reference + motion, shape.frames // 4, dims.dim, dims.extra
    text, tokens = extra["text_len"], extra["num_audio_token"]
    square = dim * dim

    self_attention = 4 * length * square
    cross_attention = 2 * (length + text) * square
    feed_forward = 2 * length * dim * dims.ffn_dim
    audio_keys = frames * (tokens + 1)
    injection = 2 * (video + audio_keys + frames) * square

    patch = 4 * extra["in_dim"] * dim
    fine = reference
    # The coarse motion convolutions read 2x4x4 and 4x8x8 latents for a token: 8 and 64 patches of 1x2x2.
    older, oldest = (shape.height // 32) * (shape.width // 32), 4 * (shape.height // 64) * (shape.width // 64)
    embeddings = (2 * video + 2 * fine + 8 * older + 64 * oldest) * patch
    embeddings += text * (extra["text_dim"] + dim) * dim + 2 * (extra["freq_dim"] + dim + 6 * dim) * dim
    head = video * dim * 4 * extra["out_dim"]

    macs = dims.num_layers * (self_attention + cross_attention + feed_forward)
    macs += extra["audio_layers"] * injection + embeddings + head + _audio_encoder_macs(shape.frames, dims)
    return attention_flops(shape, dims) + 2.0 * macs


def attention_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Scores and weighted sums: of all tokens, to the text, and of each latent frame to its audio tokens."""
    video, length = token_counts(shape)[0], sequence_tokens(shape, dims)
    blocks = dims.num_layers * length * (length + dims.extra["text_len"])
    return 4.0 * dims.dim * (blocks + dims.extra["audio_layers"] * video * (dims.extra["num_audio_token"] + 1))


def _audio_encoder_macs(frames: int, dims: ModelDims) -> int:
    """Three causal convolutions of kernel 3, the last two with stride 2, for the local tokens and the global vector."""
    dim, streams = dims.dim, dims.extra["num_audio_token"] + 1
    length = MOTION_FRAMES + frames
    half = (length + 1) // 2
    quarter = (half + 1) // 2
    first = streams * length * 3 * dims.extra["audio_dim"] * (dim // 4)
    second = streams * half * 3 * (dim // 4) * (dim // 2)
    third = streams * quarter * 3 * (dim // 2) * dim
    return first + second + third + quarter * dim * dim
