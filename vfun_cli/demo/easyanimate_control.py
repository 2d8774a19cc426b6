"""Tiny EasyAnimate Control directories in the released layout: random weights, released names, working tokenizers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMagvit
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from vfun_cli.demo.mosaic import show_blocks
from vfun_cli.demo.t5_parts import write_t5
from vfun_cli.families.easyanimate_control.names import released_name
from vfun_cli.families.easyanimate_control.transformer import build_transformer
from vfun_cli.modeling.encoders.magvit_vae import SUPPORTED, MagvitVAE, vae_arguments

LATENT_CHANNELS = 16
QWEN_DIM, BERT_DIM, T5_DIM = 32, 16, 24

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_BERT_WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *_LETTERS,
    *(f"##{x}" for x in _LETTERS),
    ".",
    ",",
    "-",
    "'",
)
_CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_v5_1(folder: Path) -> None:
    """Write a tiny EasyAnimateV5.1-12b-zh-Control into ``folder``."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        _write_transformer(
            folder / "transformer",
            in_channels=3 * LATENT_CHANNELS,
            text_embed_dim=QWEN_DIM,
            text_embed_dim_t5=None,
            add_norm_text_encoder=True,
            enable_text_attention_mask=True,
            add_ref_latent_in_control_model=True,
        )
        _write_vae(folder / "vae")
        tokens = _write_qwen_tokenizer(folder / "tokenizer")
        _write_qwen(folder / "text_encoder", tokens)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    )
    _write_index(
        folder,
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        text_encoder=("transformers", "Qwen2VLForConditionalGeneration"),
        tokenizer=("transformers", "Qwen2Tokenizer"),
    )


def build_v5(folder: Path) -> None:
    """Write a tiny EasyAnimateV5-12b-zh-Control into ``folder``."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        _write_transformer(
            folder / "transformer",
            in_channels=2 * LATENT_CHANNELS,
            text_embed_dim=BERT_DIM,
            text_embed_dim_t5=T5_DIM,
            add_norm_text_encoder=False,
            enable_text_attention_mask=False,
        )
        _write_vae(folder / "vae")
        _write_bert_tokenizer(folder / "tokenizer")
        bert = BertConfig(
            vocab_size=len(_BERT_WORDS),
            hidden_size=BERT_DIM,
            intermediate_size=2 * BERT_DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        BertModel(bert).save_pretrained(folder / "text_encoder")
        write_t5(folder / "text_encoder_2", folder / "tokenizer_2", dim=T5_DIM)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    )
    _write_index(
        folder,
        scheduler=("diffusers", "DDPMScheduler"),
        text_encoder=("transformers", "BertModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "BertTokenizer"),
        tokenizer_2=("transformers", "T5Tokenizer"),
    )


def _write_transformer(folder: Path, **own: Any) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "out_channels": LATENT_CHANNELS,
        "patch_size": 2,
        "sample_width": 90,
        "sample_height": 60,
        "num_layers": 2,
        "mmdit_layers": 10_000,
        "time_embed_dim": 16,
        "norm_eps": 1e-5,
        "time_position_encoding_type": "3d_rope",
        "after_norm": False,
        "resize_inpaint_mask_directly": True,
        "enable_clip_in_inpaint": False,
        **own,
    }
    _write_json(folder / "config.json", {"_class_name": "EasyAnimateTransformer3DModel", **config})
    _write_weights(folder, build_transformer(config))


def _write_vae(folder: Path) -> None:
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.7125,
        "spatial_group_norm": True,
        "mid_block_type": "MidBlock3D",
        "mini_batch_decoder": 1,
        **SUPPORTED,
    }
    _write_json(folder / "config.json", {"_class_name": "AutoencoderKLMagvit", **config})
    vae = AutoencoderKLMagvit(**vae_arguments(config, "the tiny VAE"))
    show_blocks(MagvitVAE(vae))
    _write_weights(folder, vae)


def _write_weights(folder: Path, model: nn.Module) -> None:
    """``released_name`` changes nothing in a model without EasyAnimate's transformer blocks."""
    state = {released_name(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_qwen(folder: Path, tokens: Mapping[str, int]) -> None:
    """Text settings at the top of the configuration and the visual tower beside the language model, as released."""
    text = {
        "vocab_size": len(tokens),
        "hidden_size": QWEN_DIM,
        "intermediate_size": 2 * QWEN_DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": QWEN_DIM, "patch_size": 14}
    config = {"vision_config": vision, "vision_start_token_id": 0, "vision_end_token_id": 0, **text}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
    released = {"model.language_model.": "model.", "model.visual.": "visual."}
    state = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in released if name.startswith(prefix)), "")
        state[released.get(prefix, "") + name.removeprefix(prefix)] = value.contiguous()
    _write_json(
        folder / "config.json",
        {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **config},
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_qwen_tokenizer(folder: Path) -> dict[str, int]:
    """Qwen2's byte-level tokenizer without merges; returns every token's id."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {
        name: len(vocabulary) + index for index, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    }
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": {str(index): {"content": name, **flags} for name, index in special.items()},
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "model_max_length": 32768,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    return {**vocabulary, **special}


def _write_bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(_BERT_WORDS) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512},
    )


def _write_index(folder: Path, **parts: Sequence[str]) -> None:
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "EasyAnimateControlPipeline",
            **{name: list(classes) for name, classes in parts.items()},
            "transformer": ["diffusers", "EasyAnimateTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLMagvit"],
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
