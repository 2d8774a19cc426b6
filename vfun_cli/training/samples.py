"""Videos of what a run has learnt, made while it trains.

The ranks share the rows. Under FSDP and ZeRO-3 every pass of the transformer is one of all ranks, so a rank that has
less to make, or whose row has failed, computes along what counts for nothing. A row that fails says why in the place
where its video would be, and the run goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vfun_cli.errors import first_line
from vfun_cli.modeling.adapter import ModelAdapter
from vfun_cli.modeling.transfer import catch_up
from vfun_cli.run.metrics_file import only_reports
from vfun_cli.sampling.films import film_of, moved, write_failure, write_shown
from vfun_cli.sampling.loop import Sampler
from vfun_cli.sampling.schedules import Schedule
from vfun_cli.training.looking import asking, evaluating, go_on, heeding, weights_of
from vfun_cli.training.sampled_rows import EncodedRow, RankRows, RowReader, SampledRow
from vfun_cli.training.state.live import TrainedState
from vfun_cli.training.waiting import gather_all

STEMS = {"trained": "{}", "ema": "{}-ema"}
"""Names of a row's files, by the weights that its video is made with."""
ENDED = object()


@dataclass(frozen=True, kw_only=True)
class Made:
    """What came of the rows."""

    videos: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why there is none, by the name that its file would have."""


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
    reader: RowReader
    in_step: bool
    """Whether a pass of the transformer is one of all ranks."""
    tell: Callable[[str], None] = lambda text: None
    """Is told which video is begun."""
    mine: RankRows | None = None
    """This rank's rows; encoded once a launch, because the encoders are frozen."""

    @cached_property
    def steps(self) -> int:
        """Of each segment."""
        return len(self.schedule().timesteps)

    def make(self, folder: Path) -> Made:
        """A video of each row into ``folder``, by each of ``weights_of``; returns what came of the rows of all ranks.

        Raises:
            Exception: in a pass that is one of all ranks.
            Stopped: the run was asked to stop; at most a denoising step, or a convolution of the VAE, came after that.
        """
        if self.mine is None:
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            self.mine = self.reader.share_of(rank, ranks, self.rows)
        made = Made()
        for weights in weights_of(self.state):
            with evaluating(self.state, weights) as transformer:
                self._make(self.mine, Counted(transformer), folder, weights, made)
        everyone = gather_all(made)
        return Made(
            videos=sorted(path for each in everyone for path in each.videos),
            failed={name: reason for each in everyone for name, reason in sorted(each.failed.items())},
        )

    def _make(self, mine: RankRows, transformer: "Counted", folder: Path, weights: str, made: Made) -> None:
        """This rank's videos by the weights that the transformer has."""
        sampler = Sampler(adapter=self.adapter, transformer=transformer, schedule=self.schedule, dtype=self.dtype)
        failed, facts = list(mine.failed), {"steps": self.steps, "weights": weights}
        along = self._along(sampler, mine.along) if self.in_step and mine.along is not None else None
        if along is not None:
            heeding(self.reader.stop, lambda: next(along))
        (turns,) = go_on(self.reader.stop, [len(mine.encoded)])
        for turn in range(turns):
            self.tell(f"samples by the {weights} weights: video {turn + 1} of {turns}")
            if turn >= len(mine.encoded):
                self._go_through(iter(()), 0, transformer, along)
                continue
            encoded = mine.encoded[turn]
            row = encoded.row
            making = self._steps(sampler, encoded, folder / STEMS[weights].format(row.name), facts, made)
            reason = self._go_through(making, self.adapter.segments(row.request), transformer, along)
            failed += [] if reason is None else [(row, reason)]
        for row, reason in failed:
            stem = folder / STEMS[weights].format(row.name)
            made.failed[stem.name] = reason
            with only_reports(f"{stem}.json cannot be written"):
                write_failure(stem, {**row.facts, **facts}, reason)

    def _go_through(
        self, making: Iterator[None], segments: int, transformer: "Counted", along: Iterator[None] | None
    ) -> str | None:
        """Make a video, or none, while the other ranks make theirs; returns what kept it from being made.

        All ranks are at the same step of the same segment. What comes before its first step and after its last, such
        as to decode the one before, each rank does alone.

        Raises:
            Exception: after a pass of the same step, where passes are those of all ranks: they would be out of step.
        """
        stop, reason = self.reader.stop, None
        (most,) = go_on(stop, [segments])
        for segment in range(most + 1):
            try:
                heeding(stop, lambda: next(making, ENDED))
            except Exception as error:
                reason = first_line(error)
            for _ in range(self.steps if segment < most else 0):
                catch_up(self.accelerator.device)
                go_on(stop)
                reason = self._step(making, transformer, along) or reason
        return reason

    def _step(self, making: Iterator[None], transformer: "Counted", along: Iterator[None] | None) -> str | None:
        """One step of a video, or of what counts for nothing; returns what ended the video in it.

        Raises:
            Exception: see ``_go_through``.
        """
        before, is_made, reason = transformer.passes, False, None
        try:
            is_made = next(making, ENDED) is not ENDED
        except Exception as error:
            if along is not None and transformer.passes > before:
                raise
            reason = first_line(error)
        if along is not None and not is_made:
            next(along)
        return reason

    def _steps(
        self, sampler: Sampler, encoded: EncodedRow, stem: Path, facts: Mapping[str, Any], made: Made
    ) -> Iterator[None]:
        """Make a video of a row and write it, and stop before the first step of each segment and after each step."""
        row, frames, device = encoded.row, list[Tensor](), self.accelerator.device
        ask = asking(self.reader.stop, device)
        with self.adapter.encoders["vae"].paused(ask):
            for _ in sampler.steps(moved(encoded.outputs, device), row.request, frames):
                yield
        film = film_of(self.adapter, row.request, frames)
        made.videos.append(write_shown(film, stem, {**row.facts, **facts}, encoded.sound, ask))

    def _along(self, sampler: Sampler, encoded: EncodedRow) -> Iterator[None]:
        """Steps without end, whose outcome counts for nothing; stops before the first one too."""
        request, device = encoded.row.request, self.accelerator.device
        noise = torch.zeros(1, *self.adapter.latent_shape(request), device=device)
        branches = self.adapter.branches(moved(encoded.outputs, device), request, 0, None)
        first = self.schedule().timesteps[0]
        yield
        while True:
            sampler.predict(noise, first, branches, request.guidance)
            yield


class Counted(nn.Module):
    """A transformer that counts its passes."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.passes = 0
        """Begun."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The transformer's."""
        self.passes += 1
        return self.transformer(*arguments, **named)
