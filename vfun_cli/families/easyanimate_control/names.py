"""Parameter names: diffusers renamed the text half of an MMDiT block, and nothing else."""

import re
from collections.abc import Mapping

RENAMED = {
    "attn2.to_q": "attn1.add_q_proj",
    "attn2.to_k": "attn1.add_k_proj",
    "attn2.to_v": "attn1.add_v_proj",
    "attn2.norm_q": "attn1.norm_added_q",
    "attn2.norm_k": "attn1.norm_added_k",
    "attn2.to_out.0": "attn1.to_add_out",
}
"""Released name of a block's text layer to its name in diffusers."""

_RELEASED = {new: old for old, new in RENAMED.items()}


def diffusers_name(released: str) -> str:
    """The name in diffusers of a released parameter name; names that are diffusers' already stay."""
    return _rename(released, RENAMED)


def released_name(parameter: str) -> str:
    """The released name of one of the model's parameters."""
    return _rename(parameter, _RELEASED)


def _rename(name: str, table: Mapping[str, str]) -> str:
    """What follows the layer (``.weight``, ``.lora_A.weight``) stays."""
    layers = "|".join(re.escape(layer) for layer in table)
    return re.sub(rf"^(transformer_blocks\.\d+\.)({layers})(?=\.)", lambda found: found[1] + table[found[2]], name)
