"""Every path of a run directory, and the rules about using one."""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli import console
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.state import LAYOUTS, options
from vfun_cli.disks import abilities
from vfun_cli.errors import CheckpointError, EnvironmentFault
from vfun_cli.files import open_bounded
from vfun_cli.metadata.stored import unfinished
from vfun_cli.typed_json import (
    LARGEST_FILE,
    Check,
    file_path,
    flag,
    items,
    mapping,
    number,
    one_of,
    optional,
    read_object,
    record,
    text,
    whole,
)

_SAMPLE = re.compile(r"(row|prompt)-\d+(-ema)?\.(json|mp4|png)|\.(row|prompt)-\d+(-ema)?\.(json\.[0-9a-f]{16}|mp4|png)")

DESCRIBES: Mapping[str, Check] = {
    "command": one_of("train", "lora", "cache"),
    "family": text(),
    "config": options("pretrained_model_name_or_path", data="train_data_meta"),
    "metadata_sha256": text(),
    "id": optional(text()),
    "most": optional(record({"num_processes": whole(1), "num_machines": whole(1)})),
    "staging": optional(file_path),
    "directory": optional(items(whole())),
    "sources": optional(mapping(text())),
    "contents": optional(mapping(text())),
    "allowed": optional(items(record({"option": text()}))),
    "run_dir": optional(file_path),
    "clips": optional(file_path),
    "validation_clips": optional(file_path),
    "rows": optional(file_path),
    "validation_sha256": optional(text()),
    "resume": optional(file_path),
    "layouts": optional(LAYOUTS),
    "deadline": optional(number()),
    "prune": optional(flag),
}
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
    def deleted_json(self) -> Path:
        """What was ``run.json`` until its run began to be deleted; it goes last."""
        return self.root / ".run.json.deleted"

    def description(self, machine_rank: int) -> Path:
        """What the ranks of a machine read: ``run.json``, or the machine's own."""
        return self.run_json if machine_rank == 0 else self.launch(machine_rank) / "run.json"

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

    def trackers(self, logging_dir: str) -> Path:
        """What trackers write, by the run's option; it may lie outside."""
        return Path(os.path.normpath(self.root / Path(logging_dir).expanduser()))

    def tensorboard(self, logging_dir: str = "logs") -> Path:
        """Event files with the run's curves."""
        return self.trackers(logging_dir) / "tensorboard"

    @property
    def bad_step(self) -> Path:
        """The rows that ranks trained on at the step that spoilt the weights, where they are too many for a message."""
        return self.logs / "bad-step.json"

    @property
    def sanity_check(self) -> Path:
        """The first batch as people can look at it."""
        return self.root / "sanity_check"

    def samples(self, step: int) -> Path:
        """Videos made of the validation rows after so many steps."""
        return self.samples_folder / f"step-{step}"

    @property
    def samples_folder(self) -> Path:
        """All videos that a run makes."""
        return self.root / "samples"

    def sampled(self) -> list[tuple[int, Path]]:
        """The steps of which there are samples, and their folders."""
        named = [path.name.removeprefix("step-") for path in self.samples_folder.glob("step-*")]
        return [(step, self.samples(step)) for step in sorted(int(name) for name in named if name.isdecimal())]

    def sample_files(self, *, after: int | None = None) -> list[Path]:
        """What has the names that a run gives to samples, or to what a kill left of them half written.

        Args:
            after: of later steps alone.
        """
        folders = [folder for step, folder in self.sampled() if after is None or step > after]
        folders += [self.sampled_clips] if after is None else []
        inside = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
        return [path for path in inside if _SAMPLE.fullmatch(path.name)]

    @property
    def sampled_clips(self) -> Path:
        """The own clips of the validation rows, to compare samples with."""
        return self.samples_folder / "rows"

    @property
    def report_html(self) -> Path:
        """The run as a page."""
        return self.root / "report.html"

    def stop_request(self, machine_rank: int = 0) -> Path:
        """Its presence asks the ranks of a machine, and by them all, to save and stop at the next step boundary."""
        return self.logs / ("stop-request" if machine_rank == 0 else f"stop-request-machine-{machine_rank}")

    def listening(self, machine_rank: int = 0) -> Path:
        """Its presence says that the ranks of a machine have come to where they look for that request."""
        return self.logs / ("listening" if machine_rank == 0 else f"listening-machine-{machine_rank}")

    def outcome(self, machine_rank: int = 0) -> Path:
        """How the ranks of a machine ended without an error."""
        return self.logs / ("outcome.json" if machine_rank == 0 else f"outcome-machine-{machine_rank}.json")

    def machine_report(self, machine_rank: int) -> Path:
        """What the command of one of several machines says of itself and its ranks."""
        return self.logs / f"machine-{machine_rank}.json"

    def common_mark(self, token: str) -> Path:
        """What rank 0 leaves for a moment, to see whether the ranks of all machines find it."""
        return self.logs / f".common-{token}"

    def launch(self, machine_rank: int = 0) -> Path:
        """Generated launch files of one machine."""
        return self.root / ("launch" if machine_rank == 0 else f"launch-machine-{machine_rank}")

    def clips(self, machine_rank: int = 0) -> Path:
        """The checked clip table that the plan is made from."""
        return self.launch(machine_rank) / "clips.npz"

    def validation_clips(self, machine_rank: int = 0) -> Path:
        """The checked clips to validate on, where they have metadata of their own."""
        return self.launch(machine_rank) / "validation-clips.npz"

    @property
    def rows(self) -> Path:
        """The rows to train on, for the processes of all machines."""
        return self.launch() / "rows.sqlite"

    def contents(self, machine_rank: int = 0) -> Path:
        """The digest of every file and row that the run reads."""
        return self.launch(machine_rank) / "contents.json"

    def fill_report(self, rank: int) -> Path:
        """What a rank did that filled a cache."""
        return self.logs / f"filled-rank-{rank}.json"

    def fill_reports(self) -> list[Path]:
        """Those that are there."""
        return self._of_ranks("filled-rank-", ".json")

    def rank_error(self, rank: int) -> Path:
        """The error that ended a rank."""
        return self.logs / f"error-rank-{rank}.json"

    def rank_error_space(self, rank: int) -> Path:
        """Room on the disk for that error, taken while there is some."""
        return self.logs / f".error-rank-{rank}.space"

    def rank_error_spaces(self) -> list[Path]:
        """Those of ranks that were killed."""
        return self._of_ranks(".error-rank-", ".space")

    def rank_errors(self) -> list[Path]:
        """Those that are there."""
        return self._of_ranks("error-rank-", ".json")

    def _of_ranks(self, before: str, after: str) -> list[Path]:
        """Files named after a rank, and no other that is named alike."""
        found = self.logs.glob(f"{before}*{after}")
        return sorted(path for path in found if path.name.removeprefix(before).removesuffix(after).isdecimal())

    @property
    def noted_json(self) -> Path:
        """Files of the run whose names nothing else tells: the first batch, curves."""
        return self.launch() / "noted.json"

    def files_of_machine(self, machine_rank: int) -> list[Path]:
        """All that a launch writes for one machine."""
        folder = self.launch(machine_rank)
        generated = [folder / name for name in ("accelerate.yaml", "deepspeed.json", "run.json")]
        read = [self.clips(machine_rank), self.validation_clips(machine_rank), self.contents(machine_rank)]
        read += [self.rows, unfinished(self.rows)] if machine_rank == 0 else []
        said = [each(machine_rank) for each in (self.stop_request, self.listening, self.outcome, self.machine_report)]
        return [*generated, *read, *said, self.launcher_log(machine_rank)]

    def files_of_rank(self, rank: int) -> list[Path]:
        """All that one rank writes for itself."""
        return [self.rank_log(rank), self.rank_error(rank), self.rank_error_space(rank), self.fill_report(rank)]

    def rank_log(self, rank: int) -> Path:
        """Output of a rank other than 0."""
        return self.logs / f"rank-{rank}.log"

    def rank_logs(self) -> list[Path]:
        """Those that are there."""
        return self._of_ranks("rank-", ".log")

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

    def own_files(self) -> list[Path]:
        """What a run writes here, as far as its names are known beforehand, and its checkpoints."""
        files = [self.run_json, self.plan_json, self.metrics, self.logs, self.sanity_check, self.launch()]
        return [*files, self.report_html, *(path for _, path in manifest.numbered(self.root))]

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.run_json.exists()

    def is_half_deleted(self) -> bool:
        """Whether a run was here, whose deletion was stopped."""
        return self.deleted_json.exists() and not self.holds_run()

    def fingerprint(self) -> str | None:
        """Of ``run.json``, which every launch writes anew; None if there is none."""
        try:
            with open_bounded(self.run_json, LARGEST_FILE) as file:
                return hashlib.sha256(file.read()).hexdigest()
        except OSError:
            return None

    def read_run(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if self.is_half_deleted():
            raise CheckpointError(
                f"{self.root} holds no run any more: --overwrite was stopped while it deleted the one that was there.",
                hint="The command that begins a run there deletes the rest first.",
            )
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
    return read_object(run_json, DESCRIBES)


def ensure_writable(folder: Path) -> None:
    """Create the folder if need be, and say what its disk lacks.

    Raises:
        EnvironmentFault: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = abilities.missing(folder)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write to {folder}: {error.strerror or error}.",
            hint="Make room there, mend its permissions, or choose another directory with --output-dir.",
        ) from None
    if missing:
        lacks = "; ".join(f"no {ability.name} ({ability.without})" for ability in missing)
        console.warn(f"the disk of {folder} has {lacks}. All else works as anywhere.")


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")  # several hosts may write at once, and share pids
    try:
        with abilities.naming(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
