"""A rank trains as the run asks for, or not at all."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import RunError
from vfun_cli.training import strategy as strategies
from vfun_cli.training.strategy import make_accelerator
from vfun_cli.training.waiting import COLLECTIVE_LIMIT, FILES_LIMIT


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_ranks_on_gpus_wait_half_an_hour_for_each_other_and_for_files_longer(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("FSDP_VERSION", "2")  # of the launch file
    made = SimpleNamespace(num_processes=1, gradient_accumulation_steps=1)
    monkeypatch.setattr(strategies, "Accelerator", lambda **settings: asked.update(settings) or made)
    make_accelerator(RunConfig(strategy=strategy, device="cuda", num_processes=1))
    group = next(each for each in asked["kwargs_handlers"] if isinstance(each, InitProcessGroupKwargs))
    assert (group.backend, group.timeout) == ("nccl", timedelta(minutes=30))
    assert COLLECTIVE_LIMIT * 10 < FILES_LIMIT
