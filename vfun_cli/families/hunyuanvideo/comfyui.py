"""Where the first release of HunyuanVideo, and ComfyUI, keep its layers: several of ours are one there."""

from dataclasses import replace
from functools import reduce

from vfun_cli.checkpoints.naming import LayerLocation
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
            "attn.norm_q": "img_attn_q_norm",
            "attn.norm_k": "img_attn_k_norm",
            "attn.norm_added_q": "txt_attn_q_norm",
            "attn.norm_added_k": "txt_attn_k_norm",
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            **{f"attn.{name}": ("linear1", part) for name, part in _JOINT_QKV.items()},
            "proj_mlp": ("linear1", 3),
            "proj_out": "linear2",
            "norm.linear": "modulation.linear",
            "attn.norm_q": "q_norm",
            "attn.norm_k": "k_norm",
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
            "norm1": "norm1",
            "norm2": "norm2",
        },
    ),
}
"""Names of blocks here and there, and of the layers in them; with which part of a joint layer one of ours is."""


_OUTSIDE = {
    "x_embedder.proj": "img_in.proj",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""Layers outside the blocks."""

_HALVES_SWAPPED = "norm_out.linear"
"""diffusers has the scale before the shift, the first release the shift before the scale."""

_IN_COMFYUI = (
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_embedder.mlp.0", "_embedder.in_layer"),
    ("_embedder.mlp.2", "_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
)
"""ComfyUI's modules outside the blocks. Inside them its LoRA loader takes the first release's names."""


def original_location(layer: str, dims: ModelDims) -> LayerLocation | None:
    """The layer of the first release that is this one, or the rows of one; None if there is none."""
    for ours, (theirs, layers) in _BLOCKS.items():
        number, _, inside = layer.removeprefix(f"{ours}.").partition(".")
        if layer.startswith(f"{ours}.") and inside in layers:
            found = layers[inside]
            if isinstance(found, str):
                return LayerLocation(name=f"{theirs}.{number}.{found}")
            name, part = found
            rows = 3 * dims.dim + (dims.ffn_dim if name == "linear1" else 0)
            return LayerLocation(name=f"{theirs}.{number}.{name}", first_row=part * dims.dim, rows=rows)
    if layer == _HALVES_SWAPPED:
        return LayerLocation(name=_OUTSIDE[layer], first_row=dims.dim, rows=2 * dims.dim)
    return LayerLocation(name=_OUTSIDE[layer]) if layer in _OUTSIDE else None


def comfyui_location(layer: str, dims: ModelDims) -> LayerLocation | None:
    """The layer, or the rows of a joint one, that ComfyUI adds this layer's update to; None if there is none."""
    found = original_location(layer, dims)
    if found is None or layer not in _OUTSIDE:
        return found
    return replace(found, name=reduce(lambda name, change: name.replace(*change), _IN_COMFYUI, found.name))
