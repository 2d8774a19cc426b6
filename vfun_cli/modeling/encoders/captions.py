"""How much of a caption each text encoder reads: its tokenizer, its limit, and what else takes part of that.

The encoders and the warning about long captions go by the same values. Free of torch: validation counts tokens too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli.errors import CheckpointError
from vfun_cli.lfs import refuse_lfs_pointer
from vfun_cli.modeling.foreign import from_folder

UMT5 = "AutoTokenizer"
UMT5_FOLDER = "google/umt5-xxl"
T5 = "T5Tokenizer"
BERT = "BertTokenizer"
CLIP = "CLIPTokenizer"
LLAMA = "PreTrainedTokenizerFast"
"""As tokenizer.json states it: the class that the released folder names, LlamaTokenizerFast, rebuilds it for Llama 2 in
transformers 5 and gives other tokens."""
QWEN = "Qwen2Tokenizer"

CLIP_LIMIT = 77
BATCH = 4096
"""Captions that are tokenized at once: few enough to hold, enough for all cores."""


@dataclass(frozen=True, kw_only=True)
class CaptionReader:
    """What a text encoder reads of a caption."""

    tokenizer: str
    """Class of transformers."""
    folder: str
    """Of the tokenizer, inside the model directory."""
    limit: int
    """Tokens, of the caption and of what counts with it."""
    beside: int | None
    """Tokens that count beside the caption: special ones, the end of an instruction. None: the beginning of the
    tokenizer's chat template."""


def umt5(limit: int) -> CaptionReader:
    """The Wan families': the end token counts."""
    return CaptionReader(tokenizer=UMT5, folder=UMT5_FOLDER, limit=limit, beside=1)


def t5(folder: str, limit: int) -> CaptionReader:
    """T5 and mT5: the end token counts."""
    return CaptionReader(tokenizer=T5, folder=folder, limit=limit, beside=1)


def bert(folder: str, limit: int) -> CaptionReader:
    """BERT: a token on each side counts."""
    return CaptionReader(tokenizer=BERT, folder=folder, limit=limit, beside=2)


def clip(folder: str) -> CaptionReader:
    """The text tower of CLIP: a token on each side counts."""
    return CaptionReader(tokenizer=CLIP, folder=folder, limit=CLIP_LIMIT, beside=2)


def instructed(folder: str, limit: int, beside: int = 0) -> CaptionReader:
    """Llama or LLaVA behind an instruction, which does not count. Its end is cut before the caption is."""
    return CaptionReader(tokenizer=LLAMA, folder=folder, limit=limit, beside=beside)


def chat(folder: str, limit: int) -> CaptionReader:
    """Qwen2-VL, to which the caption is a message: what the template has before it counts."""
    return CaptionReader(tokenizer=QWEN, folder=folder, limit=limit, beside=None)


def chat_prompts(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Each caption as a chat of one user message."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": caption}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for caption in captions
    ]


def load_tokenizer(name: str, folder: Path) -> Any:
    """A tokenizer of the class ``name`` from its folder, offline, padding on the right.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    import transformers

    kind = getattr(transformers, name)
    names = getattr(kind, "vocab_files_names", {"vocabulary": "spiece.model"})  # AutoTokenizer names none
    files = [folder / file for file in dict.fromkeys(("tokenizer.json", *names.values()))]
    for file in files:
        refuse_lfs_pointer(file)
    # transformers makes an empty vocabulary out of an empty folder without a word.
    if not any(file.is_file() for file in files):
        raise CheckpointError(
            f"no {name} in {folder}: none of {', '.join(file.name for file in files)}.",
            hint="Download the folder again.",
            at=folder,
        )
    # Without trust_remote_code, AutoTokenizer asks on the terminal whether to run a program that the folder names.
    return from_folder(kind, folder, padding_side="right", trust_remote_code=False)


def cut_tokens(reader: CaptionReader, model_dir: Path, captions: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of each caption that is not read to its end: its tokens, and how many of them are cut.

    Raises:
        CheckpointError: there is no such tokenizer in the model directory.
    """
    unsure = [caption for caption in dict.fromkeys(captions) if not _fits_surely(reader, caption)]
    if not unsure:
        return {}
    tokenizer = load_tokenizer(reader.tokenizer, model_dir / reader.folder)
    room = reader.limit - (_before_a_message(tokenizer) if reader.beside is None else reader.beside)
    counts = _counts(tokenizer, unsure)
    return {caption: (n, n - room) for caption, n in zip(unsure, counts, strict=True) if n > room}


def _fits_surely(reader: CaptionReader, caption: str) -> bool:
    """Without looking: no tokenizer makes more of ASCII than a token a character and one for a blank in front.

    What is not ASCII may become a token a byte, and more characters when it is normalised.
    """
    return reader.beside is not None and caption.isascii() and len(caption) + 1 + reader.beside <= reader.limit


def _before_a_message(tokenizer: Any) -> int:
    before = chat_prompts(tokenizer, ["\0"])[0].partition("\0")[0]
    return len(tokenizer(before).input_ids)


def _counts(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption alone, on all cores."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    counts: list[int] = []
    for start in range(0, len(captions), BATCH):
        # half a character (a lone surrogate) counts as the "?" in its place
        batch = [caption.encode(errors="replace").decode() for caption in captions[start : start + BATCH]]
        counts += map(len, backend.encode_batch_fast(batch, add_special_tokens=False))
    return counts
