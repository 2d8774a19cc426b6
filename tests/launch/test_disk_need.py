"""What is said of the disk before a run starts."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vfun_cli.config.options import RunConfig
from vfun_cli.launch.disk_need import checkpoint_bytes, disk_need

COUNT = 4
"""Bytes of a parameter's count of steps."""
S2V = 16_296_000_000
"""Parameters of Wan2.2-S2V."""


def job(folder: Path, *, found: int | None = None, steps: int | None = None, **options: Any) -> Any:
    """Of ten epochs of 100 steps, where no number of steps is given."""
    config = RunConfig(**{"strategy": "fsdp", "output_dir": folder / "not" / "there", **options})
    plan = SimpleNamespace(max_steps=steps, num_epochs=10, first_epoch=SimpleNamespace(num_steps=100))
    start = None if found is None else SimpleNamespace(step=found)
    return SimpleNamespace(command="train", config=config, plan=plan, found=start, trained=[(S2V,)])


@pytest.mark.parametrize(
    ("given", "checkpoints"),
    [
        ({}, 20),
        ({"steps": 60}, 2),
        ({"steps": 50}, 1),
        ({"steps": 0}, 1),
        ({"steps": 210, "found": 100}, 3),
        ({"steps": 210, "found": 120}, 2 + 1),
        ({"checkpoints_total_limit": 2}, 3),
        ({"checkpoints_total_limit": 2, "steps": 60}, 2),
        ({"checkpointing_steps": 1000}, 1),
    ],
)
def test_the_checkpoints_to_come_are_counted_as_they_are_saved(
    given: dict[str, Any], checkpoints: int, tmp_path: Path
) -> None:
    assert disk_need(job(tmp_path, **given)).checkpoints == checkpoints


@pytest.mark.parametrize(
    ("command", "options", "each"),
    [
        ("train", {"strategy": "fsdp"}, 12),
        ("train", {"strategy": "zero3"}, 12),
        ("train", {"strategy": "zero2"}, 14),
        ("train", {"strategy": "zero2", "mixed_precision": "no"}, 16),
        ("train", {"strategy": "ddp", "use_ema": True}, 16),
        ("train", {"strategy": "zero3", "use_ema": True}, 16),
        ("lora", {"strategy": "zero2"}, 12),
    ],
)
def test_a_checkpoint_takes_so_many_bytes_a_parameter(command: str, options: dict[str, Any], each: int) -> None:
    assert checkpoint_bytes(command, RunConfig(**options), [(1000,)]) == 1000 * each + COUNT


@pytest.mark.parametrize(
    ("free", "given", "said"),
    [
        (10e12, {}, "all 20 checkpoints of this run are kept, 3.91 TB"),
        (50e12, {}, ""),
        (10e12, {"steps": 250}, ""),
        (3e12, {}, "will take 3.91 TB, and 3 TB are free"),
        (3e12, {"checkpoints_total_limit": 2}, ""),
        (500e9, {"checkpoints_total_limit": 2}, "will take 587 GB, and 500 GB are free"),
    ],
)
def test_what_does_not_fit_or_grows_without_limit_is_a_warning(
    free: float, given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(free)))
    planned = job(tmp_path, **given)
    need = disk_need(planned)
    warning = need.warning(planned.config.checkpoints_total_limit)
    assert (said in warning and "--checkpoints-total-limit" in warning) if warning else not said
    assert str(need).startswith("checkpoints: 196 GB each, at most ") and str(need).endswith(" are free")
