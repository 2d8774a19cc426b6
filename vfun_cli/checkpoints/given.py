"""Weights that are named instead of a model directory's own, by ``--transformer-path`` and ``--vae-path``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vfun_cli.errors import as_flag

TRANSFORMER, VAE = "transformer_path", "vae_path"
"""The options."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What was named; None: the model directory's own."""

    transformer: Path | None = None
    vae: Path | None = None

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Self:
        """What the options of a run say, or the record of an export."""
        paths = {option: None if stated.get(option) is None else Path(stated[option]) for option in (TRANSFORMER, VAE)}
        return cls(transformer=paths[TRANSFORMER], vae=paths[VAE])

    def before(self, other: "Given") -> "Given":
        """These and, where nothing was named, the other ones."""
        return Given(transformer=self.transformer or other.transformer, vae=self.vae or other.vae)

    def named(self) -> Iterator[tuple[str, Path]]:
        """The options that were given, with their files or folders."""
        for option, place in ((TRANSFORMER, self.transformer), (VAE, self.vae)):
            if place is not None:
                yield option, place


def typed(option: str, place: Path) -> str:
    """The option and what it names, for messages."""
    return f"{as_flag(option)} {place}"
