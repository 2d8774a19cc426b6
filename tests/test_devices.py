"""What a process may use of the machine it runs on."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfun_cli import devices
from vfun_cli.devices import check_processes, cpu_cores
from vfun_cli.errors import EnvironmentFault
from vfun_cli.training.launcher import let_ranks_share_cores
from vfun_cli.training.strategy import OPEN_FILES, prepare_environment


@pytest.mark.slow
def test_a_process_that_was_given_one_core_counts_one_and_trains_on_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "import os; from vfun_cli.training.launcher import let_ranks_share_cores; let_ranks_share_cores(os.environ);"
        "from vfun_cli.devices import cpu_cores; from vfun_cli.training.strategy import prepare_environment;"
        "import torch; prepare_environment('cpu'); print(cpu_cores(), torch.get_num_threads())"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert said.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("stated", "local", "threads"),
    [(None, "2", 6), (None, "5", 2), (None, "20", 1), ("3", "2", None), ("1", "1", None)],
)
def test_ranks_share_the_cores_unless_the_user_states_their_threads(
    device: str, stated: str | None, local: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {} if stated is None else {"OMP_NUM_THREADS": stated}
    let_ranks_share_cores(environ)
    # accelerate gives every rank a number: the stated one, else its own.
    for name, value in {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": local, **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    monkeypatch.setattr("vfun_cli.training.strategy.cpu_cores", lambda: 12)
    prepare_environment(device)
    assert set_to == ([] if threads is None else [threads])  # torch itself reads OMP_NUM_THREADS


@pytest.mark.parametrize(
    ("listed", "units"),
    [
        (
            "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\nprocessor : 1\nflags : fpu amx_bf16\n",
            True,
        ),
        ("flags : fpu amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_a_processor_says_whether_it_has_units_for_bf16(
    listed: str | None, units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    assert devices.multiplies_bf16() == units


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
    path.write_text(
        "#!/bin/sh\ncase $1 in -L) echo GPU 0: one; echo GPU 1: another;; "
        "*) echo '0, GPU-aaaa, 24564'; echo '1, GPU-bbbb, 81559'; echo '2, GPU-cccc, [N/A]';; esac\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for asked in (devices.gpu_count, devices.smallest_gpu):
        asked.cache_clear()
    yield path
    for asked in (devices.gpu_count, devices.smallest_gpu):
        asked.cache_clear()


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("", 0), ("1", 1), ("-1", 0), ("0,-1,1", 1), ("0, 1", 2)])
def test_gpus_are_counted_as_cuda_counts_them(
    visible: str | None, count: int, tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpu_count() == count


@pytest.mark.parametrize(
    ("visible", "mebibytes"),
    [(None, 24564), ("1", 81559), ("1,0", 24564), ("GPU-bbbb", 81559), ("GPU-b", 81559), ("2", None), ("", None),
     ("MIG-aaaa", None)],
)  # fmt: skip
def test_the_smallest_of_the_visible_gpus_counts(
    visible: str | None, mebibytes: int | None, tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.smallest_gpu() == (None if mebibytes is None else mebibytes << 20)


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


def test_a_rank_may_open_as_many_files_as_hundreds_of_other_ranks_take() -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        prepare_environment("cuda")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(most, OPEN_FILES), most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))
