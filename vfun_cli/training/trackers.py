"""Where the curves of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, SwanLab."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vfun_cli.config.options import RunConfig
from vfun_cli.modeling.media.animation import animation
from vfun_cli.run.rundir import RunDir


class Tracker(Protocol):
    """Takes the record of each step."""

    def log(self, record: dict[str, Any]) -> None:
        """Note one step."""

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Note other numbers of a step, by their full names."""

    def log_videos(self, files: Sequence[Path], step: int) -> None:
        """Show videos and pictures of a step."""

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

        self.writer = SummaryWriter(str(run.tensorboard(config.logging_dir)))

    def log(self, record: dict[str, Any]) -> None:
        """The curves; what is not known leaves a gap."""
        for name in CURVES:
            if record[name] is not None:
                self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_videos(self, files: Sequence[Path], step: int) -> None:
        """An image each, which moves: TensorBoard has no other videos."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for file in files:
            width, height, content = animation(file)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            value = Summary.Value(tag=f"samples/{file.stem}", image=image)
            self.writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        import wandb

        folder = run.trackers(config.logging_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.session = wandb.init(
            project=config.tracker_project_name, dir=str(folder), config=config.to_json(), resume="allow"
        )

    def log(self, record: dict[str, Any]) -> None:
        """Everything."""
        self.session.log({f"train/{name}": value for name, value in record.items()}, step=record["step"])

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        self.session.log(dict(values), step=step)

    def log_videos(self, files: Sequence[Path], step: int) -> None:
        """Videos, which play, and pictures."""
        import wandb

        kinds = {".mp4": lambda file: wandb.Video(str(file), format="mp4"), ".png": lambda file: wandb.Image(str(file))}
        self.session.log({f"samples/{file.stem}": kinds[file.suffix](file) for file in files}, step=step)

    def close(self) -> None:
        """End the session."""
        self.session.finish()


class SwanLab:
    """An experiment of a project."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        import swanlab

        folder = run.trackers(config.logging_dir) / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self.session = swanlab.init(project=config.tracker_project_name, log_dir=str(folder), config=config.to_json())

    def log(self, record: dict[str, Any]) -> None:
        """The curves; what is not known leaves a gap."""
        known = {f"train/{name}": record[name] for name in CURVES if record[name] is not None}
        self.session.log(known, step=record["step"])

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        self.session.log(dict(values), step=step)

    def log_videos(self, files: Sequence[Path], step: int) -> None:
        """GIFs, the videos that SwanLab takes, and pictures."""
        import swanlab

        kinds = {".mp4": lambda file: swanlab.Video(animation(file)[2]), ".png": lambda file: swanlab.Image(str(file))}
        self.session.log({f"samples/{file.stem}": kinds[file.suffix](file) for file in files}, step=step)

    def close(self) -> None:
        """End the session."""
        self.session.finish()


TRACKERS: dict[str, Callable[[RunDir, RunConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "swanlab": SwanLab,
}
"""By the names of ``RunConfig.trackers``."""
