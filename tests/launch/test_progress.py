"""What a person sees while a run trains."""

import io
from typing import Any

import pytest
from rich.console import Console

from vfun_cli import console
from vfun_cli.launch import progress

RECORD: dict[str, Any] = {
    "step": 12345,
    "total_steps": 20000,
    "loss": 0.12345,
    "learning_rate": 2e-5,
    "tokens_per_second": 37440.0,
    "seconds": 2.0,
    "data_wait": 0.1,
    "mfu": 0.4321,
    "memory_bytes": 120 * 2**30,
    "seconds_left": 36_000 * 3,
}
FACTS = ("0.1235", "2.0e-05", "37440 tok/s", "wait 5%", "mfu 43.2%", "120.0 GiB", "30:00:00", "12345/20000")


def seen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, width=80, color_system=None))
    display = progress.Bar(0) if terminal else progress.Lines()
    with display:
        display.show(RECORD)
    return shown.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_fact_of_a_step_is_seen_in_eighty_columns(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = seen(monkeypatch, terminal=terminal)
    assert all(fact in text for fact in FACTS), text
    assert "…" not in text
