"""The text encoder of the Wan models: UMT5 in the original Wan naming, and its tokenizer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.captions import UMT5, UMT5_FOLDER, load_tokenizer
from vfun_cli.modeling.encoders.frozen import EncoderSource, Output
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.transfer import upload
from vfun_cli.modeling.weights import empty_model, load_pth, load_weights, require_same

WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = UMT5_FOLDER

_BLOCK_PARTS = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_OTHER_NAMES = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


class UMT5TextEncoder(nn.Module):
    """Texts to hidden states [len, dim], one row per real token.

    Each text runs on its own and unpadded: what the model returns for the real tokens does not depend on masked
    padding, so this is the originals' "pad to 512, mask, trim" for the price of the tokens there are, and a text's
    states do not depend on its neighbours in the micro-batch.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase | None, text_len: int = 512) -> None:
        super().__init__()
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def from_files(cls, model_dir: Path, *, dtype: torch.dtype, text_len: int = 512) -> "UMT5TextEncoder":
        """Weights and tokenizer of a released Wan directory, offline.

        text_len: tokens a prompt is cut to, the transformer's ``text_len``.

        Raises:
            CheckpointError: a file is missing or does not fit.
        """
        path = model_dir / WEIGHTS
        return cls(
            load_umt5(load_pth(path), dtype=dtype, where=str(path)),
            load_tokenizer(UMT5, model_dir / TOKENIZER),
            text_len,
        )

    @property
    def dim(self) -> int:
        """Width of a hidden state."""
        return int(self.model.config.d_model)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids with the end token, [len] int64 each, at most ``text_len``. An empty text is one end token."""
        if self.tokenizer is None:
            raise RuntimeError("this encoder was built without a tokenizer")
        rows = self.tokenizer(list(texts), max_length=self.text_len, truncation=True, add_special_tokens=True)
        return [torch.tensor(ids, dtype=torch.long) for ids in rows["input_ids"]]

    def encode_ids(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states [len_i, dim] of unpadded token ids [len_i]."""
        device = self.model.shared.weight.device
        with torch.no_grad():
            return [self.model(input_ids=upload(row[None], device)).last_hidden_state[0] for row in ids]

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Hidden states [len_i, dim] of texts, without padding rows."""
        return self.encode_ids(self.tokenize(texts))

    def outputs(self, inputs: Sequence[str]) -> list[Output]:
        """``states`` [len_i, dim] of each text."""
        return [{"states": states} for states in self.encode(inputs)]


def source(model_dir: Path, *, dtype: torch.dtype, text_len: int, dim: int) -> EncoderSource:
    """The text encoder of a released Wan directory, for a transformer that reads states of width ``dim``."""

    def load() -> UMT5TextEncoder:
        encoder = UMT5TextEncoder.from_files(model_dir, dtype=dtype, text_len=text_len)
        require_same(model_dir, "text_dim", dim, encoder.dim, WEIGHTS)
        return encoder

    files = (model_dir / WEIGHTS, model_dir / TOKENIZER)
    return EncoderSource(load=load, files=files, settings=f"{dtype} {text_len}", dummy_input="")


def pad_text(states: Sequence[Tensor], text_len: int) -> Tensor:
    """Zero-pad hidden states [len_i, dim] to [B, text_len, dim], what the Wan transformers read.

    Raises:
        ValueError: a text is longer than ``text_len``.
    """
    longest = max(len(row) for row in states)
    if longest > text_len:
        raise ValueError(f"a text of {longest} tokens does not fit into text_len {text_len}")
    return torch.stack([nn.functional.pad(row, (0, 0, 0, text_len - len(row))) for row in states])


def load_umt5(state: Mapping[str, Tensor], *, dtype: torch.dtype, where: str) -> UMT5EncoderModel:
    """The encoder from tensors in the original naming; every size is read off their shapes.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    model = empty_model(lambda: UMT5EncoderModel(umt5_config(state, where)), where=where)
    # Building on meta makes two parameters of the shared embedding; tied again, it is stored once (2 GB in xxl).
    model.encoder.embed_tokens.weight = model.shared.weight
    load_weights(model, state, rename=umt5_name, dtype=dtype, where=where)
    return freeze(model)


def umt5_config(state: Mapping[str, Tensor], where: str) -> UMT5Config:
    """Sizes from the shapes of the token embedding, block 0 and its position bias."""
    try:
        vocabulary, width = state["token_embedding.weight"].shape
        buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        inner = state["blocks.0.attn.q.weight"].shape[0]
        feed_forward = state["blocks.0.ffn.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{where} is not a Wan UMT5 encoder: it has no tensor {error.args[0]!r}.",
            hint=f"Download {WEIGHTS} of the released model again.",
            at=Path(where),
        ) from None
    blocks = {int(match[1]) for name in state if (match := _BLOCK.fullmatch(name))}
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=feed_forward,
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )


def umt5_name(original: str) -> str:
    """The transformers name of an original Wan tensor; names that Wan does not have come back unchanged."""
    match = _BLOCK.fullmatch(original)
    if match and match[2] in _BLOCK_PARTS:
        return f"encoder.block.{match[1]}.{_BLOCK_PARTS[match[2]]}.weight"
    return _OTHER_NAMES.get(original, original)
