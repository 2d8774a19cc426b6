"""What a rank decodes ahead is bounded by the room in /dev/shm, whether it trains or fills a cache."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.launch.job import decide
from vfun_cli.plan.queue import MOST_AHEAD
from vfun_cli.training.data import loader
from vfun_cli.training.data.fill import fill_cache
from vfun_cli.training.session import train
from vfun_cli.training.signals import StopFlag


class Asked(Exception):
    """Micro-batches that each decoding process may have ready."""


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(("command", "work"), [("train", train), ("cache", fill_cache)])
def test_a_rank_decodes_less_ahead_where_shared_memory_is_small(
    command: str, work: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # a rank sets it for good
    spec = families.find("cogvideox-fun")
    given: dict[str, Any] = {
        "device": "cpu", "strategy": "single", "num_processes": 1, "dataloader_num_workers": 1,
        "output_dir": Path("run"), "cache": Path("cache"),
    }  # fmt: skip
    job = decide(command, spec, resolve(command, spec, given, demo=demo_default.make(spec), environ={}))

    def asked(*_: Any, prefetch_factor: int, **__: Any) -> None:
        raise Asked(prefetch_factor)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=1 << 40))
    monkeypatch.setattr(loader, "DataLoader", asked)
    monkeypatch.setattr(loader.forkserver, "start", lambda module: None)
    with pytest.raises(Asked) as caught:
        work(job.run, job.description(), StopFlag(job.run, reads_file=False))
    assert caught.value.args == (1,) and MOST_AHEAD > 1
