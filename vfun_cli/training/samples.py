"""Videos of what a run has learnt, made while it trains.

The ranks share the rows. Under FSDP and ZeRO-3 every pass of the transformer is one of all ranks, so a rank that has
less to make, or whose row has failed, computes along what counts for nothing. A row that fails says why in the place
where its video would be, and the run goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vfun_cli.config.options import RunConfig
from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Sample, outputs_of, prepared, shared_call_counts
from vfun_cli.errors import first_line
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import ModelAdapter, SampleRequest, VideoRequest
from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.inputs import ClipInput, load_inputs
from vfun_cli.modeling.pixels import readable
from vfun_cli.sampling.clips import pixels_of, video_of
from vfun_cli.sampling.films import Film, described, film_of, moved, write_facts, write_film
from vfun_cli.sampling.loop import Denoised, Sampler
from vfun_cli.sampling.schedules import Schedule
from vfun_cli.training.looking import evaluating, go_on
from vfun_cli.training.signals import StopFlag
from vfun_cli.training.state.live import TrainedState, let_go
from vfun_cli.training.waiting import gather_all


@dataclass(frozen=True, kw_only=True)
class SampledRow:
    """A row that videos are made of."""

    request: VideoRequest
    facts: Mapping[str, Any]
    """What stands beside its videos, apart from what the request says."""
    clip: ClipInput | None = None
    """What the row shows itself, to compare with."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"row-{self.request.key.row}"


def rows_to_sample(config: RunConfig, spec: FamilySpec, requests: Sequence[SampleRequest]) -> list[SampledRow]:
    """The held-out rows as videos to be made, each as long and as large as the clip that its loss is computed on."""
    guidance = spec.sampling.guidance if config.validation_guidance is None else config.validation_guidance
    found = []
    for each in requests if config.validation_samples else ():
        request = video_of(spec, each, guidance=guidance, negative_prompt=spec.sampling.negative_prompt)
        media = {name: each.record.get(field) for name, field in MEDIA_IN_FACTS.items()}
        found.append(SampledRow(request=request, facts=media, clip=pixels_of(spec, each)))
    return found


MEDIA_IN_FACTS = {"image": "file_path", "control": "control_file_path", "audio": "audio_path"}
"""What stands beside a video, by the field of the row that says it."""


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row, and what the encoders gave of it, which waits on the host."""

    row: SampledRow
    outputs: Mapping[str, Output]


@dataclass(kw_only=True)
class Samples:
    """Makes them; all ranks together."""

    accelerator: Accelerator
    adapter: ModelAdapter
    state: TrainedState
    schedule: Callable[[], Schedule]
    dtype: torch.dtype
    """What the model computes in."""
    rows: Sequence[SampledRow]
    in_step: bool
    """Whether a pass of the transformer is one of all ranks."""
    cache: Cache | None
    stop: StopFlag
    encoded: list[EncodedRow] | None = None
    """This rank's rows; encoded once a launch."""
    along: EncodedRow | None = None
    """What it computes while others make more: a row of its own or, if it has none, another rank's."""
    unreadable: list[tuple[SampledRow, str]] = field(default_factory=list)
    """Its other rows, and why they cannot be read."""

    def make(self, folder: Path) -> dict[str, str]:
        """A video of each row by the trained weights and, where there is one, by their average, into ``folder``.

        Returns:
            Why others of the rows have none, by the name of their files; of all ranks.

        Raises:
            Stopped: the run was asked to stop; at most one denoising step came after that.
        """
        if self.encoded is None:
            self._encode()
        transformer = self.accelerator.unwrap_model(self.state.model)
        weights: dict[str, AbstractContextManager[None]] = {"trained": nullcontext()}
        if self.state.average is not None:
            weights["ema"] = self.state.average.in_place(transformer)
        failed: dict[str, str] = {}
        for name, in_place in weights.items():
            with in_place, evaluating(transformer):
                failed |= self._make(transformer, folder, name)
        let_go(self.state)
        return {name: reason for part in gather_all(failed) for name, reason in part.items()}

    def write_clips(self, folder: Path) -> None:
        """What this rank's rows show themselves, once, for people to compare with."""
        for row in self.rows[self.accelerator.process_index :: self.accelerator.num_processes]:
            if row.clip is not None and not (folder / f"{row.name}.json").exists():
                pixels = readable(load_inputs({"clip": row.clip})["clip"])
                film = Film(pixels=pixels, fps=row.request.fps, heard_from=Fraction(0))
                write_film(film, folder / row.name, {**described(row.request), **row.facts}, row.request.audio)

    def _encode(self) -> None:
        """Read and encode this rank's rows; the encoders that the ranks share run equally often on all of them."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        found, readable = [], []
        for place in range(rank, -(-len(self.rows) // ranks) * ranks, ranks):
            row = self.rows[place] if place < len(self.rows) else None
            sample = None if row is None else self._read(row)
            outputs = self._run_encoders(sample)
            if row is not None and sample is not None:
                found.append(EncodedRow(row=row, outputs=outputs))
                readable.append(place)
        of_all = sorted(place for places in gather_all(readable) for place in places)
        if of_all:
            borrowed = self._read(self.rows[of_all[0]]) if not found else None
            outputs = self._run_encoders(borrowed)
            self.along = found[0] if found else EncodedRow(row=self.rows[of_all[0]], outputs=outputs)
        self.encoded = found

    def _read(self, row: SampledRow) -> Sample | None:
        """A row's inputs, decoded; None if they cannot be."""
        try:
            return prepared(self.adapter.inputs_to_sample(row.request, self.adapter.options), self.cache)
        except Exception as error:
            self.unreadable.append((row, first_line(error)))
            return None

    def _run_encoders(self, sample: Sample | None) -> dict[str, Output]:
        """What they give of a sample, on the host; a rank without one takes part where they are shared."""
        encoders, samples = self.adapter.encoders, [] if sample is None else [sample]
        counts = shared_call_counts(encoders, samples) if samples else [0] * len(encoders.shared)
        calls = dict(zip(encoders.shared, go_on(self.stop, counts), strict=True))
        if sample is None:
            for name, count in calls.items():
                encoders.run(name, [], count)
            return {}
        [found] = outputs_of(encoders, samples, None if self.cache is None else self.cache.write, calls)
        return moved(found, torch.device("cpu"))

    def _make(self, transformer: nn.Module, folder: Path, weights: str) -> dict[str, str]:
        """This rank's videos by the weights that the transformer has; why others of its rows have none."""
        assert self.encoded is not None
        sampler = Sampler(
            adapter=self.adapter, transformer=Watched(transformer), schedule=self.schedule, dtype=self.dtype
        )
        failed = list(self.unreadable)
        stem = {"trained": "{}", "ema": "{}-ema"}[weights]
        facts = {"steps": len(self.schedule().timesteps), "weights": weights}
        (turns,) = go_on(self.stop, [len(self.encoded)])
        for turn in range(turns):
            mine = self.encoded[turn] if turn < len(self.encoded) else None
            frames: list[Tensor] = []
            reason = self._denoise(sampler, mine, frames)
            if mine is not None:
                row = mine.row
                write = partial(self._write, row, frames, folder / stem.format(row.name), facts)
                reason = reason or self._reason_against(write)
                failed += [(row, reason)] if reason else []
        for row, reason in failed:
            write_facts(
                folder / stem.format(row.name), {**described(row.request), **row.facts, **facts, "error": reason}
            )
        return {stem.format(row.name): reason for row, reason in failed}

    def _denoise(self, sampler: Sampler, mine: EncodedRow | None, frames: list[Tensor]) -> str | None:
        """Make the frames of a row, or none, while other ranks make theirs; returns why there are none of it."""
        own, reason = 0, None
        making: Iterator[Denoised] = iter(())
        if mine is not None:
            own = self.adapter.segments(mine.row.request) * len(self.schedule().timesteps)
            outputs = moved(mine.outputs, self.accelerator.device)
            making = sampler.steps(outputs, mine.row.request, frames)
        (most,) = go_on(self.stop, [own])
        for step in range(most):
            go_on(self.stop, [])
            if step < own and reason is None:
                reason = self._reason_against(partial(next, making), sampler.transformer)
                if reason is None:
                    continue
            if self.in_step:
                self._compute_along(sampler)
        return reason or self._reason_against(partial(_exhaust, making))

    def _compute_along(self, sampler: Sampler) -> None:
        """One step's passes, whose outcome counts for nothing."""
        assert self.along is not None
        request, schedule = self.along.row.request, self.schedule()
        outputs = moved(self.along.outputs, self.accelerator.device)
        with torch.no_grad():
            branches = self.adapter.branches(outputs, request, 0, None)
            noise = torch.zeros(1, *self.adapter.latent_shape(request), device=self.accelerator.device)
            sampler.predict(noise, schedule.timesteps[0], branches, request.guidance)

    def _write(self, row: SampledRow, frames: list[Tensor], stem: Path, facts: Mapping[str, Any]) -> None:
        film = film_of(self.adapter, row.request, frames)
        write_film(film, stem, {**described(row.request), **row.facts, **facts}, row.request.audio)

    def _reason_against(self, work: Callable[[], object], transformer: "nn.Module | None" = None) -> str | None:
        """Do it; returns what kept it from being done.

        Raises:
            Exception: in a pass of the transformer that is one of all ranks; the others wait in it.
        """
        try:
            work()
        except Exception as error:
            if self.in_step and isinstance(transformer, Watched) and transformer.inside:
                raise
            return first_line(error)
        return None


class Watched(nn.Module):
    """A transformer that knows whether it has been left in the middle."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.inside = False

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The transformer's."""
        self.inside = True
        found = self.transformer(*arguments, **named)
        self.inside = False
        return found


def _exhaust(making: Iterator[Any]) -> None:
    """Let what was begun come to its end."""
    for _ in making:
        pass
