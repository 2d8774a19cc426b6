"""One training process: the launcher starts ``-m vfun_cli.training RUN_JSON``."""

import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli import console, families
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import CheckpointError, MetadataError, Unforeseen
from vfun_cli.families.releases import name_downloads
from vfun_cli.imports import uncollected
from vfun_cli.plan.rows import validate_command
from vfun_cli.run import lock
from vfun_cli.run.known import known
from vfun_cli.run.messages import RankError
from vfun_cli.run.rundir import RunDir, read_description
from vfun_cli.training.data import forkserver
from vfun_cli.training.ending import end_with
from vfun_cli.training.signals import StopFlag


def main(argv: list[str]) -> int:
    """Run this rank of one job and leave its process group."""
    console.never_fail()
    code = run_rank(Path(argv[0]))
    import torch.distributed

    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def run_rank(run_json: Path) -> int:
    """Run this rank of the job described by ``run.json``; errors are left for the launching command to show."""
    described = read_description(run_json)
    run = RunDir(Path(described["run_dir"]))
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        _send_output_to(run.rank_log(rank))
    # The import of torch takes seconds, and a request to stop may come then already.
    one_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    machine_rank = described["config"]["machine_rank"]
    stop = StopFlag(run, reads_file=one_of_machine, machine_rank=machine_rank, deadline=_deadline(described))
    stop.listen()
    try:
        if described["config"]["dataloader_num_workers"]:
            forkserver.start_early(families.find(described["family"]).adapter.partition(":")[0])
        lock.take_part(run, machine_rank)
        RankError.reserve(run, rank)
        with uncollected():
            if described["command"] == "cache":
                from vfun_cli.training.data.fill import fill_cache as work
            else:
                from vfun_cli.training.session import train as work
        work(run, described, stop)
    except BaseException as error:
        _leave_error(run, rank, error, described)
        traceback.print_exc()
        return 1
    RankError.release(run, rank)
    return 0


def _deadline(described: Mapping[str, Any]) -> float | None:
    """When to stop, in seconds since 1970; the launch says it, so that it stays where it was after a crash."""
    hours = described["config"].get("max_hours")
    return described.get("deadline") or (None if hours is None else time.time() + 3600 * hours)


def _send_output_to(path: Path) -> None:
    """Ranks other than 0 write to their own log, libraries included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)


def _leave_error(run: RunDir, rank: int, error: BaseException, described: Mapping[str, Any]) -> None:
    """The rank's own message, so that the first failing rank can be shown first."""
    told = known(error, where=run.root)
    if isinstance(told, MetadataError):
        told = told.with_command(_validate_command(described))
    if isinstance(told, CheckpointError):
        model_dir = RunConfig.from_json(described["config"]).pretrained_model_name_or_path
        if model_dir is not None:
            name_downloads(told, families.find(described["family"]), model_dir)
    message = RankError(
        rank=rank,
        time=time.time(),
        message=told.message,
        hint=told.hint,
        exit_code=told.exit_code,
        crash=isinstance(told, Unforeseen),
        traceback=traceback.format_exc(),
        cause=told.rank,
    )
    try:
        if not run.root.exists():  # do not make it anew: whoever moved it may want to move it back
            raise FileNotFoundError(f"{run.root} has vanished")
        message.write(run)
    except OSError as unwritable:  # the log of the launcher may lie on the same disk, but nothing else is left
        print(f"rank {rank}: {told.message} (and {unwritable})", file=sys.stderr)


def _validate_command(described: Mapping[str, Any]) -> str:
    return validate_command(RunConfig.from_json(described["config"]), families.find(described["family"]))


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
