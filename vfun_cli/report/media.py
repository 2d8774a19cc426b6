"""Pictures and videos of a page: inside it as far as they are not too large together, else as links."""

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

MOST_INSIDE = 64_000_000
"""Bytes of all files inside a page: a browser opens such a page at once, and it can still be sent to somebody."""

TYPES = {".mp4": "video/mp4", ".png": "image/png"}


class Media:
    """Where the files of one page are."""

    def __init__(self, page: Path, files: Iterable[Path], most: int = MOST_INSIDE) -> None:
        """Decide which go into the page: of ``files``, the most important first, those for which there is room."""
        self.folder = Path(os.path.realpath(page)).parent
        self.inside: dict[Path, str] = {}
        self.linked: list[Path] = []
        room = most
        for file in files:
            content = _read(file, room)
            if content is None:
                self.linked.append(file)
            else:
                self.inside[file] = f"data:{TYPES[file.suffix]};base64,{base64.b64encode(content).decode()}"
                room -= len(content)

    def source(self, file: Path) -> str:
        """What a page names to show the file: its content, or its path from where the page lies."""
        if file in self.inside:
            return self.inside[file]
        return quote(os.path.relpath(os.path.realpath(file), self.folder).encode("utf-8", "surrogateescape"))


def _read(file: Path, room: int) -> bytes | None:
    """The content if it is there and fits."""
    try:
        return file.read_bytes() if file.stat().st_size <= room else None
    except OSError:
        return None
