"""What a family can read from a row of the metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unicodedata import category


@dataclass(frozen=True, kw_only=True)
class MetadataField:
    """A metadata key that a family reads, apart from ``text`` and ``type``."""

    name: str
    media: Literal["visual", "control", "audio"]
    required: bool = True
    otherwise: str | None = None
    """The field whose file is read where a row has none for this one (the sound of the video)."""

    def key(self, row: Mapping[str, Any]) -> str:
        """The key that names this field's file in a row: its own or, where the row has none, ``otherwise``."""
        return self.otherwise if self.otherwise is not None and row.get(self.name) is None else self.name


def stated_media(row: Mapping[str, Any], fields: Sequence[MetadataField]) -> dict[str, Any]:
    """What a row states as the file of each field, by field; None where it states nothing."""
    return {item.name: row.get(item.key(row)) for item in fields}


def texts_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions that a row states under ``text``, one or a list of which one is drawn; none where it has none."""
    stated = row.get("text")
    return tuple(text for text in (stated if isinstance(stated, list) else [stated]) if isinstance(text, str))


_GARBLED = ("Cc", "Cs", "Co", "Cn")


def odd_sign(text: str) -> str:
    """The first sign of a caption that only a wrong decoding produces; empty where there is none."""
    return next((c for c in text if c == "\ufffd" or (category(c) in _GARBLED and c not in "\n\r\t")), "")
