"""Whole runs through the command line: killed and resumed, on two machines, interrupted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import mean

import pytest

from tests.integration.matrix import STEPS, STRATEGIES, losses, memorised, straight, together
from vfun_cli.checkpoints.lora_files import ADAPTER_FILE
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

Trained = Callable[[str], None]
FAMILY = "wan-s2v"


def vfun(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vfun_cli", *map(str, arguments)]


def options(output_dir: Path, **changes: object) -> list[str]:
    """Of a run that shares the matrix's cache: encoders round differently on one thread and on two."""
    values = {**memorised(FAMILY), "cache": "cache", "output_dir": output_dir, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def start(arguments: list[str], cores: Collection[int] = ()) -> "subprocess.Popen[str]":
    """A command of its own session, on these processor cores alone where some are named."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(os.sched_setaffinity, 0, cores) if cores else None,
    )  # fmt: skip


def steps_of(run_dir: RunDir) -> list[int]:
    if not run_dir.metrics.exists():
        return []
    lines = run_dir.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and "event" not in line]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """kill -9 for the command and for the launcher's group, which has a session of its own."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines()[1:]:
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found, pending = [], [process.pid]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children.get(pid, [])
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_resumes_to_the_same_weights(strategy: str, workplace: Path, trained: Trained) -> None:
    trained(strategy)
    folder = Path("killed") / strategy
    run = RunDir(folder)
    process = start(vfun("train", FAMILY, "--demo", f"--strategy={strategy}", *options(folder, **together(strategy))))
    wait_for(
        lambda: run.checkpoint(STEPS["train"] // 2).exists() and max(steps_of(run), default=0) > STEPS["train"] // 2,
        process,
    )
    kill_all(process)
    done = subprocess.run(vfun("resume", folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses(straight(FAMILY, strategy))
    hashes = []
    for root in (run.root, straight(FAMILY, strategy).folder):
        command = vfun("export-bf16", root / f"checkpoint-{STEPS['train']}", "--output", root / "cli-export", "--json")
        hashes.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["sha256"])
    assert hashes[0] == hashes[1]


def test_two_machines_join_one_job(workplace: Path, trained: Trained) -> None:
    """Two launchers on one host, one process each: the same losses as two processes under one launcher.

    Each has half of the cores, as each of the two processes has: sums over another number of threads round otherwise.
    """
    trained("ddp")
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path("two-machines")
    both = [
        start(
            vfun("train", FAMILY, "--demo", "--ddp", *options(folder, max_train_steps=4), "--num-machines=2",
                 "--num-processes=2", f"--machine-rank={rank}", "--main-process-ip=127.0.0.1",
                 f"--main-process-port={port}"),
            cores[rank : len(cores) // 2 * 2 : 2],
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    lines = [json.loads(line) for line in RunDir(folder).metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses(straight(FAMILY, "ddp"))[:4]


def test_zero3_with_offload_trains_and_exports(workplace: Path, trained: Trained) -> None:
    trained("zero3")
    folder = Path("offload")
    arguments = options(folder, cache=None, max_train_steps=4, checkpointing_steps=4)
    done = subprocess.run(
        vfun("train", FAMILY, "--demo", "--zero3-offload", *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in RunDir(folder).metrics.read_text(encoding="utf-8").splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found == pytest.approx(losses(straight(FAMILY, "zero3"))[:4], rel=0.01)
    export = vfun("export-bf16", folder / "checkpoint-4", "--json")
    assert json.loads(subprocess.run(export, capture_output=True, text=True, check=True).stdout)["verified"]


def test_lora_with_offload_trains_on_from_a_file_and_resumes_its_dropout(workplace: Path, trained: Trained) -> None:
    trained("zero3")
    run = RunDir(Path("lora-offload"))
    network = straight(FAMILY, "zero3", "lora").last_checkpoint()
    arguments = options(run.root, max_train_steps=4, checkpointing_steps=2, lora_dropout=0.1, network_path=network)
    command = vfun("lora", FAMILY, "--demo", "--zero3-offload", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def found() -> list[float]:
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    first, adapter = found(), (run.checkpoint(4) / "model" / ADAPTER_FILE).read_bytes()
    # The same clips as at the first steps of the run that the file came from, which knew nothing then.
    assert mean(first) < 0.95 * mean(losses(straight(FAMILY, "zero3", "lora"))[:4])
    shutil.rmtree(run.checkpoint(4))
    again = subprocess.run(vfun("resume", run.root), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert found() == first
    assert (run.checkpoint(4) / "model" / ADAPTER_FILE).read_bytes() == adapter


def test_ctrl_c_saves_and_resume_goes_on(workplace: Path, trained: Trained) -> None:
    trained("single")
    folder = Path("interrupted")
    run = RunDir(folder)
    process = start(vfun("train", FAMILY, "--demo", *options(folder, **together("single"))))
    wait_for(lambda: max(steps_of(run), default=0) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    saved = json.loads(run.outcome.read_text(encoding="utf-8"))["step"]
    assert saved >= 3 and run.checkpoint(saved).is_dir()
    assert "Traceback" not in errors
    again = [*options(folder, **together("single")), "--resume-from-checkpoint=latest"]
    done = subprocess.run(vfun("train", FAMILY, "--demo", *again), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses(straight(FAMILY, "single"))
    assert list((folder / "logs" / "tensorboard").glob("events*"))
    assert {path.suffix for path in (folder / "sanity_check").iterdir()} >= {".mp4", ".png", ".wav", ".txt"}
