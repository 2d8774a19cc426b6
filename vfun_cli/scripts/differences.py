"""Where vfun differs from the originals, read from the page that says it: ``docs/compatibility.md``.

A row counts for a script if everything holds that its left cell says in these forms:

* ``--name``, a flag that was typed; with a value behind it, with that value; after "without", one that was not;
* FSDP, ZeRO, DDP, one process: strategies, of which the script's is one;
* the heading above it: a family's, or "LoRA".

Tables with a column ``flag`` say how each flag is taken; that is told of each flag that a script types anyway.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from vfun_cli.families import FAMILIES
from vfun_cli.shipped import shipped

PAGE = "compatibility.md"

_HEADING = re.compile(r"#{2,3} (.+)")
_FLAG = re.compile(r"(without )?`(--)?([a-z][a-z0-9_]*)(?:[ =]([^`]*))?`")
_NOT_A_VALUE = re.compile(r"[A-Z ]+|.*\.\.\..*|\".*")
"""Placeholders for a value: H W, ..."""
_STRATEGY_WORDS = {
    r"\bFSDP\b": ("fsdp",),
    r"\bDeepSpeed\b|\bZeRO\b(?!-)": ("zero2", "zero3", "zero3-offload"),
    r"\bZeRO-2\b": ("zero2",),
    r"\bZeRO-3\b": ("zero3", "zero3-offload"),
    r"\bDDP\b": ("ddp", "auto"),
    r"\b[Oo]ne process\b": ("single", "auto"),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row of the page."""

    section: str
    original: str
    vfun: str
    families: tuple[str, ...]
    """Of the heading; none: all."""
    typed: tuple[tuple[str, str | None], ...]
    """Flags that must be typed, with the value if it counts."""
    absent: tuple[str, ...]
    """Flags that must not be."""
    strategies: tuple[str, ...]
    """One of them must be the script's; none: any."""

    def holds(self, command: str, family: str, strategy: str, typed: Mapping[str, str]) -> bool:
        """Whether it counts for a script with these flags, by name with what was typed as value."""
        if self.families and family not in self.families:
            return False
        if self.section == "LoRA" and command != "lora":
            return False
        if self.strategies and strategy not in self.strategies:
            return False
        said = (name in typed and value in (None, typed[name]) for name, value in self.typed)
        return self.conditional and all(said) and not any(name in typed for name in self.absent)

    @property
    def conditional(self) -> bool:
        """Whether it counts for some scripts and not for others."""
        return bool(self.families or self.section == "LoRA" or self.strategies or self.typed or self.absent)


@cache
def differences() -> tuple[Difference, ...]:
    """Every row of the page that says what the originals do and what vfun does."""
    found: list[Difference] = []
    section, header = "", list[str]()
    lines = (shipped("docs") / PAGE).read_text(encoding="utf-8").splitlines()
    for line, following in pairwise([*lines, ""]):
        if heading := _HEADING.match(line):
            section, header = heading[1], []
        elif not line.startswith("|"):
            header = []
        elif following.startswith("|---"):
            header = _cells(line)
        elif header and not line.startswith("|---"):
            row = dict(zip(header, _cells(line), strict=True))
            original, vfun = row.get("originals", row.get("original")), row.get("vfun")
            if original and vfun and "flag" not in row:
                found.append(_difference(section, original, vfun))
    return tuple(found)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _difference(section: str, original: str, vfun: str) -> Difference:
    flags = [
        (bool(without), name, value)
        for without, dashes, name, value in _FLAG.findall(original)
        if dashes or name in WITHOUT_DASHES
    ]
    strategies = [name for pattern, names in _STRATEGY_WORDS.items() if re.search(pattern, original) for name in names]
    return Difference(
        section=section,
        original=_plain(original),
        vfun=_plain(vfun),
        families=tuple(name for name in section.split(", ") if name in FAMILIES),
        typed=tuple(
            (name, None if not value or _NOT_A_VALUE.fullmatch(value) else value)
            for without, name, value in flags
            if not without
        ),
        absent=tuple(name for without, name, _ in flags if without),
        strategies=tuple(dict.fromkeys(strategies)),
    )


WITHOUT_DASHES = ("random_frame_crop", "keep_all_node_same_token_length")
"""Flags that the page names without their dashes."""


def _plain(cell: str) -> str:
    """Without marks of Markdown."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").replace("\\|", "|")
