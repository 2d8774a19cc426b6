"""Disks that lack locks, permissions, times, links or flushing of directories, and disks that are full."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.commands.conftest import QUICK, TRAIN, Vfun
from tests.disks import ABILITIES, file_system, without_in_children
from tests.jobs import vfun_process
from vfun_cli.checkpoints import manifest
from vfun_cli.errors import EnvironmentFault, FitError
from vfun_cli.run.cachedir import entries, verify_entry
from vfun_cli.run.ownership import MEMORY
from vfun_cli.run.rundir import RunDir

NOTICE = "no locks"


@pytest.mark.long
def test_a_run_trains_resumes_and_exports_on_a_disk_that_lacks_all_that_can_be_lacked(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = without_in_children(place, *ABILITIES) | {"HOME": str(place / "home")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = RunDir(Path("vfun-demo/output_dir"))
    limits = ("--checkpointing-steps", "1", "--max-train-steps")
    more = ("--strategy", "single", "--cache", "latents", "--async-checkpoint")
    train = ("train", "cogvideox-fun", "--demo", *more, *QUICK, *limits)
    said = vfun_process(*train, "1", code=0)
    assert said.err.count(NOTICE) == 1 and "Traceback" not in said.err, said.err
    again = vfun_process("resume", run.root, "--max-train-steps", "2", "--dataloader-num-workers", "1", code=0)
    assert again.err.count(NOTICE) == 1, again.err
    for step in (1, 2):
        manifest.verify(run.checkpoint(step))
    exported = vfun_process("export-bf16", run.checkpoint(2), "--output", "exported", "--json", code=0)
    assert json.loads(exported.out)["verified"] is True and NOTICE not in exported.err
    for path in entries(Path("latents")):
        verify_entry(path)
    with closing(sqlite3.connect(place / "home/.cache/vfun/headers.sqlite")) as headers:
        assert headers.execute("SELECT count(*) FROM facts").fetchone()[0] >= 8
    assert not [path for path in run.root.iterdir() if path.name.startswith(".checkpoint")]


def test_a_full_disk_is_named_whatever_is_to_be_written_there(place: Path, vfun: Vfun) -> None:
    with file_system(place / "disk", "size=64k") as disk:
        (disk / "fill").write_bytes(b"0" * 64 * 1024)
        for command in (
            (*TRAIN, "--output-dir", "disk/run"),
            ("cache", *TRAIN[1:], "--cache", "disk/latents"),
            ("plan-buckets", *TRAIN[1:], "--plot", "disk/plan.svg"),
            ("validate-meta", "vfun-demo/wan-s2v/data/metadata.json", "--fix", "disk/fixed.json"),
        ):
            said = vfun(*command)
            assert said.code == EnvironmentFault.exit_code, said.err
            assert "No space left on device" in said.err and "disk/" in said.err and "next:" in said.err, said.err
            assert "fault of vfun" not in said.err


@pytest.mark.parametrize("command", ["train", "lora", "cache"])
def test_decoded_clips_that_find_no_room_in_shared_memory_are_refused_before_anything_is_started(
    command: str, place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    full = SimpleNamespace(total=64 << 20, used=64 << 20, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if path == MEMORY else usage(path))
    where = ("--output-dir", "run", "--cache", "latents", "--dataloader-num-workers", "1")
    said = vfun(command, *TRAIN[1:], *where)
    assert said.code == FitError.exit_code and "1 decoding processes of each of" in said.err, said.err
    assert "--shm-size=16g" in said.err and "use fewer" in said.err, said.err
    assert not Path("run").exists() and not Path("latents").exists()
