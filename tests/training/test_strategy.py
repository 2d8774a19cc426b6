"""A rank trains as the run asks for, or not at all."""

from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from tests.two_ranks import run_on_ranks
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import RunError
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training import model, waiting
from vfun_cli.training import strategy as strategies
from vfun_cli.training.signals import CONTINUE
from vfun_cli.training.strategy import make_accelerator
from vfun_cli.training.turns import begin_step
from vfun_cli.training.waiting import COLLECTIVE_LIMIT, FILES_LIMIT, TURN_LIMIT, wait_for_all

pytestmark = pytest.mark.usefixtures("no_accelerator")

CONFIG = RunConfig(
    strategy="single", device="cpu", num_processes=1, gradient_accumulation_steps=2, mixed_precision="bf16"
)


def test_an_environment_that_asks_for_other_processes_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="asks for 1 processes, but the environment of this process makes it 2"):
        make_accelerator(CONFIG)


def test_what_a_shell_says_of_steps_and_precision_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = make_accelerator(CONFIG)
    assert (accelerator.gradient_accumulation_steps, accelerator.native_amp) == (2, False)


def asked_of_accelerate(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """The settings that the accelerator of such a run gets."""
    asked: dict[str, Any] = {}
    monkeypatch.setenv("FSDP_VERSION", "2")  # of the launch file
    made = SimpleNamespace(num_processes=1, gradient_accumulation_steps=1)
    monkeypatch.setattr(strategies, "Accelerator", lambda **settings: asked.update(settings) or made)
    make_accelerator(RunConfig(num_processes=1, **options))
    found: list[Any] = asked["kwargs_handlers"]
    return found


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_ranks_on_gpus_wait_ten_minutes_for_each_other_and_for_files_longer(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of_accelerate(monkeypatch, strategy=strategy, device="cuda")
    group = next(each for each in asked if isinstance(each, InitProcessGroupKwargs))
    assert (group.backend, group.timeout) == ("nccl", timedelta(minutes=10))
    assert COLLECTIVE_LIMIT * 10 < FILES_LIMIT


def test_ranks_wait_for_each_others_disks_before_ddp_begins_with_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(model, "wait_for_all", lambda: order.append("waited"))
    lazy: Any = SimpleNamespace(placed=lambda *given: iter([order.append("read")]))
    device = torch.device("cpu")
    accelerator = SimpleNamespace(device=device, prepare=lambda *given: order.append("prepared") or given)
    model._WRAP[None](lambda named: torch.optim.SGD(named.values()), torch.nn.Linear(1, 1), accelerator, lazy)
    assert order == ["read", "waited", "prepared"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ddp_keeps_no_second_copy_of_the_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of_accelerate(monkeypatch, strategy="ddp", device=device)
    (wrapping,) = (each.to_kwargs() for each in asked if isinstance(each, DistributedDataParallelKwargs))
    assert wrapping["gradient_as_bucket_view"]


def test_ranks_begin_a_step_and_wait_for_files_on_gloo_whatever_the_devices_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each in a group of its own, made once."""
    made, used = list[dict[str, Any]](), list[str]()
    monkeypatch.setattr(waiting, "_beside", cache(waiting._beside.__wrapped__))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or f"group {len(made)}")
    monkeypatch.setattr(dist, "all_reduce", lambda numbers, op, group: used.append(f"{op.name} {group}"))
    monkeypatch.setattr(dist, "barrier", lambda group: used.append(f"barrier {group}"))
    stop: Any = SimpleNamespace(reason=lambda: CONTINUE)
    for _ in range(2):
        assert begin_step(lambda: None, 0, stop, Encoders({}, torch.device("cpu"))) == (CONTINUE, [])
        wait_for_all()
    assert used == ["MAX group 1", "barrier group 2"] * 2
    assert made == [{"backend": "gloo", "timeout": limit} for limit in (TURN_LIMIT, FILES_LIMIT)]


@pytest.mark.slow
def test_four_ranks_sum_a_step_alike_whether_their_launch_begins_with_it(tmp_path: Path) -> None:
    run_on_ranks(4, Path(__file__).parent / "ddp_worker.py", tmp_path)
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["True"] * 4
