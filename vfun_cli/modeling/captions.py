"""The caption that a clip trains with, made in one place from what its row states.

    caption_of(("a dog, grass", "a brown dog runs"), key.content, CaptionOptions(prefix="ohwx"))

One text is drawn, its tags are shuffled if that is wanted, and prefix and suffix go around it. All of that decides
what an encoder sees, so the key is that of such draws; whether a caption is dropped is drawn elsewhere, by the family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # with torch, and a plan looks at captions too
    from vfun_cli.modeling.randomness import SampleKey

CAPTION_DROPOUT = 0.1
"""How often a caption is left out for classifier-free guidance, as in the original scripts of every family."""
SEPARATOR = ","
"""Between tags."""
JOINS = ",.;:!?)，。、；：！？）"
"""What follows a word without a blank."""


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """What is made of the texts of a row."""

    prefix: str = ""
    suffix: str = ""
    shuffle_tags: bool = False


AS_STATED = CaptionOptions()
"""One of the texts, as it stands in the row."""


def caption_of(texts: Sequence[str], key: "SampleKey", options: CaptionOptions) -> str:
    """The caption under this key: one of the texts, each as likely as the others, inside prefix and suffix.

    Args:
        texts: what the row states; of none, prefix and suffix stand alone.
        key: of draws that decide what an encoder sees (``SampleKey.content``).
    """
    text = texts[int(key.numpy("caption").integers(len(texts)))] if len(texts) > 1 else "".join(texts)
    if options.shuffle_tags:
        tags = tags_of(text)
        text = f"{SEPARATOR} ".join(tags[place] for place in key.numpy("tags").permutation(len(tags)))
    return _framed(text, options)


def tags_of(text: str) -> list[str]:
    """What stands between commas, without blanks around it; a sentence without commas is one tag."""
    return [tag for part in text.split(SEPARATOR) if (tag := part.strip())]


def possible_captions(texts: Sequence[str], options: CaptionOptions) -> list[str]:
    """Each caption that may be drawn, its tags in the order of the row: shuffled they are about as many tokens."""
    return [_framed(text, options) for text in texts or ("",)]


def _framed(text: str, options: CaptionOptions) -> str:
    return _joined(_joined(options.prefix, text), options.suffix)


def _joined(first: str, second: str) -> str:
    """Both as they are, with a blank between them unless there is one or none belongs there."""
    if not first or not second or first[-1].isspace() or second[0].isspace() or second[0] in JOINS:
        return first + second
    return f"{first} {second}"
