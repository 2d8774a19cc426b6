"""Owns checkpoint files: each strategy writes its own format, the manifest comes last, a rename makes it real."""

import errno
import json
import os
import shutil
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.checkpoints.size import most_bytes
from vfun_cli.checkpoints.state import STATE_FILE, read_state
from vfun_cli.config.optimizers import carries_over, cut_by
from vfun_cli.config.options import default_of
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.disks.abilities import copy_folder, fsync_directory, named_by
from vfun_cli.errors import ConfigError, FitError, RunError, first_line
from vfun_cli.modeling.encoders.sharding import ranks_here
from vfun_cli.run import ownership
from vfun_cli.run.locate import way_on
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.agreement import all_or_none
from vfun_cli.training.background import Background
from vfun_cli.training.state.averaged import load_average
from vfun_cli.training.state.convert import load_converted
from vfun_cli.training.state.formats import CheckpointFormat, format_of
from vfun_cli.training.state.live import TrainedState, cut_over, is_partitioned, trained_parameters
from vfun_cli.training.state.parts import numel_of
from vfun_cli.training.waiting import FILES_LIMIT, gather_all, patient_group

MODEL_DIR = "model"
CONFIG_DIR = "config"


class Checkpointer:
    """Saves and restores the state of one run."""

    def __init__(
        self,
        run: RunDir,
        strategy: str,
        *,
        keep: int | None,
        config_files: dict[str, Path],
        format: CheckpointFormat | None = None,
        staging: Path | None = None,
    ) -> None:
        """Of one rank.

        Args:
            staging: this user's folder in memory (``/dev/shm``), for saving in the background.
        """
        self.run = run
        self.staging = staging
        self.strategy = strategy
        self.format = format or format_of(strategy)
        self.keep = keep
        self.config_files = config_files
        self.background = Background("checkpoint")
        patient_group()  # now: where the hosts do not reach each other, this is known before a step is trained

    def save(self, state: TrainedState, run_state: dict[str, Any], *, background: bool = False) -> Path:
        """Write ``checkpoint-<step>`` with all ranks together; older ones go only after it is complete.

        Args:
            run_state: what ``state.json`` says: step, epoch, position, strategy, world size, family.
            background: keep the state in memory (``staging``) and return; it becomes a checkpoint while training
                goes on. Until then the one before is the newest.

        Raises:
            RunError: it cannot be written, or the one before could not.
            FitError: the memory cannot take it.
        """
        self.wait()
        self.require_space(state)
        step = run_state["step"]
        if background:
            assert self.staging is not None
            waiting = self.staging / f"checkpoint-{step}"
            with all_or_none(), self._failure_named(step):
                self._require_memory(state, self.staging)
            self._collect(state, waiting / MODEL_DIR, state.accelerator.is_local_main_process, step)
            if state.accelerator.is_local_main_process:
                self.background.start(lambda: self._copy_to_disk(state, waiting, run_state))
        else:
            partial = self.run.partial_checkpoint(step)
            self._collect(state, partial / MODEL_DIR, state.accelerator.is_main_process, step)
            with all_or_none(), self._failure_named(step):
                own = self.format.written_by(state.accelerator.process_index, partial / MODEL_DIR)
                described = manifest.describe(partial, own)
            written = gather_all(described)
            with all_or_none(), self._failure_named(step):
                if state.accelerator.is_main_process:
                    self._finish(partial, run_state, dict(ChainMap(*written)))
        return self.run.checkpoint(step)

    def raise_background_error(self) -> None:
        """Raise the error of a checkpoint that is being written in the background, if it met one."""
        self.background.raise_error()

    def wait(self) -> None:
        """Wait until no checkpoint is being written in the background, on any machine; all ranks together.

        Raises:
            RunError: it could not be written.
        """
        with all_or_none():
            self.background.wait()

    @contextmanager
    def _failure_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except FitError:
            raise
        except Exception as error:  # each library wraps the system's error in one of its own
            # On a full disk, the message needs a few bytes.
            shutil.rmtree(self.run.partial_checkpoint(step), ignore_errors=True)
            raise RunError(
                f"{self.run.checkpoint(step).name} could not be written to {self.run.root}: {_reason(error)}.",
                hint=f"Make room or repair the directory. {way_on(self.run)}",
            ) from error

    def require_space(self, state: TrainedState) -> None:
        """Stop before a byte is written when the disk cannot take a checkpoint; all ranks stop together.

        Raises:
            RunError: how much is missing, or the run directory is gone.
        """
        main = state.accelerator.is_main_process
        lack = gather_all(_lack_of_space(self.run.root, checkpoint_bytes(state)) if main else None)[0]
        if lack is not None:
            raise RunError(
                f"no checkpoint can be written to {self.run.root}: {lack}.",
                hint="The checkpoints there are complete. Make room, or keep fewer of them with "
                f"--checkpoints-total-limit. {way_on(self.run)}",
            )

    def _require_memory(self, state: TrainedState, staging: Path) -> None:
        """Stop where this machine's memory cannot take its part.

        Raises:
            FitError: how much is missing.
        """
        if state.accelerator.is_local_main_process:
            ownership.make_private(staging)  # where ranks are started by hand, no command has made it
        folder = staging.parent
        lack = _lack_of_space(folder, checkpoint_bytes(state))
        if lack is not None:
            raise FitError(
                f"--async-checkpoint keeps a checkpoint in memory ({folder}) while it is written: {lack}.",
                hint="Enlarge that file system (docker run --shm-size), or leave out --async-checkpoint.",
            )

    def _collect(self, state: TrainedState, folder: Path, makes_folder: bool, step: int) -> None:
        """The strategy's files, from all ranks together."""
        with all_or_none(), self._failure_named(step):
            if makes_folder:
                shutil.rmtree(folder.parent, ignore_errors=True)
                folder.parent.mkdir()
                folder.mkdir()
        with self._failure_named(step):  # with collectives of the strategy's own in it
            self.format.save(state, folder)

    def _copy_to_disk(self, state: TrainedState, waiting: Path, run_state: dict[str, Any]) -> None:
        """From memory to the disk, one process of each machine; the first one waits for the others and finishes."""
        with self._failure_named(run_state["step"]):
            accelerator, partial = state.accelerator, self.run.partial_checkpoint(run_state["step"])
            machine, machines = accelerator.process_index // ranks_here(), accelerator.num_processes // ranks_here()
            copied = [partial / file.relative_to(waiting) for file in manifest.files_of(waiting)]
            copy_folder(waiting, partial)
            shutil.rmtree(waiting)
            arrived = [partial.with_name(f"{partial.name}-from-{number}") for number in range(machines)]
            manifest.write_json(arrived[machine], manifest.describe(partial, copied))
            if machine == 0:
                deadline = time.monotonic() + FILES_LIMIT.total_seconds()
                while not all(mark.exists() for mark in arrived):
                    if time.monotonic() > deadline:
                        raise TimeoutError(errno.ETIMEDOUT, "another machine has not written its part for hours")
                    time.sleep(_POLL_SECONDS)
                written = [json.loads(mark.read_text(encoding="utf-8")) for mark in arrived]
                for mark in arrived:
                    mark.unlink()
                self._finish(partial, run_state, dict(ChainMap(*written)))

    def _finish(self, partial: Path, run_state: dict[str, Any], written: Mapping[str, dict[str, Any]]) -> None:
        """What makes the files a checkpoint: configuration, state, manifest, name; then the old ones go.

        Args:
            written: the manifest's entries of what the strategy has written, from those who did.
        """
        final = self.run.checkpoint(run_state["step"])
        (partial / CONFIG_DIR).mkdir()
        for name, source in self.config_files.items():
            shutil.copyfile(source, partial / CONFIG_DIR / name)
        (partial / STATE_FILE).write_text(json.dumps({"schema": 1, **run_state}, indent=2), encoding="utf-8")
        manifest.write_manifest(partial, written)
        replaced = self.run.replaced_checkpoint(run_state["step"])
        run_id = run_state.get("run_id")
        if os.path.lexists(final):
            if not ownership.may_go(final, run_id):
                raise FileExistsError(errno.EEXIST, "it is there already, and this run did not save it", final.name)
            final.rename(replaced)
        partial.rename(final)
        fsync_directory(final.parent)  # before anything that it makes superfluous goes
        if replaced.exists():
            ownership.delete(replaced)
        self._delete_old(final, run_id)

    def load(self, state: TrainedState, checkpoint: Path) -> dict[str, Any]:
        """Restore weights and optimizer in place; returns ``state.json``.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
            ConfigError: it is of another optimizer, or of one whose state cannot be carried to this strategy.
        """
        with all_or_none():
            manifest.verify(checkpoint, deep=False)
            run_state = read_state(checkpoint)
        self._require_optimizer(state, run_state, checkpoint)
        if self._is_native(run_state, state.accelerator.num_processes):
            self.format.load(state, checkpoint / MODEL_DIR)
        else:
            load_converted(state, open_checkpoint(checkpoint))
        if state.average is not None:
            with all_or_none():
                load_average(state, open_checkpoint(checkpoint))
        return run_state

    def _require_optimizer(self, state: TrainedState, run_state: Mapping[str, Any], checkpoint: Path) -> None:
        """Refuse the state of another optimizer, or one that cannot be sharded as this job shards.

        Raises:
            ConfigError: naming both.
        """
        saved, now = run_state["run_config"].get("optimizer", default_of("optimizer")), state.kind.name
        saved_by = {"strategy": run_state["strategy"], "num_processes": run_state["world_size"]}
        before, here = cut_by(run_state["run_config"] | saved_by), (self.strategy, cut_over(state))
        if saved != now:
            raise ConfigError(f"{checkpoint} holds the state of optimizer {saved}, which means nothing to {now}.")
        if not carries_over(state.kind, before, here):
            raise ConfigError(
                f"{checkpoint} holds the state of optimizer {now} as {before[0]} cut it over {before[1]} processes, "
                f"which cannot be cut anew over {here[1]} under {self.strategy}."
            )

    def _is_native(self, run_state: Mapping[str, Any], world_size: int) -> bool:
        """Whether the strategy's own loader reads what another launch wrote; it restores the state bit for bit."""
        if self.format is not format_of(self.strategy):
            return True  # adapters: one format for all strategies
        if self.format.any_world_size:
            return run_state["strategy"] in STRATEGIES and format_of(run_state["strategy"]) is self.format
        return (run_state["strategy"], run_state["world_size"]) == (self.strategy, world_size)

    def _delete_old(self, newest: Path, run_id: str | None) -> None:
        if self.keep is None:
            return
        older = [path for path in manifest.checkpoints(self.run.root) if path != newest]
        own = [path for path in older if ownership.may_go(path, run_id)]
        for path in own[: max(0, len(own) + 1 - self.keep)]:
            ownership.delete(path)


def checkpoint_bytes(state: TrainedState) -> int:
    """What a checkpoint takes at most."""
    trained = trained_parameters(state)
    count = sum(numel_of(parameter) for parameter in trained.values())
    copies = max((parameter.element_size() for parameter in trained.values()), default=0)
    kept = copies if is_partitioned(state) else 0
    moments = 8 * count if state.moments_bytes is None else state.moments_bytes
    return most_bytes(count, len(trained), moments=moments, average=state.average is not None, copy_bytes=kept)


_POLL_SECONDS = 0.05


def _lack_of_space(folder: Path, needed: int) -> str | None:
    try:
        free = shutil.disk_usage(folder).free
    except FileNotFoundError:
        return "the directory has vanished"
    except OSError as error:
        return str(error.strerror or error)
    if free >= needed:
        return None
    return f"{needed - free:,} bytes are missing (it needs {needed:,}, {free:,} are free)"


def _reason(error: BaseException) -> str:
    """The system's own words, if they are to be found below the wrappers."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            name = named_by(below)
            return below.strerror if name is None else f"{below.strerror} ({name})"
        below = below.__cause__ or below.__context__
    return first_line(error)
