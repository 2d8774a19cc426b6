"""A tiny CogVideoX-Fun-2b-InP in the released directory layout: random weights, released names, working tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import save_file
from torch import nn

from vfun_cli.demo.mosaic import show_blocks
from vfun_cli.demo.t5_parts import write_t5
from vfun_cli.families.cogvideox_fun.transformer import build_transformer
from vfun_cli.modeling.encoders.cogvideox_vae import CogVideoXVAE

LATENT_CHANNELS = 16
TEXT_DIM = 32

TRANSFORMER: Mapping[str, object] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "add_noise_in_inpaint_model": False,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 2 * LATENT_CHANNELS + 1,
    "out_channels": LATENT_CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "spatial_interpolation_scale": 1.875,
    "use_rotary_positional_embeddings": False,
}
ROTARY: Mapping[str, object] = {"use_rotary_positional_embeddings": True, "add_noise_in_inpaint_model": True}
"""What the V1.1 5b model has instead."""
PAIRED: Mapping[str, object] = {**ROTARY, "patch_size_t": 2, "patch_bias": False}
"""What the V1.5 5b model has instead."""

VAE: Mapping[str, object] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": [8, 8, 16, 16],
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.15258426,
    "temporal_compression_ratio": 4,
}
SCHEDULER: Mapping[str, object] = {
    "_class_name": "CogVideoXDDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
INDEX: Mapping[str, object] = {
    "_class_name": "CogVideoXFunInpaintPipeline",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def build_model(folder: Path, seed: int = 0, **changes: object) -> None:
    """Write transformer, VAE, text encoder, tokenizer and scheduler into ``folder``. The same seed, the same bytes.

    changes: keys of the transformer's configuration that are to differ.
    """
    config = {**TRANSFORMER, **changes}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        _write_model(folder / "transformer", config, build_transformer(config))
        vae = AutoencoderKLCogVideoX.from_config(dict(VAE))
        show_blocks(CogVideoXVAE(vae))
        _write_model(folder / "vae", VAE, vae)
        write_t5(folder / "text_encoder", folder / "tokenizer", dim=TEXT_DIM)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)


def _write_model(folder: Path, config: Mapping[str, object], model: nn.Module) -> None:
    _write_json(folder / "config.json", config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
