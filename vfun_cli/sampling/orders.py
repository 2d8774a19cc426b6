"""What ``vfun generate`` is to write: which video into which file, and what of it is there already."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError
from vfun_cli.sampling.rows import Video, settings_json
from vfun_cli.sampling.source import Source

Tell = Callable[[str, int, int], None]
"""Hears of every denoising step: of which video, how many are done, and of how many; of none before the first."""

KINDS = (".mp4", ".png")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A video and where it goes."""

    video: Video
    stem: Path
    """Of its files, without an ending."""
    facts: Mapping[str, Any]
    """What stands in the file beside it: a row that makes it again."""

    @property
    def name(self) -> str:
        """For people."""
        return self.stem.name

    @property
    def path(self) -> Path:
        """Of the video."""
        return self.stem.with_name(f"{self.name}{KINDS[self.video.frames == 1]}")

    @property
    def facts_path(self) -> Path:
        """Of the file beside it, which is written last."""
        return self.stem.with_name(f"{self.name}.json")

    def is_made(self) -> bool:
        """Whether this very video is there."""
        try:
            return bool(json.loads(self.facts_path.read_text(encoding="utf-8")) == self.facts) and self.path.is_file()
        except (OSError, ValueError):
            return False


def orders_of(videos: Sequence[Video], source: Source, base: Source | None, output: Path) -> list[Order]:
    """Where each video goes: a folder or, of one video, a file of that name.

    Raises:
        ConfigError: a file for several videos, or of another kind.
    """
    stems = [output / f"video-{video.row}" for video in videos]
    if output.suffix in KINDS:
        if len(videos) > 1:
            raise ConfigError(f"--output {output} is one file, for {len(videos)} videos.", hint="Name a folder.")
        stems = [output.with_suffix("")]
    orders = [
        Order(video=video, stem=stem, facts=_facts(video, source, base))
        for video, stem in zip(videos, stems, strict=True)
    ]
    if output.suffix in KINDS and orders[0].path != output:
        raise ConfigError(f"--output {output}: this video becomes {orders[0].path.name}.", hint="Name it so.")
    return orders


def _facts(video: Video, source: Source, base: Source | None) -> dict[str, Any]:
    facts = settings_json(video, source)
    if base is not None:
        facts["compare"] = settings_json(video, base)["source"]
    return facts


def left_to_make(orders: Sequence[Order], *, overwrite: bool) -> list[Order]:
    """Those that are not there yet.

    Raises:
        ConfigError: another file has the name of one.
    """
    left = [order for order in orders if overwrite or not order.is_made()]
    taken = [order.path for order in left if order.path.exists() and not overwrite]
    if taken:
        raise ConfigError(
            f"{taken[0]} is there already, and another video than this.",
            hint="Name another --output, or let it be replaced with --overwrite.",
        )
    return left
