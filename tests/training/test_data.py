"""Loading ahead: the plan's order, bad samples by name, files that hang or crash their decoder."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_sharer
from typing import Any

import pytest
import torch

from vfun_cli.errors import FitError, MetadataError, RunError, VfunError
from vfun_cli.modeling.adapter import Input, Inputs, SampleRequest
from vfun_cli.modeling.inputs import Decoder
from vfun_cli.modeling.media.faults import undecodable
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.data import loader as data
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch, WorkerStatus, load_ahead


def request(row: int) -> SampleRequest:
    return SampleRequest(
        key=SampleKey(seed=0, epoch=0, row=row), record={}, kind="video", frames=4, height=16, width=16, stride=1,
        total_frames=10, fps=(25, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class NotHandedOver:
    """Decoded, but no queue takes it."""

    cause: str

    def __reduce__(self) -> Any:
        raise RuntimeError(self.cause)


@dataclass(frozen=True)
class Row:
    """A row as its number; ``faults`` say which rows are broken, and how."""

    row: int
    faults: Any

    def load(self, decoder: Decoder) -> Any:
        if self.row in self.faults.get("broken", ()):
            raise MetadataError(f"{self.row}.mp4: frame 3 cannot be decoded")
        if self.row in self.faults.get("without_memory", ()):
            raise undecodable("clip.mp4", 0, MemoryError("12 GiB")) from MemoryError("12 GiB")
        if self.row in self.faults.get("not_handed_over", {}):
            return NotHandedOver(self.faults["not_handed_over"][self.row])
        if self.row in self.faults.get("hanging", ()):
            time.sleep(600)
        if self.row in self.faults.get("losing_contact", ()):
            time.sleep(0.2)  # the row before is on offer by then
            resource_sharer.stop()  # and can no longer be fetched
            time.sleep(3)
        if self.row in self.faults.get("crashing", {}):
            os.kill(os.getpid(), self.faults["crashing"][self.row])
        return torch.full((1,), float(self.row))


class Decoder:
    """Takes nothing but pixels."""

    @staticmethod
    def inputs(request: SampleRequest, options: Mapping[str, Any]) -> Inputs:
        return {"pixels": Input(encoder="vae", lazy=Row(request.key.row, dict(options)))}


@pytest.fixture(autouse=True)
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its processes live is all that most of these tests would wait for."""
    monkeypatch.setattr(data, "PATIENCE", 0.3)


def stream(*batches: tuple[int, ...]) -> Iterator[MicroBatch]:
    for step, rows in enumerate(batches):
        yield MicroBatch(epoch=0, step=step, index=0, requests=tuple(map(request, rows)))


def loaded(batches: Iterator[MicroBatch], workers: int, on_bad: str = "stop", **options: Any) -> list[LoadedBatch]:
    return list(arrived(load_ahead(Decoder, options, batches, workers, on_bad)))  # type: ignore[arg-type]


def arrived(batches: Iterable[LoadedBatch | None]) -> Iterator[LoadedBatch]:
    return (batch for batch in batches if batch is not None)


def values(batch: LoadedBatch) -> list[int]:
    return [int(sample.values["pixels"]) for sample in batch.samples]


def outcome(batches: list[LoadedBatch]) -> list[tuple[list[int], float, list[int]]]:
    """What each micro-batch computes, what it counts, which rows were skipped."""
    return [(values(batch), batch.weight, [request.key.row for request, _ in batch.bad]) for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 3])
def test_micro_batches_come_in_the_order_of_the_plan(workers: int) -> None:
    found = loaded(stream(*[(n, 100 + n) for n in range(10)]), workers)
    assert [values(batch) for batch in found] == [[n, 100 + n] for n in range(10)]
    assert [batch.batch.step for batch in found] == list(range(10))
    assert all(batch.weight == 1 and batch.trained == batch.batch.requests for batch in found)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_however_slow_the_steps_are_no_more_is_decoded_than_two_micro_batches_a_process(workers: int) -> None:
    drawn = 0

    def counted() -> Iterator[MicroBatch]:
        nonlocal drawn
        for batch in stream(*[(n,) for n in range(20)]):
            drawn += 1
            yield batch

    batches = load_ahead(Decoder, {}, counted(), workers)  # type: ignore[arg-type]
    for taken in range(1, 6):
        next(arrived(batches))
        time.sleep(0.05)  # enough for a process to decode many of these
        assert drawn - taken <= 2 * workers
    batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_the_run_with_its_row(workers: int) -> None:
    with pytest.raises(MetadataError, match=r"row 5: 5\.mp4: frame 3") as caught:
        loaded(stream((4,), (5,), (6,)), workers, broken=(5,))
    assert "--on-bad-sample skip" in str(caught.value.hint)
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []  # a rank that fails must not wait for them for ever


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_keeps_every_pass_and_counts_nothing_for_what_is_missing(workers: int) -> None:
    found = loaded(stream((0,), (1,), (2, 3, 4, 5), (6,)), workers, "skip", broken=(1, 3, 6))
    assert outcome(found) == [
        ([0], 1.0, []),
        ([0], 0.0, [1]),  # the micro-batch before stands in
        ([2, 4, 5], 0.75, [3]),
        ([2, 4, 5], 0.0, [6]),
    ]
    assert [batch.batch.step for batch in found] == [0, 1, 2, 3]
    for batch in found:
        assert [request.key.row for request in batch.batch.requests] == values(batch)
    assert [len(batch.trained) for batch in found] == [1, 0, 3, 0]


def test_at_the_start_the_first_good_micro_batch_stands_in() -> None:
    found = loaded(stream((0,), (1,), (2,)), 0, "skip", broken=(0, 1))
    assert outcome(found) == [([2], 0.0, [0]), ([2], 0.0, [1]), ([2], 1.0, [])]


def test_skipping_everything_is_an_error() -> None:
    with pytest.raises(MetadataError, match="none of 2 micro-batches"):
        loaded(stream((0,), (1,)), 0, "skip", broken=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_file_that_hangs_its_decoder_is_named_or_skipped(
    on_bad: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LOAD_TIMEOUT", 3)
    batches = stream((0,), (1,), (2,), (3,), (4,))
    if on_bad == "stop":
        with pytest.raises(MetadataError, match="row 2: decoding took longer than 3 s"):
            loaded(batches, workers, on_bad, hanging=(2,))
        return
    found = loaded(batches, workers, on_bad, hanging=(2,))
    assert outcome(found) == [([0], 1.0, []), ([1], 1.0, []), ([1], 0.0, [2]), ([3], 1.0, []), ([4], 1.0, [])]


@pytest.mark.slow
@pytest.mark.parametrize(("on_bad", "row"), [("stop", 0), ("skip", 0), ("skip", 3)])
def test_a_file_that_crashes_its_decoder_is_named_or_skipped(on_bad: str, row: int) -> None:
    batches = stream(*((n,) for n in range(6)))
    if on_bad == "stop":
        with pytest.raises(MetadataError, match=f"row {row}: the decoder crashed"):
            loaded(batches, 2, on_bad, crashing={row: signal.SIGSEGV})
        return
    found = loaded(batches, 2, on_bad, crashing={row: signal.SIGSEGV})
    assert [batch.weight for batch in found] == [float(n != row) for n in range(6)]
    assert [values(batch) for batch in found if batch.weight] == [[n] for n in range(6) if n != row]


@pytest.mark.slow
def test_a_micro_batch_that_cannot_be_fetched_from_an_ending_process_is_decoded_again() -> None:
    options = {"losing_contact": {3}, "crashing": {3: signal.SIGSEGV}}
    found = []
    batches = load_ahead(Decoder, options, stream(*((n,) for n in range(6))), 2, "skip")  # type: ignore[arg-type]
    for batch in arrived(batches):
        found.append(batch)
        time.sleep(1)  # the next one is fetched when the other process has gone on to row 3
    assert [values(batch) for batch in found if batch.weight] == [[n] for n in range(6) if n != 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "ran out of memory"), (signal.SIGBUS, "/dev/shm is full")]
)
def test_a_decoding_process_without_memory_is_not_the_fault_of_its_file(number: int, said: str) -> None:
    with pytest.raises(FitError, match=rf"exit status -{number} while it was at row 1: .*{said}") as caught:
        loaded(stream((0,), (1,)), 2, "skip", crashing={1: number})
    assert "--dataloader-num-workers" in str(caught.value.hint)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_without_memory_is_not_the_fault_of_its_file(workers: int) -> None:
    with pytest.raises(FitError, match=r"row 1: out of the host's memory"):
        loaded(stream((0,), (1,)), workers, "skip", without_memory=(1,))


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", FitError),
        ("cannot pickle", RunError),
    ],
)
def test_what_cannot_be_handed_over_is_an_error_that_names_rows_and_cause(cause: str, kind: type[VfunError]) -> None:
    with pytest.raises(
        kind, match=rf"row 1, row 2 were decoded and cannot be handed over: {re.escape(cause)}"
    ) as caught:
        loaded(stream((0,), (1, 2)), 1, "skip", not_handed_over={2: cause})
    assert type(caught.value) is kind and "--dataloader-num-workers" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_that_waits_for_clips_can_be_asked_things_meanwhile(workers: int) -> None:
    batches = load_ahead(Decoder, {"hanging": (0,)}, stream((0,), (1,)), workers)  # type: ignore[arg-type]
    assert [next(batches), next(batches)] == [None, None]
    batches.close()
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_decoding_processes_that_are_idle_and_hand_nothing_over_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LOAD_TIMEOUT", 1)
    monkeypatch.setattr(WorkerStatus, "entries", lambda status: [])  # it hangs, and seems to be idle
    with pytest.raises(RunError, match=r"row 0, row 7 were not handed over"):
        loaded(
            stream(
                (0, 7),
            ),
            1,
            hanging=(7,),
        )
