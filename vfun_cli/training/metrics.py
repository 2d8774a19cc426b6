"""What rank 0 records of the run: a line of metrics.jsonl for every step, and now and then a line for people."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vfun_cli.config.options import RunConfig
from vfun_cli.modeling.transfer import Clock
from vfun_cli.plan.flops import Costs
from vfun_cli.run.metrics_file import MetricsFile, only_reports
from vfun_cli.run.ownership import noting
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch
from vfun_cli.training.sanity_check import write_first_batch
from vfun_cli.training.trackers import TRACKERS, Tracker

LINE_EVERY = 5.0
"""Seconds between progress lines."""


class Measured(NamedTuple):
    """What a rank knows of its own step when it hands it to the device; gathered from all ranks as numbers."""

    flops: float
    """Model FLOPs of its micro-batches."""
    tokens: float
    """Tokens computed."""
    substitute_tokens: float
    """Those of substitute micro-batches, which train nothing."""
    samples: float
    """Clips trained on."""
    waited: float
    """Seconds the micro-batches were not there yet."""
    memory: float
    """Most bytes so far: of the device's memory, or of this process's on a CPU."""
    graphs: float
    """What torch.compile has made so far."""


class Metrics:
    """Writes what happened; on other ranks than 0 it only keeps time."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        *,
        costs: Costs,
        peak_flops: float | None,
        device: torch.device,
        writes: bool,
        first_step: int,
        total_steps: int,
    ) -> None:
        self.run, self.config, self.costs, self.peak_flops = run, config, costs, peak_flops
        self.device, self.writes = device, writes
        self.total_steps = total_steps
        self.clock = Clock(device)
        self.free_since = self.clock.mark()
        """When the device was done with the step before, or with a checkpoint."""
        self.waited = 0.0
        self.last_line = 0.0
        self.done_share, self.done_seconds = 0.0, 0.0
        self.file: MetricsFile | None = None
        self.trackers: dict[str, Tracker] = {}
        if writes:
            self.file = MetricsFile(run.metrics, last_step=first_step)
            for name in config.trackers:
                with only_reports(f"{name} cannot be started"), noting(run, run.tensorboard(config.logging_dir)):
                    self.trackers[name] = TRACKERS[name](run, config)

    def wait(self, batches: Iterator[LoadedBatch | None]) -> LoadedBatch | None:
        """The next micro-batch, None if it is not there yet, counting the seconds it was not there yet."""
        started = time.perf_counter()
        loaded = next(batches)
        self.waited += time.perf_counter() - started
        return loaded

    def measure(self, micro_batches: list[LoadedBatch]) -> Measured:
        """What this rank contributes to the step it is about to start; cheap, on every rank."""
        flops, tokens, substitute, samples = 0.0, 0, 0, 0
        for loaded in micro_batches:
            for request in loaded.batch.requests:
                cost = self.costs.of(request.frames, request.height, request.width)
                flops += cost.flops
                tokens += cost.tokens
                substitute += cost.tokens * loaded.is_substitute
            samples += len(loaded.trained)
        waited, self.waited = self.waited, 0.0
        return Measured(flops, tokens, substitute, samples, waited, _memory(self.device), _compiled_graphs())

    def step(
        self,
        step: int,
        micro_batches: list[LoadedBatch],
        *,
        loss: float,
        rate: float,
        grad_norm: float | None,
        masked_tokens: float,
        ranks: list[Measured],
        began: Any,
        ended: Any,
    ) -> None:
        """Record optimizer step ``step`` (from 1), which the device has finished.

        ``ranks`` is what each rank measured, ``began`` and ``ended`` are marks of the clock. ``masked_tokens`` are
        those of all ranks that the model masks.
        """
        seconds, before = self.clock.seconds(began, ended), self.clock.seconds(self.free_since, began)
        self.free_since = ended
        if self.file is None:
            return
        whole, first = max(seconds + before, 1e-9), micro_batches[0].batch
        record = {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": first.epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "seconds": round(seconds, 4),
            **_waiting(ranks, before, whole),
            **_throughput(ranks, whole, self.peak_flops, masked_tokens),
            "seconds_left": self._seconds_left(step, first.share, whole),
        }
        self.file.write(record)
        self._track(step, lambda tracker: tracker.log(record))
        self._say(record)

    def _track(self, step: int, log: Callable[[Tracker], None]) -> None:
        """One failure is enough: a service that is gone may take its time to say so."""
        for name, tracker in [*self.trackers.items()]:
            with only_reports(f"{name} took no record of step {step}") as failed:
                log(tracker)
            if failed:
                del self.trackers[name]

    def _say(self, record: Mapping[str, Any]) -> None:
        """A line for the log, every few seconds and at the end."""
        if time.monotonic() - self.last_line <= LINE_EVERY and record["step"] != self.total_steps:
            return
        self.last_line = time.monotonic()
        mfu = "" if record["mfu"] is None else f"  mfu {100 * record['mfu']:.1f}%"
        print(
            f"step {record['step']}/{self.total_steps}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"{record['tokens_per_second']:.0f} tokens/s{mfu}",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def looking(self) -> Iterator[None]:
        """A validation, whose time is no step's."""
        yield
        self.free_since = self.clock.mark()

    def held_out(self, record: dict[str, Any]) -> None:
        """Record a held-out loss, as a curve for each quantile too, and say it."""
        if self.file is None:
            return
        self.file.write(record)
        step, loss, weights = record["step"], record["loss"], record["weights"]
        name = "held-out" if weights == "trained" else f"held-out-{weights}"
        by_quantile = zip(record["quantiles"], record["by_quantile"], strict=True)
        values = {f"{name}/loss": loss, **{f"{name}/q{quantile}": value for quantile, value in by_quantile}}
        self._track(step, lambda tracker: tracker.log_values(values, step))
        print(
            f"step {step}/{self.total_steps}  {name} loss {loss:.4f} of {record['rows']} rows",
            file=sys.stderr,
            flush=True,
        )

    def tell(self, text: str) -> None:
        """A line for the log about what takes long, every few seconds."""
        if self.file is not None and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def samples(self, step: int, videos: Sequence[Path], failed: Mapping[str, str], seconds: float) -> None:
        """Record that videos were made, show them, and say which were not and why."""
        if self.file is None:
            return
        record = {"event": "samples", "step": step, "made": len(videos), "failed": dict(failed)}
        self.file.write({**record, "seconds": round(seconds, 3)})
        self._track(step, lambda tracker: tracker.log_videos(videos, step))
        print(
            f"step {step}/{self.total_steps}  {len(videos)} samples in {self.run.samples(step)}",
            file=sys.stderr,
            flush=True,
        )
        for name, reason in failed.items():
            print(f"warning: no sample {name}: {reason}.", file=sys.stderr, flush=True)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Note how long a checkpoint held the run up."""
        started = time.perf_counter()
        yield
        self.free_since = self.clock.mark()
        self.event({"event": "checkpoint", "step": step, "seconds": round(time.perf_counter() - started, 3)})

    def event(self, record: dict[str, Any] | None) -> None:
        """Write something other than a step; what has ``"agree": false`` is said aloud too."""
        if self.file is None or record is None:
            return
        self.file.write(record)
        if record.get("agree") is False:
            print(f"warning: epoch {record['epoch']} was not trained as planned: {record}", file=sys.stderr, flush=True)

    def show_first_batch(self, loaded: LoadedBatch) -> None:
        """Write what the encoders see of the first samples of rank 0 as files that people can look at."""
        if self.writes:
            what = f"the first batch cannot be written to {self.run.sanity_check}"
            with only_reports(what), noting(self.run, self.run.sanity_check):
                write_first_batch(self.run, loaded)

    def close(self) -> None:
        """Flush and close everything."""
        if self.file is not None:
            self.file.close()
        for name, tracker in self.trackers.items():
            with only_reports(f"{name} could not be closed"):
                tracker.close()

    def _seconds_left(self, step: int, share: float, seconds: float) -> float:
        """Steps to come at the time a mean step takes; a moving average would swing with the mix of buckets."""
        self.done_share += share
        self.done_seconds += seconds
        return round((self.total_steps - step) * self.done_seconds / self.done_share, 1)


def _waiting(ranks: list[Measured], before: float, whole: float) -> dict[str, float]:
    """Seconds that rank 0, and the slowest rank, waited for clips before a step, and rank 0's share of the step."""
    # While the host waits for the next clips, the device may still be busy with the last ones.
    waited = min(ranks[0].waited, before)
    return {
        "data_wait": round(waited, 4),
        "data_wait_share": round(waited / whole, 4),
        "data_wait_slowest": round(max(rank.waited for rank in ranks), 4),
    }


def _throughput(ranks: list[Measured], whole: float, peak_flops: float | None, masked_tokens: float) -> dict[str, Any]:
    """What all ranks computed in ``whole`` seconds, and how evenly."""
    flops, tokens = sum(rank.flops for rank in ranks), sum(rank.tokens for rank in ranks)
    achieved = flops / whole / len(ranks)
    return {
        "tokens": int(tokens),
        "tokens_per_second": round(tokens / whole, 1),
        "samples_per_second": round(sum(rank.samples for rank in ranks) / whole, 3),
        "tflops": float(f"{achieved / 1e12:.4g}"),
        "mfu": None if peak_flops is None else round(achieved / peak_flops, 4),
        "mean_over_max_flops": round(flops / len(ranks) / max(rank.flops for rank in ranks), 4),
        "padding": round((sum(rank.substitute_tokens for rank in ranks) + masked_tokens) / tokens, 4),
        "memory_bytes": int(max(rank.memory for rank in ranks)),
        "compiled_graphs": int(max(rank.graphs for rank in ranks)),
    }


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; nothing is imported to find out that there are none."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else compiler.counters["stats"]["unique_graphs"]
