"""From the plan to decoded clips: this rank's micro-batches in order, decoded ahead by worker processes."""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vfun_cli.errors import MetadataError, VfunError
from vfun_cli.training.adapter import ModelAdapter, Sample, SampleRequest
from vfun_cli.training.signals import leave_signals_to_the_rank

LOAD_TIMEOUT = 600
"""Seconds without a decoded micro-batch before the run stops: decord can hang on a broken file."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank trains on at once."""

    epoch: int
    step: int
    """Optimizer step of the run, from 0."""
    index: int
    """Which micro-batch of the step, from 0."""
    share: float = 1.0
    """FLOPs of the step on its heaviest rank, in units of the epoch's mean: what the time left is told from."""
    requests: tuple[SampleRequest, ...]


@dataclass(frozen=True, kw_only=True)
class LoadedBatch:
    """A micro-batch with its decoded samples, or the error that decoding met."""

    batch: MicroBatch
    samples: list[Sample]
    error: VfunError | None = None


class ClipDataset(Dataset[LoadedBatch]):
    """Decodes whole micro-batches; the sampler hands it the requests themselves."""

    def __init__(self, adapter: type[ModelAdapter], options: Mapping[str, Any]) -> None:
        self.adapter = adapter
        self.options = options

    def __getitem__(self, batch: Any) -> LoadedBatch:
        samples = []
        for request in batch.requests:
            try:
                samples.append(self.adapter.load(request, self.options))
            except VfunError as error:
                named = MetadataError(f"row {request.key.row}: {error.message}", hint=error.hint)
                return LoadedBatch(batch=batch, samples=[], error=named)
        return LoadedBatch(batch=batch, samples=samples)


class _Stream(Sampler[MicroBatch]):
    """The micro-batches of this rank, from the resume position on."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.batches


def load_ahead(
    adapter: type[ModelAdapter], options: Mapping[str, Any], batches: Iterator[MicroBatch], workers: int
) -> Iterator[LoadedBatch]:
    """Decoded micro-batches in plan order; deterministic whatever the number of workers.

    Raises:
        MetadataError: a clip that cannot be decoded, with its row; or nothing decoded in ``LOAD_TIMEOUT`` seconds.
    """
    loader = DataLoader(
        ClipDataset(adapter, options),
        batch_size=None,
        sampler=_Stream(batches),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        timeout=LOAD_TIMEOUT if workers else 0,
        worker_init_fn=_start_worker,
    )
    try:
        for loaded in loader:
            if loaded.error is not None:
                raise loaded.error
            yield loaded
    except RuntimeError as error:
        if "timed out" in str(error):
            for process in multiprocessing.active_children():
                process.kill()  # a hanging decoder hears nothing else, and would be waited for at the end
            raise MetadataError(
                f"no clip was decoded for {LOAD_TIMEOUT} s: a file hangs its decoder.",
                hint="vfun validate-meta --deep names files that hang.",
            ) from error
        raise


def _start_worker(worker: int) -> None:
    """One thread a worker: with 8 workers a rank, more only fight over the cores."""
    torch.set_num_threads(1)
    leave_signals_to_the_rank()


def batch_keys(requests: Sequence[SampleRequest]) -> list[Any]:
    """The sample keys of a micro-batch."""
    return [request.key for request in requests]
