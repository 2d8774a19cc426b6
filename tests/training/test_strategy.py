"""A rank trains as the run asks for, or not at all."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState

from vfun_cli.config.options import RunConfig
from vfun_cli.errors import RunError
from vfun_cli.training.strategy import make_accelerator


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WORLD_SIZE", "2", "asks for 1 processes, but the environment of this process makes it 2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "asks for 2 micro-batches a step, but .* makes it 4"),
    ],
)
def test_an_environment_that_asks_for_something_else_is_refused_at_once(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    config = RunConfig(
        strategy="single", device="cpu", num_processes=1, gradient_accumulation_steps=2, mixed_precision="no"
    )
    with pytest.raises(RunError, match=said):
        make_accelerator(config)
