"""Every path of a run directory, and the rules about using one."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli.errors import CheckpointError, EnvironmentFault

DESCRIBES = ("command", "family", "config", "metadata_sha256")
"""What every run.json states."""


@dataclass(frozen=True)
class RunDir:
    """One run on disk; nothing else builds paths inside it."""

    root: Path

    @property
    def run_json(self) -> Path:
        """Resolved options; enough to repeat the run."""
        return self.root / "run.json"

    @property
    def plan_json(self) -> Path:
        """Digest and summary of the plan."""
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """What the launcher and each rank said."""
        return self.root / "logs"

    @property
    def sanity_check(self) -> Path:
        """The first batch as people can look at it."""
        return self.root / "sanity_check"

    @property
    def stop_request(self) -> Path:
        """Its presence asks all ranks to save and stop at the next step boundary."""
        return self.logs / "stop-request"

    @property
    def outcome(self) -> Path:
        """How the ranks ended without an error."""
        return self.logs / "outcome.json"

    def launch(self, machine_rank: int = 0) -> Path:
        """Generated launch files of one machine."""
        return self.root / ("launch" if machine_rank == 0 else f"launch-machine-{machine_rank}")

    def clips(self, machine_rank: int = 0) -> Path:
        """The checked clip table that the plan is made from."""
        return self.launch(machine_rank) / "clips.npz"

    def fill_report(self, rank: int) -> Path:
        """What a rank did that filled a cache."""
        return self.logs / f"filled-rank-{rank}.json"

    def fill_reports(self) -> list[Path]:
        """Those that are there."""
        return sorted(self.logs.glob("filled-rank-*.json"))

    def rank_error(self, rank: int) -> Path:
        """The error that ended a rank."""
        return self.logs / f"error-rank-{rank}.json"

    def rank_error_space(self, rank: int) -> Path:
        """Room on the disk for that error, taken while there is some."""
        return self.logs / f".error-rank-{rank}.space"

    def rank_error_spaces(self) -> list[Path]:
        """Those of ranks that were killed."""
        return sorted(self.logs.glob(".error-rank-*.space"))

    def rank_errors(self) -> list[Path]:
        """Those that are there."""
        return sorted(self.logs.glob("error-rank-*.json"))

    def rank_log(self, rank: int) -> Path:
        """Output of a rank other than 0."""
        return self.logs / f"rank-{rank}.log"

    def launcher_log(self, machine_rank: int = 0) -> Path:
        """Output of the launcher and of rank 0."""
        return self.logs / ("launcher.log" if machine_rank == 0 else f"launcher-machine-{machine_rank}.log")

    def checkpoint(self, step: int) -> Path:
        """A complete checkpoint."""
        return self.root / f"checkpoint-{step}"

    def partial_checkpoint(self, step: int) -> Path:
        """The same checkpoint while it is being written."""
        return self.root / f".checkpoint-{step}.partial"

    def replaced_checkpoint(self, step: int) -> Path:
        """An earlier checkpoint of the same step, on its way out."""
        return self.root / f".checkpoint-{step}.replaced"

    @property
    def staging(self) -> Path:
        """Where a checkpoint waits in this machine's memory while it is written in the background."""
        return Path("/dev/shm") / f"vfun-{hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]}"

    def remove_leftovers(self, machine_rank: int) -> None:
        """Delete what a crash left of checkpoints that were being written or removed; no process may be at work."""
        shutil.rmtree(self.staging, ignore_errors=True)
        if machine_rank != 0:
            return  # the first machine looks after the directory that all share
        for leftover in self.root.glob(".checkpoint-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.run_json.exists()

    def read_run(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if not self.run_json.is_file():
            raise CheckpointError(
                f"{self.root} holds no run: there is no run.json in it.",
                hint="Name the output directory of a run, or one of its checkpoints.",
            )
        return read_description(self.run_json)


def read_description(run_json: Path) -> dict[str, Any]:
    """What a launch wrote for its training processes and for its continuation.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = json.loads(run_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{run_json} is not valid JSON: {error}.") from None
    missing = [name for name in DESCRIBES if not isinstance(content, dict) or name not in content]
    if missing:
        raise CheckpointError(f"{run_json} is not what vfun writes: it states no {', '.join(missing)}.")
    return dict(content)


def ensure_writable(folder: Path) -> None:
    """Create the folder if need be.

    Raises:
        EnvironmentFault: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".vfun-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write to {folder}: {error.strerror or error}.",
            hint="Choose another directory with --output-dir, or mend its permissions.",
        ) from None


def clear(run: RunDir) -> None:
    """Make room for a new run: delete what a run wrote, and only that: other files in the directory stay."""
    for path in (run.run_json, run.plan_json, run.metrics):
        path.unlink(missing_ok=True)
    folders = [
        run.logs,
        run.sanity_check,
        *run.root.glob("launch*"),
        *run.root.glob("checkpoint-*"),
        *run.root.glob(".checkpoint-*"),
    ]
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")  # several hosts may write at once, and share pids
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
