"""What a person sees while a run trains."""

import io
import json
from pathlib import Path
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
FACTS = (
    "0.1235",
    "2.0e-05",
    "2.10 s/step",
    "37440 tok/s",
    "wait 5%",
    "mfu 43.2%",
    "120.0 GiB",
    "30:00:00",
    "12345/20000",
)


def seen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, record: dict[str, Any] = RECORD) -> str:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, width=80, color_system=None))
    display = progress.Bar(0) if terminal else progress.Lines()
    with display:
        display.show(record)
    return shown.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_fact_of_a_step_is_seen_in_eighty_columns(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = seen(monkeypatch, terminal=terminal)
    assert all(fact in text for fact in FACTS), text
    assert "…" not in text
    assert terminal or text.count("\n") == 1, "one line an update, however long it is"


def line(step: int, total: int) -> str:
    return json.dumps({**RECORD, "step": step, "total_steps": total}) + "\n"


def test_a_continuation_from_an_older_checkpoint_shows_its_own_steps(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    kept = line(1, 4) + line(2, 4)
    metrics.write_text(kept + line(3, 4) + line(4, 4))
    steps = progress.NewSteps(metrics, 2, before=progress.stamp(metrics))
    assert steps.read() == [], "these are the steps of the launch before"
    metrics.write_text(kept)  # what the ranks begin with
    assert steps.read() == []
    with metrics.open("a") as file:
        file.write(line(3, 6) + '{"event": "checkpoint", "step": 3}\n' + "\0\0half\n" + line(4, 6) + line(5, 6)[:9])
    assert [(each["step"], each["total_steps"]) for each in steps.read()] == [(3, 6), (4, 6)]
    with metrics.open("a") as file:
        file.write(line(5, 6)[9:])
    assert [each["step"] for each in steps.read()] == [5]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("loss", "said"), [("0.25", "held-out loss 0.2500"), ("null", "held-out loss nan")])
def test_the_newest_held_out_loss_stays_in_sight(
    terminal: bool, loss: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    looks = [
        f'{{"event": "held-out", "step": 2, "weights": "{name}", "loss": {loss}}}\n' for name in ("trained", "ema")
    ]
    metrics.write_text(line(1, 2) + looks[0] + looks[1].replace(loss, "9.0") + line(2, 2))
    first, second = progress.NewSteps(metrics, 0).read()
    texts = [seen(monkeypatch, terminal=terminal, record=each) for each in (first, second)]
    assert "held-out" not in texts[0] and said in texts[1]
    assert all(fact in texts[1] for fact in FACTS[:-1]) and "…" not in texts[1]


def test_a_first_launch_shows_every_step_and_what_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with progress.shown(metrics, 0) as show_new:
        show_new()
        metrics.mkdir()
        show_new()
    metrics.rmdir()
    steps = progress.NewSteps(metrics, 0)
    metrics.write_text(line(1, 2))
    assert [each["step"] for each in steps.read()] == [1]
