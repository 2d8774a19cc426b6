"""Where the curves of a run go beside metrics.jsonl: TensorBoard or Weights & Biases."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vfun_cli.config.options import RunConfig
from vfun_cli.run.rundir import RunDir


class Tracker(Protocol):
    """Takes the record of each step."""

    def log(self, record: dict[str, Any]) -> None:
        """Note one step."""

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Note other numbers of a step, by their full names."""

    def close(self) -> None:
        """Write what is still held back."""


CURVES = (
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


class TensorBoard:
    """Event files below the run's logs."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.tensorboard))

    def log(self, record: dict[str, Any]) -> None:
        """The curves; what is not known leaves a gap."""
        for name in CURVES:
            if record[name] is not None:
                self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the project ``vfun``."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        import wandb

        self.session = wandb.init(project="vfun", dir=str(run.logs), config=config.to_json(), resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        """Everything."""
        self.session.log({f"train/{name}": value for name, value in record.items()}, step=record["step"])

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        self.session.log(dict(values), step=step)

    def close(self) -> None:
        """End the session."""
        self.session.finish()


TRACKERS: dict[str, Callable[[RunDir, RunConfig], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the value of ``report_to``; any other keeps ``metrics.jsonl`` alone."""
