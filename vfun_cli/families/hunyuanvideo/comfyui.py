"""Where ComfyUI looks for the layers of HunyuanVideo: the first release's names, which join several of ours."""

from vfun_cli.checkpoints.naming import LayerLocation
from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import ModelDims

_JOINT_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}

_BLOCKS: dict[str, tuple[str, dict[str, str | tuple[str, int]]]] = {
    "transformer_blocks": (
        "double_blocks",
        {
            **{f"attn.{name}": ("img_attn_qkv", part) for name, part in _JOINT_QKV.items()},
            **{f"attn.add_{name[3:]}_proj": ("txt_attn_qkv", part) for name, part in _JOINT_QKV.items()},
            "attn.to_out.0": "img_attn_proj",
            "attn.to_add_out": "txt_attn_proj",
            "ff.net.0.proj": "img_mlp.fc1",
            "ff.net.2": "img_mlp.fc2",
            "ff_context.net.0.proj": "txt_mlp.fc1",
            "ff_context.net.2": "txt_mlp.fc2",
            "norm1.linear": "img_mod.linear",
            "norm1_context.linear": "txt_mod.linear",
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            **{f"attn.{name}": ("linear1", part) for name, part in _JOINT_QKV.items()},
            "proj_mlp": ("linear1", 3),
            "proj_out": "linear2",
            "norm.linear": "modulation.linear",
        },
    ),
    "context_embedder.token_refiner.refiner_blocks": (
        "txt_in.individual_token_refiner.blocks",
        {
            **{f"attn.{name}": ("self_attn_qkv", part) for name, part in _JOINT_QKV.items()},
            "attn.to_out.0": "self_attn_proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
            "norm_out.linear": "adaLN_modulation.1",
        },
    ),
}
"""Names of blocks here and there, and of the layers in them; with which part of a joint layer one of ours is."""


def comfyui_location(layer: str, dims: ModelDims) -> LayerLocation:
    """The layer, or the rows of a joint one, that ComfyUI adds this layer's update to.

    Raises:
        ConfigError: a layer outside the blocks, for which ComfyUI's LoRA loader has no name.
    """
    for ours, (theirs, layers) in _BLOCKS.items():
        number, _, inside = layer.removeprefix(f"{ours}.").partition(".")
        if layer.startswith(f"{ours}.") and inside in layers:
            found = layers[inside]
            if isinstance(found, str):
                return LayerLocation(name=f"{theirs}.{number}.{found}")
            name, part = found
            rows = 3 * dims.dim + (dims.ffn_dim if name == "linear1" else 0)
            return LayerLocation(name=f"{theirs}.{number}.{name}", first_row=part * dims.dim, rows=rows)
    raise ConfigError(
        f"--format comfyui: ComfyUI loads no LoRA for {layer} of HunyuanVideo.",
        hint="Use --format diffusers, or --merge.",
    )
