"""The picture of the README is what the program prints today."""

import re
from html import unescape

from docs import generate as docs


def test_the_picture_in_the_docs_shows_todays_preview() -> None:
    """The words are compared: another release of Rich may draw them elsewhere."""
    picture = (docs.DOCS / docs.PREVIEW).read_text(encoding="utf-8")
    shown = "".join(unescape(part) for part in re.findall(r"<text[^>]*>([^<]*)</text>", picture))
    _, text = docs.preview_picture()
    assert "".join(text.split()) in "".join(shown.replace("\xa0", " ").split()), "run: make docs"
    assert f"(docs/{docs.PREVIEW})" in (docs.DOCS.parent / "README.md").read_text(encoding="utf-8")
