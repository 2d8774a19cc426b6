"""Tiny HunyuanVideo directories in the released layout: random weights, real classes, working tokenizers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vfun_cli.demo.mosaic import show_blocks
from vfun_cli.modeling.encoders import llama_prompt, llava_prompt
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE

LATENT_CHANNELS = 16
TEXT_DIM = 32
POOLED_DIM = 24

_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)
# How Llama 3 cuts text before byte-pair encoding. With it the templates take the released number of tokens, so the
# crop starts of the adapters are right for the tiny tokenizer too.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_t2v(folder: Path, seed: int = 0) -> None:
    """Write a tiny HunyuanVideo (text to video) into ``folder``. The same seed, the same bytes."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tokenizer = _common(folder, None)
        LlamaModel(_llama(tokenizer)).save_pretrained(folder / "text_encoder")
    _write_index(folder, "HunyuanVideoPipeline", text_encoder="LlamaModel")


def build_i2v(folder: Path, seed: int = 0) -> None:
    """Write a tiny HunyuanVideo-I2V (first frame to video) into ``folder``. The same seed, the same bytes."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tokenizer = _common(folder, "token_replace")
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        )
        config = LlavaConfig(
            text_config=_llama(tokenizer),
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
        LlavaForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    _rename_tensors(folder / "text_encoder", r"^vision_tower\.", "vision_tower.vision_model.")
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(
        folder / "image_processor"
    )
    _write_index(folder, "HunyuanVideoImageToVideoPipeline", text_encoder="LlavaForConditionalGeneration")


def _common(folder: Path, image_condition: str | None) -> PreTrainedTokenizerFast:
    """Everything but the first text encoder; returns its tokenizer."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition,
    )
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    show_blocks(HunyuanVAE(vae))
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    vocabulary = _write_clip_tokenizer(folder / "tokenizer_2")
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_DIM,
        intermediate_size=2 * POOLED_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder_2")
    _rename_tensors(folder / "text_encoder_2", "^", "text_model.")
    return _write_llama_tokenizer(folder / "tokenizer")


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _write_llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE like Llama 3, its vocabulary learned from the two prompt templates."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [llama_prompt.TEMPLATE, llava_prompt.TEMPLATE],
        trainers.BpeTrainer(
            vocab_size=4096,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=list(_SPECIAL),
            show_progress=False,
        ),
    )
    begin = _SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=_SPECIAL[1], pad_token="<pad>", padding_side="right"
    )
    fast.save_pretrained(folder)
    _rewrite(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")  # as the released folder says
    return fast


def _write_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-level tokenizer without merges; returns its vocabulary size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {entry: index for index, entry in enumerate(entries)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    )
    return len(entries)


def _rename_tensors(folder: Path, pattern: str, replacement: str) -> None:
    """Give tensors the names of the released file, which an older transformers wrote."""
    file = folder / "model.safetensors"
    state = {re.sub(pattern, replacement, name): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def _write_index(folder: Path, pipeline: str, *, text_encoder: str) -> None:
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", text_encoder],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "LlamaTokenizerFast"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    if (folder / "image_processor").is_dir():
        parts["image_processor"] = ["transformers", "CLIPImageProcessor"]
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **parts})


def _rewrite(path: Path, **changes: str) -> None:
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
