"""Fixtures of the training tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from live_models import LiveModel
from lora_sample import model_directory
from sharded_worker import STEPS, learn, save_whole, start_whole

from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="session")
def live_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LiveModel]:
    """The demo of a family by name, made once."""
    folder: Path = tmp_path_factory.mktemp("live")
    made: dict[str, LiveModel] = {}

    def of(family: str) -> LiveModel:
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                made[family] = LiveModel(family, folder)
        return made[family]

    return of


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``sharded_worker.py`` writes, and what one process has trained before."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    model_directory(folder / "model")
    alone = start_whole("single", folder)
    learn(alone, 0, STEPS)
    save_whole(alone, "single", folder, "trained")
    run_on_two_ranks(Path(__file__).with_name("sharded_worker.py"), folder)
    return folder


@pytest.fixture
def device_restored() -> Iterator[None]:
    """A trainer of a test may work on another device than the next one."""
    accelerator: Any = Accelerator(cpu=True)
    before = accelerator.state.device
    yield
    accelerator.state.device = before


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
