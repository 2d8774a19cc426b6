"""The loop: what is read of a step one step later, and what ends it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import LiveModel
from torch import nn
from trainer_parts import Parts, batch

from vfun_cli.errors import MetadataError, RunError
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.training import metrics
from vfun_cli.training.objectives import Corrupted
from vfun_cli.training.signals import CONTINUE, PREEMPTED

LIVE = Callable[[str], LiveModel]


class Line(nn.Module):
    """One weight; its prediction is the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 1, 1))


class Steps:
    """An adapter, and an objective whose loss is bad at one step."""

    def __init__(self, bad_step: int | None = None) -> None:
        self.bad_step, self.trained = bad_step, 0

    encoders = Encoders({}, torch.device("cpu"))

    def assemble(self, outputs: Any, keys: Any) -> Any:
        self.trained += 1
        return torch.zeros(1, 1, 1, 1, 1), {}

    def predict(self, model: nn.Module, noisy: torch.Tensor, timesteps: Any, conditions: Any) -> torch.Tensor:
        return next(model.parameters()) + noisy

    def corrupt(self, latents: torch.Tensor, keys: Any) -> Corrupted:
        value = torch.nan if keys[0].row == self.bad_step else 0.0
        return Corrupted(noisy=latents, timesteps=torch.zeros(1), target=latents + value)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, mask: Any) -> torch.Tensor:
        return (prediction - target).square().mean()


SHAPE = ClipShape(frames=9, height=64, width=64)


def made(live: LiveModel, folder: Path, steps: Steps, **options: Any) -> Parts:
    return Parts(folder, Line(), live, steps, steps, **options)


@pytest.mark.parametrize(("every", "bad"), [(2, 3), (50, 3), (2, 4), (50, 5)])
def test_a_bad_loss_names_its_own_step_and_rows_and_is_never_saved(
    every: int, bad: int, live_model: LIVE, tmp_path: Path
) -> None:
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(bad), checkpointing_steps=every)
    with pytest.raises(RunError, match=rf"loss of step {bad + 1} is nan; rank 0 trained on rows \[{bad}\]"):
        parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    assert parts.saves.steps == [step for step in (2, 4, 6) if every == 2 and step <= bad]
    assert [line["step"] for line in parts.lines()] == list(range(1, bad + 2))


def test_a_wish_to_stop_is_heard_one_step_later_and_saved_where_it_stops(live_model: LIVE, tmp_path: Path) -> None:
    steps = Steps()
    parts = made(live_model("cogvideox-fun"), tmp_path, steps)
    parts.stop.reason = lambda: PREEMPTED if steps.trained >= 2 else CONTINUE
    assert parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0) == PREEMPTED
    assert steps.trained == 3 and parts.saves.steps == [3]
    assert [line["step"] for line in parts.lines()] == [1, 2, 3]


def test_a_step_is_recorded_with_its_own_numbers(live_model: LIVE, tmp_path: Path) -> None:
    live = live_model("cogvideox-fun")
    parts = made(live, tmp_path, Steps())
    assert parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0) == CONTINUE
    lines = parts.lines()
    tokens = live.spec.model.sequence_tokens(SHAPE, live.dims)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and parts.saves.steps == [6]
    assert all(earlier["loss"] > later["loss"] for earlier, later in pairwise(lines))
    for line in lines:
        assert (line["tokens"], line["mfu"], line["padding"], line["mean_over_max_flops"]) == (tokens, None, 0, 1)
        assert line["memory_bytes"] > 1e7 and line["tflops"] > 0 and line["samples_per_second"] > 0


def test_training_that_changes_no_weight_is_refused_at_its_first_step(live_model: LIVE, tmp_path: Path) -> None:
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps())
    parts.trainer.state.optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RunError, match="changed none of the weights"):
        parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    assert parts.saves.steps == []


def test_a_step_that_cannot_show_in_the_weights_proves_nothing(live_model: LIVE, tmp_path: Path) -> None:
    """Of a warm-up the first step has no rate at all, and those after it may round away."""
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(), learning_rate=1e-9, adam_weight_decay=0.0)
    assert parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0) == CONTINUE


def test_samples_that_were_all_skipped_prove_nothing(live_model: LIVE, tmp_path: Path) -> None:
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(), adam_weight_decay=0.0)
    batches = [batch(step, SHAPE) for step in range(6)]
    bad = MetadataError("undecodable.")
    skipped = [replace(each, is_substitute=True, bad=((each.batch.requests[0], bad),)) for each in batches[:2]]
    assert parts.trainer.train(iter([*skipped, *batches[2:]]), 0) == CONTINUE
    assert parts.trainer.moved


def test_micro_batches_that_make_no_step_are_refused(live_model: LIVE, tmp_path: Path) -> None:
    """As a variable of accelerate, left in a shell, once had it."""
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps())
    parts.accelerator.gradient_accumulation_steps = 4
    try:
        with pytest.raises(RunError, match="1 micro-batches made no optimizer step"):
            parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    finally:
        parts.accelerator.gradient_accumulation_steps = 1


class Tracker:
    """Fails at the first record, or before."""

    def __init__(self, *started_with: Any) -> None:
        self.asked = 0

    def log(self, record: Any) -> None:
        self.asked += 1
        raise ConnectionError(f"no way to the server, asked {self.asked} times")

    def close(self) -> None:
        raise ConnectionError("no way to the server at the end")


@pytest.mark.parametrize("tracker", [Tracker, lambda *_: Tracker().close()], ids=["records", "start"])
def test_what_only_reports_stops_no_run(
    tracker: Any, live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(metrics.TRACKERS, "none", tracker)
    (tmp_path / "sanity_check").touch()
    (tmp_path / "metrics.jsonl").mkdir()
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps())
    monkeypatch.setattr(metrics, "write_first_batch", lambda run, loaded: run.sanity_check.mkdir())
    assert parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0) == CONTINUE
    parts.trainer.metrics.close()
    said = capsys.readouterr().err
    assert parts.saves.steps == [6]
    assert said.count("no way to the server") == 1
    assert said.count("metrics.jsonl cannot be") == 2 and said.count("the first batch cannot be written") == 1
