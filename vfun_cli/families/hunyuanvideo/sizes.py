"""Tokens and FLOPs of the HunyuanVideo transformer, and the dimensions they depend on."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import LAYERS, SIZE, ClipShape, ModelDims
from vfun_cli.typed_json import Check, check_fields, flag, number, optional

VAE_STRIDE = (4, 8, 8)
PATCH_SIZE = (1, 2, 2)
SHIFT = 7.0
"""Timestep shift of the released scheduler."""

PROMPT_TOKENS = 256
"""Caption tokens that the Llama encoder gives the transformer in text-to-video."""
IMAGE_TOKENS = 576
"""Tokens of one 336-pixel image in LLaVA: (336 / 14) squared."""
IMAGE_INTERLEAVE = 4
"""Every fourth image token goes to the transformer, as in the original training (inference of diffusers: 2)."""
ASSISTANT_TOKENS = 4
"""``<eot>``, start-header, ``assistant``, end-header: cut out of the prompt in image-to-video."""

Condition = Literal["t2v", "i2v"]

TEXT_TOKENS: Mapping[Condition, int] = {
    "t2v": PROMPT_TOKENS,
    "i2v": IMAGE_TOKENS // IMAGE_INTERLEAVE + PROMPT_TOKENS - ASSISTANT_TOKENS,
}
"""Rows of ``encoder_hidden_states``: 256, and 144 + 252 = 396."""

_FAMILY_OF = {None: "hunyuanvideo-t2v", "token_replace": "hunyuanvideo-i2v"}
_IMAGE_CONDITION: Mapping[Condition, str | None] = {"t2v": None, "i2v": "token_replace"}


def dims_reader(condition: Condition) -> Callable[[Mapping[str, object]], ModelDims]:
    """The ``read_dims`` of one of the two families."""

    def read_dims(config: Mapping[str, object]) -> ModelDims:
        """Dimensions from ``transformer/config.json``.

        Raises:
            ConfigError: another model class, the other HunyuanVideo family, or the 33-channel I2V.
            CheckpointError: no model has these.
        """
        check_config(config, condition)
        check_fields(config, CONFIG, "the transformer's configuration")
        return _dims(config, condition)

    return read_dims


def fits(config: Mapping[str, object], condition: Condition) -> bool:
    """Whether ``transformer/config.json`` is of the model that ``condition`` trains."""
    return (
        config.get("_class_name") == "HunyuanVideoTransformer3DModel"
        and config.get("image_condition_type") == _IMAGE_CONDITION[condition]
    )


def check_config(config: Mapping[str, object], condition: Condition) -> None:
    """Refuse a ``transformer/config.json`` that is not of the model that ``condition`` trains.

    Raises:
        ConfigError: with what the directory holds and which family it is for.
    """
    kind = config.get("_class_name", "HunyuanVideoTransformer3DModel")
    if kind != "HunyuanVideoTransformer3DModel":
        raise ConfigError(
            f"the model directory holds a {kind}, hunyuanvideo-{condition} trains a HunyuanVideoTransformer3DModel.",
            hint="docs/families.md has the models of each family.",
        )
    found = config.get("image_condition_type")
    if found == _IMAGE_CONDITION[condition]:
        return
    if found == "latent_concat":
        raise ConfigError(
            "the 33-channel HunyuanVideo-I2V (image_condition_type latent_concat) cannot be trained here.",
            hint="Use the 16-channel HunyuanVideo-I2V (image_condition_type token_replace).",
        )
    fitting = _FAMILY_OF.get(found if found is None else str(found))
    raise ConfigError(
        f"the model directory has image_condition_type {found!r}, "
        f"hunyuanvideo-{condition} needs {_IMAGE_CONDITION[condition]!r}.",
        hint=f"Train it as {fitting}." if fitting else "Download the released model again.",
    )


def _dims(config: Mapping[str, Any], condition: Condition) -> ModelDims:
    given = {**_RELEASED, **{name: config[name] for name in CONFIG if config.get(name) is not None}}
    dim = int(given["num_attention_heads"]) * int(given["attention_head_dim"])
    return ModelDims(
        dim=dim,
        ffn_dim=int(dim * float(given["mlp_ratio"])),
        num_layers=int(given["num_layers"]),
        extra={
            "num_single_layers": int(given["num_single_layers"]),
            "num_refiner_layers": int(given["num_refiner_layers"]),
            "in_channels": int(given["in_channels"]),
            "out_channels": int(given["out_channels"]),
            "text_embed_dim": int(given["text_embed_dim"]),
            "pooled_projection_dim": int(given["pooled_projection_dim"]),
            "guidance_embeds": int(bool(given["guidance_embeds"])),
            "token_replace": int(condition == "i2v"),
            "text_tokens": TEXT_TOKENS[condition],
        },
    )


# The released configuration; diffusers' own defaults are the same.
_RELEASED: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}

CONFIG: Mapping[str, Check] = {
    **dict.fromkeys(_RELEASED, optional(SIZE)),
    **dict.fromkeys(("num_layers", "num_single_layers", "num_refiner_layers"), optional(LAYERS)),
    "mlp_ratio": optional(number(0.001, 1000)),
    "guidance_embeds": optional(flag),
}


def released(condition: Condition) -> Mapping[str, object]:
    """The configuration of the released 13B models."""
    return {**_RELEASED, "image_condition_type": _IMAGE_CONDITION[condition]}


def video_tokens(shape: ClipShape) -> int:
    """Tokens of the clip: latent frames x height / 16 x width / 16."""
    frames = (shape.frames - 1) // VAE_STRIDE[0] + 1
    return frames * (shape.height // 16) * (shape.width // 16)


def sequence_tokens(shape: ClipShape, dims: ModelDims) -> int:
    """Length of the joint sequence: video tokens, then the padded text (and image) tokens."""
    return video_tokens(shape) + dims.extra["text_tokens"]


def forward_flops(shape: ClipShape, dims: ModelDims) -> float:
    """FLOPs of one forward pass on one clip; a multiply-add counts two, attention runs over the padded sequence."""
    d, f, x = dims.dim, dims.ffn_dim, dims.extra
    video, text = video_tokens(shape), x["text_tokens"]
    joint = video + text
    patch = PATCH_SIZE[1] * PATCH_SIZE[2]
    # A token_replace block modulates the given frame on its own, so its adaptive norm runs twice.
    norms = 1 + x["token_replace"]
    dual = joint * (4 * d * d + 2 * d * f) + (norms + 1) * 6 * d * d
    single = joint * (3 * d * d + d * f + (d + f) * d) + norms * 3 * d * d
    # The refiner's feed-forward is always four times its width, whatever mlp_ratio is.
    refiner = text * 12 * d * d + 2 * d * d
    timestep = 256 * d + d * d
    embeddings = (
        video * d * x["in_channels"] * patch
        + text * x["text_embed_dim"] * d
        + timestep * (2 + x["guidance_embeds"] + x["token_replace"])
        + (x["pooled_projection_dim"] + d) * d
        + (x["text_embed_dim"] + d) * d
    )
    head = 2 * d * d + video * d * x["out_channels"] * patch
    macs = (
        embeddings + x["num_refiner_layers"] * refiner + dims.num_layers * dual + x["num_single_layers"] * single + head
    )
    return attention_flops(shape, dims) + 2.0 * macs


def attention_flops(shape: ClipShape, dims: ModelDims) -> float:
    """Scores and weighted sums over the joint sequence, and over the text in its refiner."""
    text, extra = dims.extra["text_tokens"], dims.extra
    blocks = (dims.num_layers + extra["num_single_layers"]) * sequence_tokens(shape, dims) ** 2
    return 4.0 * dims.dim * (blocks + extra["num_refiner_layers"] * text**2)
