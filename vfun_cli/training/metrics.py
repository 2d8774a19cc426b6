"""What rank 0 tells about the run: metrics.jsonl, TensorBoard or W&B, a line every few seconds, the first batch."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vfun_cli.config.options import RunConfig
from vfun_cli.modeling import media
from vfun_cli.modeling.inputs import load_inputs
from vfun_cli.modeling.transfer import Clock
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch
from vfun_cli.training.meter import Costs

LINE_EVERY = 5.0
"""Seconds between progress lines."""


class Measured(NamedTuple):
    """What a rank knows of its own step when it hands it to the device; gathered from all ranks as numbers."""

    flops: float
    """Model FLOPs of its micro-batches."""
    tokens: float
    """Tokens computed."""
    idle_tokens: float
    """Those of samples that stand in for others and train nothing."""
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
        self.run, self.costs, self.peak_flops, self.device, self.writes = run, costs, peak_flops, device, writes
        self.total_steps = total_steps
        self.clock = Clock(device)
        self.free_since = self.clock.mark()
        """When the device was done with the step before, or with a checkpoint."""
        self.waited = 0.0
        self.last_line = 0.0
        self.done_share, self.done_seconds = 0.0, 0.0
        self.file = None
        self.trackers: list[Any] = []
        if writes:
            _drop_later_steps(run.metrics, first_step)
            self.file = run.metrics.open("a", encoding="utf-8", buffering=1)
            self.trackers = [_TRACKERS[config.report_to](run, config)] if config.report_to in _TRACKERS else []

    def wait(self, batches: Iterator[LoadedBatch]) -> LoadedBatch:
        """The next micro-batch, counting the seconds it was not there yet."""
        started = time.perf_counter()
        loaded = next(batches)
        self.waited += time.perf_counter() - started
        return loaded

    def measure(self, micro_batches: list[LoadedBatch]) -> Measured:
        """What this rank contributes to the step it is about to start; cheap, on every rank."""
        flops, tokens, idle, samples = 0.0, 0, 0, 0
        for loaded in micro_batches:
            for request in loaded.batch.requests:
                cost = self.costs.of(request.frames, request.height, request.width)
                flops += cost.flops
                tokens += cost.tokens
                idle += cost.tokens * loaded.is_substitute
            samples += len(loaded.trained)
        waited, self.waited = self.waited, 0.0
        return Measured(flops, tokens, idle, samples, waited, _memory(self.device), _compiled_graphs())

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
        those of all ranks that the model was told to overlook.
        """
        seconds, before = self.clock.seconds(began, ended), self.clock.seconds(self.free_since, began)
        self.free_since = ended
        if self.file is None:
            return
        whole = max(seconds + before, 1e-9)
        flops, tokens = sum(rank.flops for rank in ranks), sum(rank.tokens for rank in ranks)
        achieved = flops / whole / len(ranks)
        # While the host waits for the next clips, the device may still be busy with the last ones.
        waited = min(ranks[0].waited, before)
        record = {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": micro_batches[0].batch.epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "seconds": round(seconds, 4),
            "data_wait": round(waited, 4),
            "data_wait_share": round(waited / whole, 4),
            "data_wait_slowest": round(max(rank.waited for rank in ranks), 4),
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / whole, 1),
            "samples_per_second": round(sum(rank.samples for rank in ranks) / whole, 3),
            "tflops": float(f"{achieved / 1e12:.4g}"),
            "mfu": None if self.peak_flops is None else round(achieved / self.peak_flops, 4),
            "mean_over_max_flops": round(flops / len(ranks) / max(rank.flops for rank in ranks), 4),
            "padding": round((sum(rank.idle_tokens for rank in ranks) + masked_tokens) / tokens, 4),
            "memory_bytes": int(max(rank.memory for rank in ranks)),
            "compiled_graphs": int(max(rank.graphs for rank in ranks)),
            "seconds_left": self._seconds_left(step, micro_batches[0].batch.share, whole),
        }
        self.file.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.log(record)
        if time.monotonic() - self.last_line > LINE_EVERY or step == self.total_steps:
            self.last_line = time.monotonic()
            mfu = "" if record["mfu"] is None else f"  mfu {100 * achieved / (self.peak_flops or 1):.1f}%"
            print(
                f"step {step}/{self.total_steps}  loss {loss:.4f}  lr {rate:.2e}  "
                f"{record['tokens_per_second']:.0f} tokens/s{mfu}",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Note how long a checkpoint held the run up."""
        started = time.perf_counter()
        yield
        self.free_since = self.clock.mark()
        self.event({"event": "checkpoint", "step": step, "seconds": round(time.perf_counter() - started, 3)})

    def event(self, record: Mapping[str, Any] | None) -> None:
        """Write something other than a step; what has ``"agree": false`` is said aloud too."""
        if self.file is None or record is None:
            return
        self.file.write(json.dumps(record) + "\n")
        if record.get("agree") is False:
            print(f"warning: epoch {record['epoch']} was not trained as planned: {record}", file=sys.stderr, flush=True)

    def show_first_batch(self, loaded: LoadedBatch) -> None:
        """Write what the encoders see of the first samples of rank 0 as files that people can look at."""
        if not self.writes:
            return
        for number, (sample, request) in enumerate(zip(loaded.samples, loaded.batch.requests, strict=True)):
            values = load_inputs({name: each.lazy for name, each in sample.inputs.items()})
            for name, value in values.items():
                stem = self.run.sanity_check / f"sample-{number}-{name}"
                _write_value(stem, value, Fraction(*request.fps) / request.stride)

    def close(self) -> None:
        """Flush and close everything."""
        if self.file is not None:
            self.file.close()
        for tracker in self.trackers:
            tracker.close()

    def _seconds_left(self, step: int, share: float, seconds: float) -> float:
        """Steps to come at the time a mean step takes; a moving average would swing with the mix of buckets."""
        self.done_share += share
        self.done_seconds += seconds
        return round((self.total_steps - step) * self.done_seconds / self.done_share, 1)


def _write_value(stem: Path, value: Any, fps: Fraction) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, tuple):
        for part in value:
            _write_value(stem, part, fps)
    elif isinstance(value, str):
        stem.with_suffix(".txt").write_text(value + "\n", encoding="utf-8")
    elif isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 3:
        if value.shape[0] == 1:
            media.write_png(stem.with_suffix(".png"), value[0])
        else:
            media.write_video(stem.with_suffix(".mp4"), value, fps)
    elif isinstance(value, torch.Tensor) and value.ndim == 1:
        media.write_wav(stem.with_suffix(".wav"), value.numpy(), 16000)


def _drop_later_steps(path: Path, first_step: int) -> None:
    """A resumed run writes the steps after its checkpoint again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line).get("step", 0) <= first_step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; nothing is imported to find out that there are none."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else compiler.counters["stats"]["unique_graphs"]


_CURVES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "samples_per_second",
    "tflops",
    "mfu",
    "data_wait",
    "memory_bytes",
)


class _TensorBoard:
    def __init__(self, run: RunDir, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.logs / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for name in _CURVES:
            if record[name] is not None:
                self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run: RunDir, config: RunConfig) -> None:
        import wandb

        self.session = wandb.init(project="vfun", dir=str(run.logs), config=config.to_json(), resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        self.session.log({f"train/{name}": value for name, value in record.items()}, step=record["step"])

    def close(self) -> None:
        self.session.finish()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}
