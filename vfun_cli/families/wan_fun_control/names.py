"""Parameter names of Wan2.1-Fun Control: released, and those of diffusers that the module here has."""

import re
from collections.abc import Mapping

OUTER_NAMES = {
    "patch_embedding": "patch_embedding",
    "ref_conv": "patch_embedding.ref_conv",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
"""Released module name -> name here, outside the blocks."""

ATTENTION_NAMES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}

BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the affine norm before the cross-attention; the other two have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{released}": f"attn1.{ours}" for released, ours in ATTENTION_NAMES.items()},
    **{f"cross_attn.{released}": f"attn2.{ours}" for released, ours in ATTENTION_NAMES.items()},
}
"""Released module name -> name here, inside ``blocks.N.``."""


def _rename(name: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """Replace the longest leading module path that the table knows; anything after it (``.weight``, LoRA) stays."""
    prefix, rest, table = "", name, outer
    if block := re.match(r"blocks\.\d+\.", name):
        prefix, rest, table = block.group(), name[block.end() :], inner
    parts = rest.split(".")
    for count in range(len(parts), 0, -1):
        if (known := table.get(".".join(parts[:count]))) is not None:
            return prefix + ".".join([known, *parts[count:]])
    return name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {ours: released for released, ours in table.items()}


def live_name(released: str) -> str:
    """The name here of a released parameter; unknown names come back unchanged, for the strict loader to refuse."""
    return _rename(released, OUTER_NAMES, BLOCK_NAMES)


def released_name(live: str) -> str:
    """The released name of a parameter here: the inverse of ``live_name``."""
    return _rename(live, _inverse(OUTER_NAMES), _inverse(BLOCK_NAMES))
