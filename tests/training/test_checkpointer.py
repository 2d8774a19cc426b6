"""Checkpoints of one process through faults of the disk and sudden deaths; launches are in tests/integration."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.deaths import each_death
from tests.disks import file_system, make_read_only
from tests.run.small_run import DESCRIBED
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.disks import abilities
from vfun_cli.errors import CheckpointError, FitError, RunError
from vfun_cli.run import locate, ownership
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.state.checkpointer import Checkpointer, checkpoint_bytes
from vfun_cli.training.state.formats import FORMATS
from vfun_cli.training.state.live import TrainedState

KILLS_LEAST = 20
"""Steps of a save, seen from the file system, below which the kill test would not be testing."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(width: int = 8) -> TrainedState:
    """A model that has made one step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 2))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=False))
    state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer)
    step(state)
    return state


def step(state: TrainedState) -> None:
    state.model(torch.ones(1, next(state.model.parameters()).shape[1])).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "config.json").write_text("{}")
    return RunDir(tmp_path / "run")


def staging(run: RunDir) -> Path:
    return run.root.parent / "memory" / "of-this-launch"


def checkpointer(run: RunDir, keep: int | None = None) -> Checkpointer:
    config = {"config.json": run.root.parent / "config.json"}
    return Checkpointer(run, "single", keep=keep, config_files=config, staging=staging(run))


def progress(step: int) -> dict[str, Any]:
    config = {"num_processes": 1, "gradient_accumulation_steps": 1, "pretrained_model_name_or_path": "model"}
    run = {"strategy": "single", "world_size": 1, "family": "none", "kind": "train", "run_config": config}
    return {"step": step, **run}


def weights(state: TrainedState) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in state.model.parameters())


def test_a_saved_state_comes_back_bit_for_bit(run: RunDir) -> None:
    state = trained()
    path = checkpointer(run).save(state, progress(1))
    step(state)
    after_two = weights(state)
    fresh = trained()
    with torch.no_grad():
        next(fresh.model.parameters()).zero_()
    assert checkpointer(run).load(fresh, path)["step"] == 1
    step(fresh)
    assert weights(fresh) == after_two


def test_old_checkpoints_go_only_after_the_new_one_is_complete(run: RunDir) -> None:
    state, saver = trained(), checkpointer(run, keep=2)
    for number in range(1, 5):
        saver.save(state, progress(number))
    assert [path.name for path in manifest.checkpoints(run.root)] == ["checkpoint-3", "checkpoint-4"]


def test_the_space_a_checkpoint_needs_is_known_beforehand(run: RunDir) -> None:
    state = trained(width=700)
    path = checkpointer(run).save(state, progress(1))
    taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert taken <= checkpoint_bytes(state) <= 1.3 * taken + (2 << 20)


def test_a_disk_without_room_stops_the_run_before_a_byte_is_written(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, saver = trained(), checkpointer(run)
    saver.save(state, progress(1))
    usage = shutil.disk_usage(run.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(RunError) as caught:
        saver.save(state, progress(2))
    assert f"{checkpoint_bytes(state) - 1000:,} bytes are missing" in caught.value.message
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoint-1"]
    manifest.verify(run.checkpoint(1))


def test_a_write_that_fails_half_way_leaves_the_checkpoint_before_it(run: RunDir) -> None:
    state, saver = trained(width=700), checkpointer(run)
    saver.save(state, progress(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"checkpoint-2 could not be written .*File too large") as caught:
            saver.save(state, progress(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "vfun resume" in (caught.value.hint or "")
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoint-1"]
    manifest.verify(run.checkpoint(1))


def test_a_full_tmpfs_ends_in_the_same_error(run: RunDir) -> None:
    with file_system(run.root, "size=8m"):
        state, saver = trained(width=500), checkpointer(run)
        with pytest.raises(RunError, match="bytes are missing"):
            for number in range(1, 5):
                saver.save(state, progress(number))
        whole = manifest.checkpoints(run.root)
        assert whole
        manifest.verify(whole[-1])


def test_a_directory_that_became_read_only_leaves_the_checkpoint_before_it(run: RunDir) -> None:
    with file_system(run.root):
        state, saver = trained(), checkpointer(run)
        saver.save(state, progress(1))
        make_read_only(run.root)
        with pytest.raises(RunError, match=r"checkpoint-2 could not be written.*Read-only file system") as caught:
            saver.save(state, progress(2))
        assert "vfun resume" in (caught.value.hint or "")
        assert [path.name for path in run.root.iterdir()] == ["checkpoint-1"]
        manifest.verify(run.checkpoint(1))


def test_a_vanished_run_directory_is_named_and_not_made_anew(run: RunDir) -> None:
    state = trained()
    shutil.rmtree(run.root)
    with pytest.raises(RunError, match="vanished"):
        checkpointer(run).save(state, progress(1))
    assert not run.root.exists()


def test_weights_of_another_model_are_refused(run: RunDir) -> None:
    path = checkpointer(run).save(trained(), progress(1))
    other = trained()
    other.model.add_module("more", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"2 missing \['more.bias', 'more.weight'\]"):
        checkpointer(run).load(other, path)


FILES = ("model/model.safetensors", "model/optimizer.safetensors", "config/config.json", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_damage_in_any_file_is_found(name: str, damage: str, run: RunDir) -> None:
    path = checkpointer(run).save(trained(), progress(1))
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(CheckpointError, match=name):
        manifest.verify(path)
    assert (damage == "byte") == manifest.is_complete(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"bytes": ', '"bytes": 1'),
        lambda text: text.replace("model/model", "../model"),
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_an_edited_manifest_makes_no_checkpoint(edit: Callable[[str], str], run: RunDir) -> None:
    path = checkpointer(run).save(trained(), progress(1))
    file = path / manifest.MANIFEST
    file.write_text(edit(file.read_text()))
    with pytest.raises(CheckpointError):
        manifest.verify(path)
    assert manifest.checkpoints(run.root) == []


@pytest.mark.slow
def test_death_at_any_moment_of_a_save_leaves_a_whole_checkpoint(run: RunDir) -> None:
    """``kill -9`` at every touch of the file system in turn: while writing, renaming, and removing the old ones."""
    state, saver, before = trained(), checkpointer(run, keep=1), run.root.with_name("before")
    for number in (1, 2, 3):  # the last is saved again: it replaces the one of the same step
        checkpointer(run).save(state, progress(number))
    run.root.rename(before)

    def prepare() -> None:
        shutil.rmtree(run.root, ignore_errors=True)
        shutil.copytree(before, run.root)

    def after() -> None:
        found = locate.newest(run)
        assert found is not None and found.step == 3
        ownership.remove_leftovers(run, 0)
        whole = manifest.checkpoints(run.root)
        assert whole[-1] == run.checkpoint(3) and set(whole) == set(run.root.iterdir()), "there is half of one"
        manifest.verify(run.checkpoint(3))
        assert open_checkpoint(run.checkpoint(3)).state["step"] == 3

    deaths = each_death(prepare, lambda: saver.save(state, progress(3)), after, run.root)
    assert deaths >= KILLS_LEAST
    assert manifest.checkpoints(run.root) == [run.checkpoint(3)]
    saver.load(trained(), run.checkpoint(3))


def test_what_a_power_cut_must_not_reorder_is_flushed_in_between(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new name is on the disk before the files of an old checkpoint go, and so is the old one's new name."""
    state, saver, done = trained(), checkpointer(run, keep=1), []
    saver.save(state, progress(1))
    flush, rename, delete = abilities._fsync_directory, Path.rename, shutil.rmtree
    monkeypatch.setattr(abilities, "_fsync_directory", lambda path: (done.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(("name", to.name)), rename(path, to))[1])
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **more: (done.append(("delete", path.name)), delete(path, **more))[1]
    )
    saver.save(state, progress(2))
    there = done.index(("name", "checkpoint-2"))
    assert done[there + 1 :] == [
        ("flush", "run"),
        ("delete", ".checkpoint-1.deleted"),  # of an earlier try
        ("name", ".checkpoint-1.deleted"),
        ("flush", "run"),
        ("delete", ".checkpoint-1.deleted"),
    ]


def test_a_checkpoint_of_another_run_is_neither_replaced_nor_deleted(run: RunDir) -> None:
    state, saver = trained(), checkpointer(run, keep=1)
    run.run_json.write_text(json.dumps(DESCRIBED | {"id": "ours"}))
    checkpointer(run).save(state, progress(1) | {"run_id": "another"})
    checkpointer(run).save(state, progress(3) | {"run_id": "another"})
    saver.save(state, progress(2) | {"run_id": "ours"})
    with pytest.raises(RunError, match=r"this run did not save it .*checkpoint-3"):
        saver.save(state, progress(3) | {"run_id": "ours"})
    found = locate.newest(run)
    assert found is not None and found.step == 2
    assert [path.name for path in manifest.checkpoints(run.root)] == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_a_checkpoint_in_the_background_holds_the_moment_it_was_taken(run: RunDir) -> None:
    state, saver = trained(), checkpointer(run, keep=1)
    taken = weights(state)
    saver.save(state, progress(1), background=True)
    step(state)
    assert weights(state) != taken
    saver.wait()
    fresh = trained()
    saver.load(fresh, run.checkpoint(1))
    assert weights(fresh) == taken
    saver.save(state, progress(2), background=True)
    saver.save(state, progress(3))  # waits for the one before
    assert [path.name for path in manifest.checkpoints(run.root)] == ["checkpoint-3"]
    assert not any(staging(run).iterdir()) and staging(run).stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoint-3"]


def test_a_failure_in_the_background_stops_the_run_later(run: RunDir) -> None:
    state, saver = trained(), checkpointer(run)
    saver.save(state, progress(1))
    (run.root / ".checkpoint-2.partial").write_text("in the way")
    saver.save(state, progress(2), background=True)
    with pytest.raises(RunError, match="checkpoint-2 could not be written"):
        saver.wait()
    saver.wait()
    assert [path.name for path in manifest.checkpoints(run.root)] == ["checkpoint-1"]


def of_two(state: TrainedState) -> TrainedState:
    """The same as the first of two machines with a process each sees it."""
    on_two: Any = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True, is_local_main_process=True)
    return replace(state, accelerator=on_two)


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_machine_takes_what_the_others_have_copied_as_they_say(shared: bool, run: RunDir) -> None:
    """Where they have written to a disk of their own, half of the checkpoint is not there, and it is none."""
    partial, theirs = run.partial_checkpoint(1), {"model/__1_0.distcp": {"bytes": 4, "sha256": "what machine 1 found"}}
    manifest.write_json(partial.with_name(f"{partial.name}-from-1"), theirs)
    if shared:
        (partial / "model").mkdir(parents=True)
        (partial / "model/__1_0.distcp").write_bytes(b"1234")
    saver = checkpointer(run)
    saver.save(of_two(trained()), progress(1), background=True)
    if shared:
        saver.wait()
        files = json.loads((run.checkpoint(1) / manifest.MANIFEST).read_text())["files"]
        assert set(files) == {"model/__1_0.distcp", *FILES} and files["model/__1_0.distcp"]["bytes"] == 4
    else:
        with pytest.raises(RunError, match=r"__1_0\.distcp was written by another process.* share one --output-dir"):
            saver.wait()
        assert manifest.checkpoints(run.root) == []


@pytest.mark.parametrize(
    ("format", "ranks"),
    [
        ("plain", [["model.safetensors", "optimizer.safetensors", "ema.safetensors"], []]),
        ("dcp", [[".metadata", "__0_0.distcp"], ["__1_0.distcp", "__1_1.distcp"], *[[]] * 9, ["__11_0.distcp"]]),
        (
            "deepspeed",
            [
                [
                    "zero_to_fp32.py", "state/mp_rank_00_model_states.pt",
                    "state/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
                ],
                [
                    "state/zero_pp_rank_1_mp_rank_00_model_states.pt",
                    "state/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
                    "state/zero_pp_rank_1_mp_rank_00_ema.safetensors",
                ],
                *[[]] * 9,
                ["state/zero_pp_rank_11_mp_rank_00_model_states.pt"],
            ],
        ),
    ],
)  # fmt: skip
def test_every_file_has_one_rank_that_wrote_it(format: str, ranks: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    for name in chain(*ranks):
        (tmp_path / name).touch()
    for rank, names in enumerate(ranks):
        assert FORMATS[format].written_by(rank, tmp_path) == sorted(tmp_path / name for name in names)


def test_too_little_memory_for_the_background_is_said(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    state, usage = trained(), shutil.disk_usage

    def small(folder: Path) -> Any:
        return usage(folder)._replace(free=1000) if folder == staging(run).parent else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", small)
    with pytest.raises(FitError, match=r"--async-checkpoint keeps .* bytes are missing"):
        checkpointer(run).save(state, progress(1), background=True)
