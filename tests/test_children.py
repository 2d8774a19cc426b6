"""What the processes get that vfun starts: what vfun decided, and nothing from the working directory."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from vfun_cli import children
from vfun_cli.config.options import RunConfig
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.launch.templates import WAITING, plan_launch
from vfun_cli.metadata import decoder
from vfun_cli.metadata.deep import decode_many
from vfun_cli.run.rundir import RunDir

PACKAGE = Path(children.__file__).parent
LEFT_OVER = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "1", "PARALLELISM_CONFIG_TP_SIZE": "2",
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "ROLE_RANK": "1",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "PET_NNODES": "2", "PYTHON_EXEC": "sh",
    "OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2", "PMIX_RANK": "1", "PALS_RANKID": "1", "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0",
    "DS_ACCELERATOR": "xpu", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
}  # fmt: skip
TUNING = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "1", "TORCH_NCCL_TRACE_BUFFER_SIZE": "1", "HF_HOME": "/hf"}


def environment_of_a_child(environ: dict[str, str], **more: str) -> dict[str, str]:
    """What its command leaves of an environment, shown by env(1) in place of Python."""
    argv = children.command("module", variables=more, environ=environ)
    argv = [argv[0], "-0", *argv[1 : argv.index(sys.executable)]]
    shown = subprocess.run(argv, env=environ, capture_output=True, check=True)
    return dict(entry.split("=", 1) for entry in shown.stdout.decode().split("\0") if entry)


def test_a_child_inherits_what_tunes_it_and_nothing_of_another_launch() -> None:
    found = environment_of_a_child({**LEFT_OVER, **TUNING, "HOME": "/me"}, PET_SIGNALS_TO_HANDLE="SIGINT")
    assert not LEFT_OVER.keys() & found.keys()
    assert found.items() >= {**TUNING, "HOME": "/me", "PET_SIGNALS_TO_HANDLE": "SIGINT"}.items()


@pytest.mark.parametrize(("threads", "taken"), [("3", True), ("", False), ("4,2", False), ("0", False), ("all", False)])
def test_a_number_of_threads_is_inherited_only_where_it_is_one(threads: str, taken: bool) -> None:
    found = environment_of_a_child({"OMP_NUM_THREADS": threads})
    assert found.get("OMP_NUM_THREADS") == (threads if taken else None)


@pytest.mark.parametrize("name", ["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"])
@pytest.mark.parametrize("entries", ["", ":/opt/a", "/opt/a:", ".:/opt/a", "/opt/a:lib", "/opt/a::/opt/b"])
def test_no_search_path_of_a_child_names_the_working_directory(name: str, entries: str) -> None:
    value = environment_of_a_child({name: entries}).get(name)
    found = [] if value is None else value.split(":")
    assert [entry for entry in found if entry.startswith("/opt")] == [e for e in entries.split(":") if e[:4] == "/opt"]
    assert all(entry.startswith("/") for entry in found)


@pytest.mark.parametrize("stated", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_devices_memory_grows_in_segments_unless_the_user_has_said_how(
    stated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if stated:
        monkeypatch.setenv(stated, "max_split_size_mb:64")
    argv = plan_launch(
        RunConfig(strategy="single", device="cuda", num_processes=1), SPEC, RunDir(tmp_path), tmp_path / "run.json"
    ).argv
    found = [word for word in argv if "ALLOC_CONF" in word]
    assert found == ([] if stated else ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"])


def test_a_launch_starts_where_nothing_can_be_imported_by_mistake(tmp_path: Path) -> None:
    """DeepSpeed's launcher puts the folder that it is started in on the path of the ranks."""
    config = RunConfig(strategy="zero2", device="cpu", num_processes=2)
    argv = plan_launch(config, SPEC, RunDir(tmp_path), tmp_path / "run.json").argv
    folder = Path(argv[argv.index("-C") + 1])
    assert folder.is_relative_to(PACKAGE.parent) and {path.suffix for path in folder.iterdir()} == {".yaml"}


@pytest.mark.parametrize(
    ("stated", "waiting"),
    [
        ({}, WAITING),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "infinite"}, {"GOMP_SPINCOUNT": "infinite"}),
    ],
)
def test_how_threads_wait_is_the_users_to_say(
    stated: dict[str, str], waiting: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in stated.items():
        monkeypatch.setenv(name, value)
    argv = plan_launch(RunConfig(strategy="single", device="cpu"), SPEC, RunDir(tmp_path), tmp_path / "run.json").argv
    argv = [argv[0], *argv[3 : argv.index(sys.executable)]]  # without the folder that it starts in
    shown = subprocess.run(argv, capture_output=True, check=True, text=True).stdout.splitlines()
    assert {line for line in shown if line.startswith(("OMP_WAIT", "GOMP"))} == {
        "=".join(each) for each in waiting.items()
    }


def test_files_beside_the_data_are_not_imported_by_a_decoding_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("av", "json", "queue", "vfun_cli"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    (facts,) = decode_many([(str(tmp_path / "none.mp4"), "visual")], cache=None, timeout=60).values()
    assert facts.code == "decode-error", facts  # type: ignore[union-attr]
    assert not Path("imported").exists()


def test_every_python_process_is_started_by_the_one_function() -> None:
    mentioned = {path.name for path in PACKAGE.rglob("*.py") if "sys.executable" in path.read_text(encoding="utf-8")}
    assert mentioned == {"children.py"}
    assert decoder.__name__ in children.command(decoder.__name__)
