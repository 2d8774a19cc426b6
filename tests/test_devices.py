"""What a process may use of the machine it runs on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfun_cli import devices
from vfun_cli.devices import check_processes, cpu_cores
from vfun_cli.errors import EnvironmentFault


@pytest.mark.slow
def test_a_process_that_was_given_one_core_counts_one_and_trains_on_one_thread() -> None:
    code = (
        "from vfun_cli.devices import cpu_cores; from vfun_cli.training.strategy import prepare_environment;"
        "import torch; prepare_environment('cpu'); print(cpu_cores(), torch.get_num_threads())"
    )
    one = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert said.stdout.split() == ["1", "1"]


def test_more_processes_than_cores_are_refused_and_two_always_allowed() -> None:
    check_processes("cpu", 2)
    too_many = max(2, cpu_cores()) + 1
    with pytest.raises(EnvironmentFault, match=f"processor cores for {too_many} processes"):
        check_processes("cpu", too_many)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of nvidia-smi; it lists two GPUs."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho GPU 0: one\necho GPU 1: another\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.gpu_count.cache_clear()
    yield path
    devices.gpu_count.cache_clear()


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("", 0), ("1", 1), ("-1", 0), ("0,-1,1", 1), ("0, 1", 2)])
def test_gpus_are_counted_as_cuda_counts_them(
    visible: str | None, count: int, tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpu_count() == count


def test_a_tool_that_hangs_is_named(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(devices, "ANSWER_TIMEOUT", 0.1)
    with pytest.raises(EnvironmentFault, match="nvidia-smi does not answer"):
        devices.gpu_count()


def test_a_tool_in_the_working_directory_is_not_run(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tool.parent)
    monkeypatch.setenv("PATH", ":.")
    assert devices.gpu_count() == 0


@pytest.mark.parametrize(
    ("group", "events", "found"),
    [
        ("1:cpu:/\n0::/job/step\n", "low 0\nhigh 0\nmax 9\noom 5\noom_kill 2\noom_group_kill 0\n", 2),
        ("0::/job/step\n", "low 0\n", 0),
        ("0::/\n", None, 0),
        ("4:memory:/job\n", None, 0),
    ],
)
def test_processes_that_the_kernel_ended_for_want_of_memory_are_counted_where_they_are(
    group: str, events: str | None, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(group)
    monkeypatch.setattr(devices, "_OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "_GROUPS", tmp_path)
    if events is not None:
        (tmp_path / "job/step").mkdir(parents=True)
        (tmp_path / "job/step/memory.events").write_text(events)
    assert devices.oom_kills() == found
