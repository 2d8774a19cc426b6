"""A tiny Wan2.2-S2V model in the released directory layout."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from vfun_cli.demo import wan_parts
from vfun_cli.families.wan_s2v.sizes import NUM_AUDIO_LAYERS
from vfun_cli.families.wan_s2v.transformer import WanS2VTransformer3DModel
from vfun_cli.modeling.encoders import wav2vec2

AUDIO_DIM = 32
NUM_SHARDS = 2

CONFIG: dict[str, object] = {
    "_class_name": "WanModel_S2V",
    "_diffusers_version": "0.33.1",
    "adain_mode": "attn_norm",
    "add_last_motion": True,
    "audio_dim": AUDIO_DIM,
    "audio_inject_layers": [0, 2, 3],
    "cond_dim": 16,
    "dim": 64,
    "enable_adain": True,
    "enable_framepack": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "eps": 1e-06,
    "ffn_dim": 128,
    "framepack_drop_mode": "padd",
    "freq_dim": 32,
    "in_dim": 16,
    "model_type": "s2v",
    "motion_token_num": 1024,
    "num_audio_token": 4,
    "num_heads": 2,
    "num_layers": 4,
    "out_dim": 16,
    "text_dim": wan_parts.TEXT_DIM,
    "text_len": 128,
    "trainable_token_pos_emb": False,
    "zero_init": True,
    "zero_timestep": True,
}
"""The keys of the released file, and ``text_dim``, which it leaves at 4096."""

LETTERS = "abcdefghijklmnopqrstuvwxyz'-"


def build_model(folder: Path, seed: int = 0) -> None:
    """Write the model into ``folder``: transformer, VAE, text encoder, tokenizer, audio encoder.

    The same seed gives the same bytes. Random weights, of a scale at which training visibly learns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_transformer(folder)
        wan_parts.write_encoders(folder)
        write_audio_encoder(folder / wav2vec2.FOLDER)


def write_transformer(folder: Path) -> None:
    """``config.json`` and bfloat16 shards with their index, names as released."""
    arguments = {key: value for key, value in CONFIG.items() if not key.startswith("_")}
    model = WanS2VTransformer3DModel(**arguments)
    with torch.no_grad():
        # torch's own start for an embedding (1) and a zero padding token are far from the scale of trained ones.
        model.trainable_cond_mask.weight.normal_(std=0.1)
        model.casual_audio_encoder.encoder.padding_tokens.normal_(std=0.1)
        model.casual_audio_encoder.weights.normal_(mean=0.5, std=0.1)
    write_shards(folder, {name: value.bfloat16() for name, value in model.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Safetensors shards of about equal size and the index that says which tensor is where."""
    total = sum(tensor.nbytes for tensor in state.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in state.items():
        shards[written * NUM_SHARDS // total][name] = tensor.contiguous()
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_audio_encoder(folder: Path) -> None:
    """A narrow wav2vec2 with the released number of layers and strides, and its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=len(pieces),
            hidden_size=AUDIO_DIM,
            intermediate_size=2 * AUDIO_DIM,
            num_hidden_layers=NUM_AUDIO_LAYERS - 1,
            num_attention_heads=4,
            conv_dim=(16,) * 7,
            conv_bias=True,
            feat_extract_norm="layer",
            feat_proj_dropout=0.0,
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    features = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )
    Wav2Vec2Processor(features, Wav2Vec2CTCTokenizer(str(vocabulary))).save_pretrained(folder)
