"""Tiny encoders in the files of a released Wan directory: what the demo models of the Wan families have in common.

Every function draws from torch's global generator: seed it first.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vfun_cli.demo.mosaic import show_blocks
from vfun_cli.modeling.encoders import clip_vision, umt5, wan_vae
from vfun_cli.modeling.encoders.wan_vae import WanVAE

TEXT_DIM = 32
"""Width of the tiny text encoder."""
CLIP_DIM = 32
"""Width of the tiny image encoder; a multiple of its 16 heads."""
CLIP_PATCH = 14
CLIP_TOKENS = 257
"""As released: 16 x 16 patches and the class token."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"


def write_encoders(folder: Path) -> None:
    """The VAE, the text encoder and its tokenizer, which every Wan directory has."""
    torch.save(vae_state(), folder / wan_vae.WEIGHTS)
    vocabulary = write_tokenizer(folder / umt5.TOKENIZER)
    torch.save({name: t.bfloat16() for name, t in umt5_state(vocabulary).items()}, folder / umt5.WEIGHTS)


def write_clip(folder: Path, *, tokens: int = CLIP_TOKENS) -> None:
    """The CLIP file of the image-to-video models; of its text tower only what a reader must skip."""
    state = {f"visual.{name}": tensor for name, tensor in clip_visual_state(tokens).items()}
    state |= {"log_scale": torch.zeros(()), "textual.head.0.weight": torch.zeros(4, 4)}
    torch.save(state, folder / clip_vision.WEIGHTS)


def vae_state(base_dim: int = 4) -> dict[str, Tensor]:
    """A small Wan2.1 VAE under its original names: diffusers' random module with its conversion run backwards."""
    vae = AutoencoderKLWan(base_dim=base_dim)
    show_blocks(WanVAE(vae))
    module = vae.state_dict()
    names = {
        new: original
        for original in _vae_names()
        for new in convert_wan_vae_to_diffusers({original: torch.zeros(0)})
        if new in module
    }
    return {names[name]: tensor.clone() for name, tensor in module.items()}


def _vae_names() -> list[str]:
    """Every name a Wan2.1 VAE could have; which of them it has is diffusers' module to say."""
    residual = ("residual.0.gamma", "residual.2", "residual.3.gamma", "residual.6", "shortcut")
    resample = ("resample.1", "time_conv")
    modules = ["conv1", "conv2"]
    for side, stages, count in (("encoder", "downsamples", 11), ("decoder", "upsamples", 15)):
        modules += [f"{side}.{part}" for part in ("conv1", "head.0.gamma", "head.2")]
        modules += [f"{side}.middle.1.{part}" for part in ("norm.gamma", "to_qkv", "proj")]
        blocks = [f"{side}.middle.{index}" for index in (0, 2)]
        blocks += [f"{side}.{stages}.{index}" for index in range(count)]
        modules += [f"{block}.{part}" for block in blocks for part in (*residual, *resample)]
    return [
        name
        for module in modules
        for name in ([module] if module.endswith("gamma") else [f"{module}.weight", f"{module}.bias"])
    ]


def umt5_state(vocabulary: int, *, layers: int = 2, heads: int = 2, inner: int = 64) -> dict[str, Tensor]:
    """A small UMT5 encoder under the original Wan names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocabulary, TEXT_DIM), "norm.weight": (TEXT_DIM,)}
    for block in (f"blocks.{index}" for index in range(layers)):
        shapes |= {f"{block}.norm{i}.weight": (TEXT_DIM,) for i in (1, 2)}
        shapes |= {f"{block}.attn.{part}.weight": (TEXT_DIM, TEXT_DIM) for part in "qkvo"}
        shapes |= {f"{block}.ffn.{part}.weight": (inner, TEXT_DIM) for part in ("gate.0", "fc1")}
        shapes |= {f"{block}.ffn.fc2.weight": (TEXT_DIM, inner)}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, heads)}
    return _random(shapes)


def clip_visual_state(tokens: int, *, layers: int = 2, inner: int = 64) -> dict[str, Tensor]:
    """A small visual tower of the Wan CLIP under its original names, ``visual.`` taken off.

    tokens: a square number of patches, and the class token.
    """
    dim = CLIP_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, 3, CLIP_PATCH, CLIP_PATCH),
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, tokens, dim),
        "head": (dim, dim),
    }
    norms = ["pre_norm", "post_norm"]
    linears: dict[str, tuple[int, int]] = {}
    for block in (f"transformer.{index}" for index in range(layers)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears |= {f"{block}.attn.to_qkv": (3 * dim, dim), f"{block}.attn.proj": (dim, dim)}
        linears |= {f"{block}.mlp.0": (inner, dim), f"{block}.mlp.2": (dim, inner)}
    for name in norms:
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return _random(shapes)


def _random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: normal with variance 1 / inputs, norms one, biases zero."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    inputs = torch.Size(shape[1:]).numel()
    return torch.randn(shape) * inputs**-0.5


def write_tokenizer(folder: Path) -> int:
    """A T5 tokenizer of letters and bytes (so that it reads every script); returns the size of its vocabulary."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(str(folder))
    return len(pieces)
