"""LoRA files as other programs write them, with what their own loaders make of one. Read in the programs in 2026."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, full

Files = dict[str, Tensor]
RANK, ALPHA = 2, 6


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A trainer's file of one pair of matrices a layer."""

    family: str
    key: Callable[[str, str], str]
    """Of a layer's released name and ``A`` or ``B``."""
    strength: float
    """What B·A is multiplied by in the trainer's own loader."""
    alphas: bool = False
    diffusers_names: bool = False
    header: Mapping[str, str] = field(default_factory=dict)

    def of(self, pairs: Mapping[str, Tensor], released: Callable[[str], str]) -> Files:
        """The file of ``<layer>.lora_A.weight`` and ``.lora_B.weight``."""
        tensors: Files = {}
        for name, value in pairs.items():
            layer, side = name.removesuffix(".weight").split(".lora_")
            shown = layer if self.diffusers_names else released(f"{layer}.weight").removesuffix(".weight")
            tensors[self.key(shown, side)] = value
            if self.alphas:
                tensors[f"{self.key(shown, side).partition('.lora_')[0]}.alpha"] = full((), float(ALPHA))
        return tensors


def dotted(prefix: str, middle: str = "") -> Callable[[str, str], str]:
    return lambda layer, side: f"{prefix}{layer}.lora_{side}.{middle}weight"


def kohya(prefix: str) -> Callable[[str, str], str]:
    words = {"A": "down", "B": "up"}
    return lambda layer, side: f"{prefix}{layer.replace('.', '_')}.lora_{words[side]}.weight"


STATED = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, "target_modules": ["to_q", "to_v"]}
FINETRAINERS = {"format": "pt", "lora_config": json.dumps(STATED, indent=4)}
DIFFUSERS = {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in STATED.items()})}

FOREIGN = {
    # diffsynth/diffusion/training_module.py: lora_alpha = lora_rank; utils/lora/general.py: B·A, without a factor
    "DiffSynth-Studio": Foreign(family="wan-fun-control", key=dotted("", "default."), strength=1.0),
    "DiffSynth-Studio s2v": Foreign(family="wan-s2v", key=dotted("", "default."), strength=1.0),
    # finetrainers/patches/dependencies/diffusers/peft.py: LoraConfig(**lora_config) of the header
    "finetrainers": Foreign(
        family="wan-fun-control", key=dotted("transformer."), strength=ALPHA / RANK, header=FINETRAINERS,
        diffusers_names=True,
    ),
    "finetrainers CogVideoX": Foreign(
        family="cogvideox-fun", key=dotted("transformer."), strength=ALPHA / RANK, header=FINETRAINERS,
        diffusers_names=True,
    ),
    "finetrainers HunyuanVideo": Foreign(
        family="hunyuanvideo-t2v", key=dotted("transformer."), strength=ALPHA / RANK, header=FINETRAINERS,
        diffusers_names=True,
    ),
    # diffusers/loaders/peft.py: the header's configuration; without one lora_alpha is the rank
    "diffusers": Foreign(
        family="hunyuanvideo-t2v", key=dotted("transformer."), strength=ALPHA / RANK, header=DIFFUSERS,
        diffusers_names=True,
    ),
    "diffusers without a header": Foreign(
        family="cogvideox-fun", key=dotted("transformer."), strength=1.0, diffusers_names=True
    ),
    # train.py: alpha = rank; models/wan/wan.py; ComfyUI's comfy/lora.py: without alpha 1
    "diffusion-pipe": Foreign(family="wan-fun-control", key=dotted("diffusion_model."), strength=1.0),
    # toolkit/lora_special.py: "no alpha for peft", alpha = rank
    "ai-toolkit": Foreign(family="wan-s2v", key=dotted("diffusion_model."), strength=1.0),
    # networks/lora.py: scale = alpha / rank; alpha None or 0 is the rank
    "musubi-tuner": Foreign(family="wan-fun-control", key=kohya("lora_unet_"), strength=ALPHA / RANK, alphas=True),
    "musubi-tuner without alphas": Foreign(family="wan-fun-control", key=kohya("lora_unet_"), strength=1.0),
    # videox_fun/utils/lora_utils.py, merge_lora: alpha / rank
    "VideoX-Fun": Foreign(family="wan-s2v", key=kohya("lora_unet__"), strength=ALPHA / RANK, alphas=True),
    "EasyAnimate": Foreign(
        family="easyanimate-v5.1-control", key=kohya("lora_unet__"), strength=ALPHA / RANK, alphas=True
    ),
}  # fmt: skip

JOINT = {
    "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks.0.txt_attn_qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.0.img_mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mod.linear": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
        f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{part}" for part in "qkv"
    ],
}  # fmt: skip
"""Layers of HunyuanVideo's first release, and those of diffusers that they join."""

JOINT_FILES = {
    # hunyuan_model/models.py gives the names, networks/lora.py the rest
    "musubi-tuner": Foreign(family="", key=kohya("lora_unet_"), strength=ALPHA / RANK, alphas=True),
    # models/base.py, save_adapter; ComfyUI calls it "diffusion-pipe lora format"
    "diffusion-pipe": Foreign(family="", key=dotted("transformer."), strength=1.0),
    "ComfyUI": Foreign(family="", key=dotted("diffusion_model."), strength=1.0),
}
