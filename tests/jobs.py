"""vfun as a user runs it: commands in processes of their own, the processes of a job, and what its run recorded."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

from vfun_cli.main import main
from vfun_cli.run.rundir import RunDir

TIMEOUT = 300
"""Seconds; more than any command of the tests takes on a busy machine."""
MARK = "JOB_OF_A_TEST"
"""Environment variable by which all processes of a command are known."""


@dataclass(frozen=True)
class Said:
    """What one command printed, and its exit code."""

    code: int
    out: str
    err: str


def vfun_here(*arguments: object) -> Said:
    """A vfun command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


Job = subprocess.Popen[str]


def start(
    *arguments: object,
    cwd: Path | None = None,
    by: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Job:
    """A vfun command in a session of its own.

    Args:
        by: the command that starts it, where it is not started straight away.
    """
    return subprocess.Popen(
        [*by, sys.executable, "-m", "vfun_cli", *map(str, arguments)],
        cwd=cwd, env={**environment, MARK: str(uuid4())}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(job: Job, code: int | None = 0, *, within: float = TIMEOUT) -> Said:
    """Waits for the end of a command, which must have this exit code where one is given."""
    try:
        out, err = job.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        kill_all(job)
        raise
    assert code is None or job.returncode == code, f"exit code {job.returncode}\n{err[-6000:]}"
    return Said(job.returncode, out, err)


def vfun_process(*arguments: object, code: int | None = None) -> Said:
    """A vfun command from its start to its end."""
    return finish(start(*arguments), code)


def wait_for(condition: Callable[[], object], job: Job) -> None:
    """Until the condition holds of a job that still runs."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def wait_for_step(run: RunDir, step: int, job: Job) -> None:
    """Until the run has recorded this step."""
    wait_for(lambda: last_step(run) >= step, job)


def records(run: RunDir) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl, in order; the run may be writing the next one."""
    if not run.metrics.exists():
        return []
    lines = run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: RunDir) -> list[float]:
    """Loss of each step."""
    return [record["loss"] for record in records(run) if "event" not in record]


def held_out(run: RunDir) -> dict[tuple[int, str], list[float]]:
    """The loss at each quantile, and at last their mean, by step and weights."""
    found = [record for record in records(run) if record.get("event") == "held-out"]
    keys = [(record["step"], record["weights"]) for record in found]
    assert len(keys) == len(set(keys)), "each is recorded once"
    return {key: [*record["by_quantile"], record["loss"]] for key, record in zip(keys, found, strict=True)}


def last_step(run: RunDir) -> int:
    """The newest step that the run recorded, 0 before the first."""
    return max((record["step"] for record in records(run) if "event" not in record), default=0)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    entries = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def training_processes(run: RunDir) -> tuple[list[int], list[int]]:
    """The launcher of a run that trains, and its ranks in order."""
    launchers, ranks = [], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = environment_of(int(folder.name))
            parent = parent_of(folder)
        except (OSError, ValueError):
            continue
        if "vfun_cli.training" in argv and str(run.run_json.absolute()) in argv:
            if "vfun_cli.training.launcher" in argv:
                launchers.append(int(folder.name))
            else:
                ranks.setdefault(parent, {})[environment.get("RANK", "0")] = int(folder.name)
    return launchers, [pid for _, pid in sorted(ranks[launchers[0]].items())]


def children_of(parents: Collection[int]) -> list[int]:
    """The processes that these have started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone
            if parent_of(folder) in parents:
                found.append(int(folder.name))
    return found


def command_line(process: int) -> bytes:
    """With which a process, or the one that it is a copy of, was started."""
    return (Path("/proc") / str(process) / "cmdline").read_bytes()


def parent_of(folder: Path) -> int:
    """The parent of the process with this folder of /proc."""
    return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])


def listened_at(processes: Collection[int]) -> set[str]:
    """The addresses at which these processes wait for others to connect."""
    sockets, addresses = set(), set()
    for opened in (path for pid in processes for path in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(str(opened.readlink()))
    for table, width in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = struct.unpack(f"<{width // 4}I", bytes.fromhex(local.partition(":")[0]))
                addresses.add(str(ip_address(struct.pack(f">{width // 4}I", *words))))
    return addresses


def kill_all(job: Job) -> None:
    """kill -9 of a command and of all that it started."""
    for process in processes_of(job):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    job.wait()


def processes_of(job: Job) -> list[int]:
    """A command that has not been waited for, and all that it started, in whatever session: they inherit its mark."""
    with suppress(OSError, KeyError):  # it has ended
        return marked(environment_of(job.pid)[MARK])
    return []


def marked(mark: str) -> list[int]:
    """All processes that were started with this mark, in whatever session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone
            if environment_of(int(process.name)).get(MARK) == mark:
                found.append(int(process.name))
    return found
