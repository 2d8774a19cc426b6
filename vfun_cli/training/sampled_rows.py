"""The rows that a run makes videos of, read and encoded once a launch: their media may go after that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Add, Sample, given_outputs, outputs_by, prepared, shared_call_counts
from vfun_cli.errors import first_line
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest, VideoRequest
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.inputs import ClipInput, load_inputs
from vfun_cli.modeling.media.sound import read_sound
from vfun_cli.modeling.media.writing import Sound
from vfun_cli.modeling.pixels import readable
from vfun_cli.plan.samples import SampleSettings
from vfun_cli.run.metrics_file import only_reports
from vfun_cli.sampling.clips import pixels_of, video_of
from vfun_cli.sampling.films import Film, described, moved, write_film
from vfun_cli.sampling.prompts import videos_of_prompts
from vfun_cli.sampling.requests import request_of
from vfun_cli.training.data.loader import LOAD_TIMEOUT
from vfun_cli.training.looking import asking, go_on, heeding, patiently
from vfun_cli.training.signals import StopFlag
from vfun_cli.training.waiting import gather_all, of_rank

MEDIA_IN_FACTS = {"image": "file_path", "control": "control_file_path", "audio": "audio_path"}
"""What stands beside a video, by the field of the row that says it."""


@dataclass(frozen=True, kw_only=True)
class SampledRow:
    """A row that videos are made of."""

    request: VideoRequest
    media: Mapping[str, Any]
    """What stands beside its videos, apart from what the request says."""
    clip: ClipInput | None = None
    """What the row shows itself, to compare with."""
    kind: str = "row"
    """``row`` of the metadata, or ``prompt``."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-{self.request.key.row}"

    @property
    def facts(self) -> dict[str, Any]:
        """What it is made of, as it stands beside its videos."""
        return {**described(self.request), **self.media}


def rows_to_sample(settings: SampleSettings, spec: FamilySpec, requests: Sequence[SampleRequest]) -> list[SampledRow]:
    """The held-out rows as videos to be made, each as long and as large as the clip that its loss is computed on."""
    found = []
    for each in requests:
        request = video_of(spec, each, guidance=settings.guidance, negative_prompt=settings.negative_prompt)
        media = {name: each.record.get(field) for name, field in MEDIA_IN_FACTS.items()}
        found.append(SampledRow(request=request, media=media, clip=pixels_of(spec, each)))
    return found


def prompts_to_sample(config: RunConfig, spec: FamilySpec, dims: ModelDims) -> list[SampledRow]:
    """The prompts of a run as videos to be made, which the launch has checked."""
    videos = videos_of_prompts(config, spec, dims)
    found = []
    for video in videos.videos if videos is not None else ():
        media: dict[str, Any] = {name: each.path for name, each in video.media.items()}
        found.append(SampledRow(request=request_of(video), media=media, kind="prompt"))
    return found


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row with all that a video of it is made from, which waits on the host."""

    row: SampledRow
    outputs: Mapping[str, Output]
    sound: Sound | None
    """What is heard, from the first frame on."""


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """One rank's share of the rows."""

    encoded: Sequence[EncodedRow]
    failed: Sequence[tuple[SampledRow, str]]
    """Those that cannot be read or encoded, and why."""
    along: EncodedRow | None
    """What every rank can make passes of that count for nothing; None where no row of any rank could be encoded."""


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reads and encodes rows; all ranks together."""

    adapter: ModelAdapter
    cache: Cache | None
    stop: StopFlag
    clips: Path
    """Where the rows' own clips go, for people to compare with."""

    def share_of(self, rank: int, ranks: int, rows: Sequence[SampledRow]) -> RankRows:
        """The rows of one rank, which calls it.

        Raises:
            Exception: what an encoder met where ranks share some: the others wait in it.
            Stopped: the run was asked to stop.
        """
        encoded, failed = [], []
        for first in range(0, len(rows), ranks):
            row = rows[first + rank] if first + rank < len(rows) else None
            found = self._encoded(row)
            if isinstance(found, EncodedRow):
                encoded.append(found)
            elif row is not None:
                failed.append((row, found))
        having = [each for each, number in enumerate(gather_all(len(encoded))) if number]
        along = of_rank(having[0], encoded[0] if rank == having[0] else None) if having else None
        return RankRows(encoded=encoded, failed=failed, along=along)

    def _encoded(self, row: SampledRow | None) -> EncodedRow | str:
        """A row, or why it is not there; without one, this rank takes part in the encoders that the ranks share."""
        read, reason = None, f"reading it took longer than {LOAD_TIMEOUT} s"
        try:
            read = heeding(self.stop, lambda: None if row is None else self._encoded_alone(row))
        except Exception as error:
            reason = first_line(error)
        encoders, samples = self.adapter.encoders, [] if read is None else [read[0]]
        calls = dict(zip(encoders.shared, go_on(self.stop, shared_call_counts(encoders, samples)), strict=True))
        made = outputs_by(encoders, encoders.shared, samples, self._add, calls)
        if row is None or read is None:
            return reason
        _, sound, outputs = read
        return EncodedRow(row=row, outputs=moved(outputs | made[0], torch.device("cpu")), sound=sound)

    def _encoded_alone(self, row: SampledRow) -> tuple[Sample, Sound | None, dict[str, Output]] | None:
        """What is read of a row, and what those encoders make of it that each rank has; None if it hangs."""
        encoders = self.adapter.encoders
        ask = asking(self.stop, encoders.device)
        read = patiently(ask, lambda: self._read(row))
        if read is None:
            return None
        sample, sound = read
        own = [name for name in encoders if name not in encoders.shared]
        with encoders["vae"].paused(ask):
            [made] = outputs_by(encoders, own, [sample], self._add)
        [given] = given_outputs(encoders, [sample])
        return sample, sound, given | made

    @property
    def _add(self) -> Add | None:
        return None if self.cache is None else self.cache.write

    def _read(self, row: SampledRow) -> tuple[Sample, Sound | None]:
        """What the encoders read of a row, and what is heard; its own clip is put where people look for it."""
        sample = prepared(self.adapter.inputs_to_sample(row.request, self.adapter.options), self.cache)
        if row.clip is not None and not (self.clips / f"{row.name}.json").exists():
            with only_reports(f"the clip of {row.name} cannot be put beside its samples"):
                pixels = readable(load_inputs({"clip": row.clip})["clip"])
                film = Film(pixels=pixels, fps=row.request.fps, heard_from=Fraction(0))
                write_film(film, self.clips / row.name, row.facts, row.request.audio)
        return sample, self._sound(row.request)

    def _sound(self, request: VideoRequest) -> Sound | None:
        """As much of it as there is; the video may be shorter."""
        sound, start = request.audio, self.adapter.heard_from(request)
        return None if sound is None else read_sound(sound.media.path, sound.start + start, sound.available - start)
