"""What ``vfun generate`` is to write: which video into which file, and what of it is there already."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError
from vfun_cli.files import PICTURE, VIDEO
from vfun_cli.sampling.rows import Video, settings_json
from vfun_cli.sampling.source import Source

KINDS = (VIDEO, PICTURE)
WEIGHTS = (".safetensors", ".distcp", ".pt", ".pth", ".bin")
"""Endings of files with weights, in a folder that may hold the videos too."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A video and where it goes."""

    video: Video
    stem: Path
    """Of its files, without an ending."""
    facts: Mapping[str, Any]
    """What stands in the file beside it: a row that makes it again."""
    since: float
    """When what it is made from was last written, in seconds since 1970."""

    @property
    def name(self) -> str:
        """For people; no two of a command have the same."""
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
        """Whether this very video is there, newer than all that it is made from."""
        try:
            stated = json.loads(self.facts_path.read_text(encoding="utf-8"))
            return bool(stated == self.facts) and self.path.stat().st_mtime >= self.since
        except (OSError, ValueError):
            return False

    def is_taken(self) -> bool:
        """Whether another video has its name."""
        there = self.path.exists() or self.facts_path.exists()
        return there and not self.is_made()


def orders_of(
    videos: Sequence[Video], source: Source, base: Source | None, output: Path, *, overwrite: bool
) -> list[Order]:
    """Where each video goes: into a folder or, of one video, a file of that name.

    In a folder it is named after its row; a name that another video has, there or in this command, is followed by a
    number. So nothing is lost, and the same command again finds what it has made.

    Raises:
        ConfigError: a file for several videos, of another kind, or that is there already.
    """
    weights = max(map(_written, [file for each in (source, base) if each is not None for file in _files(each)]))

    def order(video: Video, stem: Path) -> Order:
        facts = settings_json(video, source)
        if base is not None:
            facts["compare"] = settings_json(video, base)["source"]
        media = [_written(Path(each.path)) for each in video.media.values()]
        return Order(video=video, stem=stem, facts=facts, since=max(weights, *media, 0.0))

    if output.suffix in KINDS:
        if len(videos) != 1:
            raise ConfigError(f"--output {output} is one file, for {len(videos)} videos.", hint="Name a folder.")
        return [_in_file(order(videos[0], output.with_suffix("")), output, overwrite=overwrite)]
    orders: dict[str, Order] = {}
    for video in videos:
        names = (f"video-{video.row}{f'-{number}' * (number > 1)}" for number in count(1))
        free = (order(video, output / name) for name in names if name not in orders)
        found = next(each for each in free if overwrite or not each.is_taken())
        orders[found.name] = found
    return list(orders.values())


def _in_file(order: Order, output: Path, *, overwrite: bool) -> Order:
    if order.path != output:
        raise ConfigError(f"--output {output}: this video becomes {order.path.name}.", hint="Name it so.")
    if order.is_taken() and not overwrite:
        raise ConfigError(
            f"--output {output} is there already, and another video than this.",
            hint="Name another file, or let it be replaced with --overwrite.",
        )
    return order


def _files(source: Source) -> Iterator[Path]:
    """The files with the weights of a source."""
    for path in (source.path, source.model, *(lora.path for lora in source.loras)):
        yield from (file for file in path.rglob("*") if file.suffix in WEIGHTS) if path.is_dir() else [path]


def _written(file: Path) -> float:
    """When a file was last written; 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
