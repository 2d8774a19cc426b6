"""From the plan to decoded clips: this rank's micro-batches in order, decoded ahead by worker processes."""

import errno
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vfun_cli.encoding.cache import Cache
from vfun_cli.encoding.encode import Sample, load
from vfun_cli.errors import FitError, MetadataError, RunError, VfunError, first_line
from vfun_cli.modeling.adapter import AdapterOptions, ModelAdapter, SampleRequest
from vfun_cli.plan.queue import MOST_AHEAD
from vfun_cli.run.memory_errors import HOST_HINT, SHARED_MEMORY_HINT, memory_error
from vfun_cli.training.background import Background
from vfun_cli.training.data import forkserver
from vfun_cli.training.signals import leave_signals_to_the_rank

LOAD_TIMEOUT = 300
"""Seconds of decoding one micro-batch before its file counts as one that hangs its decoder, and seconds without a
decoded micro-batch, and without one at work, before the decoding processes count as lost. The other ranks wait
meanwhile, outside of all collectives of the devices."""

PATIENCE = 1.0
"""Seconds for which the next micro-batch is waited for before the rank looks whether it was asked to stop."""

END_TIMEOUT = 10
"""Seconds between losing contact with a decoding process and its end; a large one takes a while to write its core."""

FAULTS_OF_FILES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Ends of a decoding process that are its file's doing."""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank trains on at once."""

    epoch: int
    step: int
    """Optimizer step of the run, from 0."""
    index: int
    """Which micro-batch of the step, from 0."""
    share: float = 1.0
    """FLOPs of the step on its heaviest rank, in units of the epoch's mean: the remaining time is estimated from it."""
    requests: tuple[SampleRequest, ...]
    fault: str | None = None
    """Why decoding these requests is not tried again: it hung, or ended the process."""

    @property
    def place(self) -> tuple[int, int]:
        """(step, index): unique among the micro-batches of this rank."""
        return self.step, self.index


@dataclass(frozen=True, kw_only=True)
class LoadedBatch:
    """A micro-batch with its decoded samples."""

    batch: MicroBatch
    """Its requests are those of ``samples``."""
    samples: list[Sample]
    bad: tuple[tuple[SampleRequest, VfunError], ...] = ()
    """What could not be decoded."""
    is_substitute: bool = False
    """The samples are those of another micro-batch, computed with weight 0, so that all ranks make the same passes."""
    shared_calls: Mapping[str, int] = field(default_factory=dict)
    """How often each encoder that the ranks share computes for it, on all of them."""

    @property
    def trained(self) -> tuple[SampleRequest, ...]:
        """The requests that count."""
        return () if self.is_substitute else self.batch.requests

    @property
    def weight(self) -> float:
        """Share of the planned samples that count: a skipped one adds nothing to the loss of its micro-batch."""
        return len(self.trained) / (len(self.trained) + len(self.bad))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decodes whole micro-batches of one model."""

    adapter: type[ModelAdapter]
    options: AdapterOptions
    cache: Cache | None

    def decoded(self, batch: MicroBatch) -> LoadedBatch:
        """The samples of a micro-batch; those that cannot be decoded are among its bad ones."""
        samples, good = [], []
        bad: list[tuple[SampleRequest, VfunError]] = []
        for request in batch.requests:
            try:
                if batch.fault is not None:
                    raise MetadataError(batch.fault, hint=_DEEP_HINT)
                samples.append(load(self.adapter, request, self.options, self.cache))
                good.append(request)
            except Exception as error:
                bad.append((request, _named(error, request)))
        return LoadedBatch(batch=replace(batch, requests=tuple(good)), samples=samples, bad=tuple(bad))


class ClipDataset(Dataset["HandedOver"]):
    """What decoding processes run; the sampler hands it the micro-batches themselves."""

    def __init__(self, decoder: Decoder, status: "WorkerStatus") -> None:
        self.decoder = decoder
        self.status = status

    def __getitem__(self, batch: Any) -> "HandedOver":
        self.status.begin(batch)
        found = _handed_over(self.decoder.decoded(batch))
        self.status.end()
        return found


HandedOver = bytes
"""A micro-batch on its way from the process that decoded it: where its tensors lie in shared memory, and the rest."""


def _named(error: Exception, request: SampleRequest) -> VfunError:
    """What kept a clip from being decoded, as an error that names its row.

    Raises:
        Exception: the error itself, where it is no known one.
    """
    without_memory = memory_error(error, f"{request.row}: ")
    if without_memory is not None:  # whatever a decoder made of it, the clip is not to blame
        return without_memory
    if isinstance(error, MetadataError):
        hint = f"--on-bad-sample skip trains without such clips. {_DEEP_HINT}"
        return MetadataError(f"{request.row}: {error.message}", hint=hint)
    if isinstance(error, VfunError):
        return error
    raise error


def load_held_out(
    adapter: type[ModelAdapter], request: SampleRequest, *, options: AdapterOptions, cache: Cache | None
) -> Sample:
    """A clip to validate on, decoded here.

    Raises:
        MetadataError: it cannot be decoded, which ``--on-bad-sample skip`` does not forgive: without the row, the
            held-out loss would be another number.
    """
    try:
        return load(adapter, request, options, cache)
    except MetadataError as error:
        message = f"{request.row} of those to validate on: {error.message}"
        raise MetadataError(message, hint="Encode the file again, or leave its row out.") from None


def _handed_over(loaded: LoadedBatch) -> HandedOver:
    """The micro-batch as torch would send it. What fails here fails where it can still be told: in the thread that
    feeds a queue it would only be printed, and the rank would wait for ever.
    """
    try:
        return bytes(ForkingPickler.dumps(loaded))
    except Exception as error:
        rows = ", ".join(request.row for request in loaded.batch.requests)
        told = _not_handed_over(f"{rows} were decoded and cannot be handed over: {first_line(error)}.", error)
        bad = tuple((request, told) for request in loaded.batch.requests)
        return bytes(ForkingPickler.dumps(LoadedBatch(batch=replace(loaded.batch, requests=()), samples=[], bad=bad)))


def _not_handed_over(message: str, error: Exception) -> VfunError:
    """Of shared memory, torch says what the system said, without its number."""
    if os.strerror(errno.ENOSPC) in str(error) or memory_error(error) is not None:
        return FitError(message, hint=SHARED_MEMORY_HINT)
    return RunError(message, hint="Fewer --dataloader-num-workers open fewer files; 0 hands nothing over.")


_DEEP_HINT = "All files that cannot be decoded: vfun validate-meta --deep"


@contextmanager
def _room_in_shared_memory() -> Iterator[None]:
    """Where the standard library uses /dev/shm, it is full as any other disk.

    Raises:
        FitError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise FitError("decoding processes cannot be started: /dev/shm is full.", hint=SHARED_MEMORY_HINT) from error


class WorkerStatus:
    """Which micro-batch each decoding process is at and since when, readable after its death."""

    def __init__(self, workers: int) -> None:
        # process, step, index, nanoseconds; zero where nothing is decoded
        with _room_in_shared_memory():
            self.numbers = forkserver.PROCESSES.Array("q", 4 * workers, lock=False)

    def begin(self, batch: MicroBatch) -> None:
        """Called in a decoding process."""
        self._write(os.getpid(), *batch.place, time.monotonic_ns())

    def end(self) -> None:
        """Called in a decoding process."""
        self._write(0, 0, 0, 0)

    def _write(self, *values: int) -> None:
        worker = get_worker_info()
        assert worker is not None
        self.numbers[4 * worker.id : 4 * worker.id + 4] = values

    def entries(self) -> list[tuple[int, tuple[int, int], float]]:
        """(process, place of its micro-batch, seconds at it) of every process that decodes."""
        now, four = time.monotonic_ns(), zip(*[iter(self.numbers)] * 4, strict=True)
        return [(process, (step, index), (now - since) / 1e9) for process, step, index, since in four if process]


class _PlannedBatches(Sampler[MicroBatch]):
    """The micro-batches of this rank, from the resume position on."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.batches


def load_ahead(
    adapter: type[ModelAdapter],
    options: AdapterOptions,
    batches: Iterator[MicroBatch],
    workers: int,
    on_bad_sample: str = "stop",
    cache: Cache | None = None,
    *,
    prefetch: int = MOST_AHEAD,
) -> Generator[LoadedBatch | None, None, None]:
    """Decoded micro-batches in plan order, and None whenever the next one is not there within PATIENCE; which ones, and
    in which order, is the same whatever the number of workers.

    With ``on_bad_sample`` "skip", a sample that cannot be decoded is left out. A micro-batch of which nothing is left
    comes with the samples of another one and weight 0, so that no rank makes fewer passes than the others.

    Raises:
        MetadataError: a clip that cannot be decoded, with its row; or with "skip", no clip that can.
        EnvironmentFault: an entry of the cache that cannot be read.
        FitError: a decoding process found no memory, or no room in /dev/shm.
        RunError: the decoding processes hand nothing over.
    """
    decoder = Decoder(adapter=adapter, options=options, cache=cache)
    arriving = _from_processes(decoder, batches, workers, prefetch) if workers else _from_a_thread(decoder, batches)
    with closing(arriving) as decoded:
        if on_bad_sample == "skip":
            yield from _with_substitutes(_without_errors(decoded, MetadataError))
        else:
            yield from _without_errors(decoded)


def _without_errors(decoded: "Arriving", *passed: type[VfunError]) -> "Arriving":
    """Raise the first error that is not of these kinds."""
    for loaded in decoded:
        for _, error in () if loaded is None else loaded.bad:
            if not isinstance(error, passed):
                raise error
        yield loaded


def _with_substitutes(decoded: "Arriving") -> "Arriving":
    """The nearest good micro-batch before, or at the start after, computes in place of one without samples."""
    good: LoadedBatch | None = None
    held: list[LoadedBatch] = []
    for loaded in decoded:
        if loaded is None:
            yield None
        elif loaded.samples:
            yield from (_substitute(each, loaded) for each in held)
            held, good = [], loaded
            yield loaded
        elif good is None:
            held.append(loaded)
        else:
            yield _substitute(loaded, good)
    if held:
        raise MetadataError(f"none of {len(held)} micro-batches of this rank can be decoded.", hint=_DEEP_HINT)


Arriving: TypeAlias = Iterator[LoadedBatch | None]
"""Micro-batches; None: the next one is not there yet."""


def _substitute(loaded: LoadedBatch, good: LoadedBatch) -> LoadedBatch:
    requests = replace(loaded.batch, requests=good.batch.requests)
    return replace(loaded, batch=requests, samples=good.samples, is_substitute=True)


def _from_a_thread(decoder: Decoder, batches: Iterator[MicroBatch]) -> Generator[LoadedBatch | None, None, None]:
    """Micro-batches decoded in this process, each when it is asked for."""
    for batch in batches:
        loaded = yield from patiently(partial(decoder.decoded, batch), limit=LOAD_TIMEOUT)
        yield loaded or decoder.decoded(replace(batch, fault=_too_slow()))


def patiently(work: Callable[[], T], *, limit: float = math.inf) -> Generator[None, None, T | None]:
    """What some work gives that may hang, None after ``limit`` seconds; yields whenever it is not done for PATIENCE.

    It is done in a thread, which nothing can end: one that hangs is left behind.
    """
    found: list[T] = []
    thread, began = Background("patience"), time.monotonic()
    thread.start(lambda: found.append(work()))
    while not thread.wait(PATIENCE):
        if time.monotonic() - began > limit:
            return None
        yield None
    return found[0]


def _too_slow() -> str:
    return f"decoding took longer than {LOAD_TIMEOUT} s."


def _from_processes(
    decoder: Decoder, batches: Iterator[MicroBatch], workers: int, prefetch: int
) -> Generator[LoadedBatch | None, None, None]:
    """Micro-batches from decoding processes; one that hangs or ends its process comes back with that as its fault."""
    waiting: deque[MicroBatch] = deque()
    forkserver.start(decoder.adapter.__module__)

    def handed_out(source: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in source:
            waiting.append(batch)
            yield batch

    while True:
        status = WorkerStatus(workers)
        loader = DataLoader(
            ClipDataset(decoder, status),
            batch_size=None,
            sampler=_PlannedBatches(handed_out(batches)),
            num_workers=workers,
            prefetch_factor=prefetch,
            timeout=PATIENCE,
            worker_init_fn=_start_worker,
            multiprocessing_context=forkserver.PROCESSES,
        )
        with _watched(loader, status) as (decoded, ended):
            try:
                idle = 0
                for loaded in _arriving(decoded):
                    if loaded is not None:
                        waiting.popleft()
                    idle = 0 if loaded is not None or status.entries() else idle + 1
                    if idle * PATIENCE > LOAD_TIMEOUT:
                        raise _lost(waiting[0])
                    yield loaded
                return
            except (RuntimeError, OSError, EOFError) as error:
                lost = "DataLoader worker" in str(error) or (
                    _lost_contact(error) and (yield from patiently(partial(ended.one_within, END_TIMEOUT)))
                )
                if not lost:
                    raise
                faults = _faults(status, ended, waiting)
        # Micro-batches that are not back yet are decoded again, but not those that hung or crashed.
        again = [replace(batch, fault=faults.get(batch.place)) for batch in waiting]
        batches = chain(again, batches)
        waiting.clear()


def _arriving(decoded: Iterator[HandedOver]) -> Arriving:
    """What torch's loader gives, as it was handed over; None whenever nothing came for PATIENCE.

    The process that decoded a micro-batch is asked for its tensors, and does not answer while it is stopped, or while
    a decoder hangs there that does not let Python's other threads run.
    """
    while True:
        try:
            found = next(decoded)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            yield None
        else:
            yield (yield from patiently(partial(ForkingPickler.loads, found)))


def _lost(batch: MicroBatch) -> RunError:
    """A net under all that is known to go wrong: without it, the rank would wait for ever."""
    rows = ", ".join(request.row for request in batch.requests)
    return RunError(
        f"no decoding process has been at work for {LOAD_TIMEOUT} s, and {rows} were not handed over.",
        hint="The log of this rank may say what became of them; --dataloader-num-workers 0 decodes without processes.",
    )


@dataclass
class _Ended:
    """How decoding processes ended: all of them by number, and those that were ended for being too slow."""

    processes: dict[int, Any]
    too_slow: set[int]

    def one_within(self, seconds: float) -> bool:
        """Whether a process has ended, or does so in this time."""
        return bool(wait([process.sentinel for process in self.processes.values()], timeout=seconds))


def _lost_contact(error: Exception) -> bool:
    """A micro-batch is fetched from the process that decoded it; while that one is ending, the fetch fails first."""
    return isinstance(error, (ConnectionError, FileNotFoundError, EOFError))


@contextmanager
def _watched(loader: "DataLoader[HandedOver]", status: WorkerStatus) -> Iterator[tuple[Iterator[HandedOver], _Ended]]:
    """The loader's iterator, with a thread that ends processes whose file hangs its decoder."""
    handler = signal.getsignal(signal.SIGCHLD)
    with _room_in_shared_memory():  # for the locks of its queues
        iterator = iter(loader)
    # torch would raise the death of a worker in the middle of a training step; when the next micro-batch
    # is fetched, the loader finds out by itself.
    signal.signal(signal.SIGCHLD, handler)
    # torch's own list: multiprocessing forgets a process whose first file has crashed it already
    started = list(getattr(iterator, "_workers", ()))
    ended = _Ended(processes={process.pid or 0: process for process in started}, too_slow=set())
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(1.0, LOAD_TIMEOUT / 10)):
            for number, _, seconds in status.entries():
                if seconds > LOAD_TIMEOUT and number not in ended.too_slow:
                    ended.too_slow.add(number)
                    ended.processes[number].kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield iterator, ended
    finally:
        done.set()
        watcher.join()
        for process in started:
            process.kill()  # they ignore the signal by which Python ends its helpers, and would be waited for


def _faults(status: WorkerStatus, ended: _Ended, waiting: Iterable[MicroBatch]) -> dict[tuple[int, int], str]:
    """What files did to their decoding processes, by the place of the micro-batch.

    Args:
        waiting: what was to be decoded.

    Raises:
        FitError: a decoding process was ended for want of memory.
        RunError: by something else.
    """
    faults: dict[tuple[int, int], str] = {}
    places = {number: place for number, place, _ in status.entries()}
    for number, process in ended.processes.items():
        if number in ended.too_slow:
            faults[places[number]] = _too_slow()
        elif process.exitcode is not None and -process.exitcode in FAULTS_OF_FILES and number in places:
            faults[places[number]] = f"the decoder crashed ({signal.Signals(-process.exitcode).name})."
    if faults:
        return faults
    codes = {number: process.exitcode for number, process in ended.processes.items() if process.exitcode}
    rows = [r.row for batch in waiting for r in batch.requests if batch.place in map(places.get, codes)]
    said = f"a decoding process ended with exit status {', '.join(map(str, sorted(set(codes.values())))) or '0'}"
    message = said + (f" while it was at {', '.join(rows)}" if rows else "")
    if -signal.SIGBUS in codes.values():
        raise FitError(f"{message}: /dev/shm is full, or a file was cut while it was read.", hint=SHARED_MEMORY_HINT)
    if -signal.SIGKILL in codes.values():
        raise FitError(f"{message}: the host probably ran out of memory.", hint=HOST_HINT)
    raise RunError(f"{message}.", hint="The log of this rank may say why.")


def _start_worker(worker: int) -> None:
    """One thread a worker: with 8 workers a rank, more only fight over the cores."""
    torch.set_num_threads(1)
    leave_signals_to_the_rank()


def batch_keys(requests: Sequence[SampleRequest]) -> list[Any]:
    """The sample keys of a micro-batch."""
    return [request.key for request in requests]
