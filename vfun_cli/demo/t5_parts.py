"""A tiny T5 encoder and its tokenizer: what the demo models that read captions through T5 have in common."""

import io
import json
from pathlib import Path

import sentencepiece
from transformers import T5Config, T5EncoderModel

_SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "a red ball rolls from left to right over a blue floor.",
    "a green square turns slowly, and a yellow wave moves on.",
)


def write_t5(model: Path, tokenizer: Path, *, dim: int) -> None:
    """Write both folders; the weights come from torch's global generator."""
    config = T5Config(
        vocab_size=write_tokenizer(tokenizer),
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(model)


def write_tokenizer(folder: Path) -> int:
    """A sentencepiece model with T5's special tokens; returns its vocabulary size."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 8),
        model_writer=written,
        model_type="unigram",
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(written.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return int(sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).get_piece_size())
