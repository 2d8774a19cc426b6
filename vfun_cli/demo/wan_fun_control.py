"""A tiny Wan2.1-Fun Control model, V1.1 or V1.0, in the released directory layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vfun_cli.demo import wan_parts
from vfun_cli.families.wan_fun_control import CONTROL_IN_DIM, LATENT_CHANNELS
from vfun_cli.families.wan_fun_control.names import released_name
from vfun_cli.families.wan_fun_control.transformer import WanFunControlTransformer

CONFIG: dict[str, object] = {
    "_class_name": "WanModel",
    "model_type": "i2v",
    "add_ref_conv": True,
    "in_dim_ref_conv": LATENT_CHANNELS,
    "in_dim": CONTROL_IN_DIM,
    "out_dim": LATENT_CHANNELS,
    "dim": 64,
    "ffn_dim": 128,
    "num_heads": 4,
    "num_layers": 2,
    "freq_dim": 32,
    "text_dim": wan_parts.TEXT_DIM,
    "text_len": 512,
    "image_dim": wan_parts.CLIP_DIM,  # the released config.json leaves it out: 1280
    "eps": 1e-6,
}


def build_model(folder: Path, seed: int = 0, *, reference: bool = True) -> None:
    """Write transformer, VAE, text encoder, tokenizer and CLIP into ``folder``. The same seed gives the same bytes.

    Without ``reference`` it is a V1.0: no ``ref_conv``, and a configuration that does not know the word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanFunControlTransformer(
            has_reference=reference,
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=CONTROL_IN_DIM,
            out_channels=LATENT_CHANNELS,
            text_dim=wan_parts.TEXT_DIM,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
            image_dim=wan_parts.CLIP_DIM,
            added_kv_proj_dim=64,
        )
        wan_parts.write_encoders(folder)
        wan_parts.write_clip(folder)
    state = {released_name(name): tensor.bfloat16().contiguous() for name, tensor in transformer.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in CONFIG.items() if reference or "ref_conv" not in name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
