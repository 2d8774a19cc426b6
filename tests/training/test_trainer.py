"""The loop: what is read of a step one step later, and what ends it."""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import LiveModel
from torch import nn
from trainer_parts import Parts, batch, loaded

from vfun_cli.errors import MetadataError, RunError
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.run.rundir import RunDir
from vfun_cli.training import metrics
from vfun_cli.training.model import adapter_options
from vfun_cli.training.objectives import Corrupted, make_objective
from vfun_cli.training.signals import CONTINUE, PREEMPTED
from vfun_cli.training.variant import variant_of

LIVE = Callable[[str], LiveModel]


class Line(nn.Module):
    """One weight; its prediction is the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 1, 1))


class Steps:
    """An adapter, and an objective; at one step its loss is bad, or the gradient of a good loss."""

    def __init__(self, bad_step: int | None = None, what: str = "loss") -> None:
        self.bad_step, self.what, self.trained = bad_step, what, 0

    encoders = Encoders({}, torch.device("cpu"))

    def assemble(self, outputs: Any, keys: Any) -> Any:
        self.trained += 1
        return torch.zeros(1, 1, 1, 1, 1), {}

    def predict(self, model: nn.Module, noisy: torch.Tensor, timesteps: Any, conditions: Any) -> torch.Tensor:
        prediction = next(model.parameters()) + noisy
        if self.bad and self.what == "gradient norm":
            prediction.register_hook(lambda gradient: gradient * torch.nan)
        return prediction

    def corrupt(self, latents: torch.Tensor, keys: Any) -> Corrupted:
        self.bad = keys[0].row == self.bad_step
        value = torch.nan if self.bad and self.what == "loss" else 0.0
        return Corrupted(noisy=latents, timesteps=torch.zeros(1), target=latents + value)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, mask: Any, weights: Any) -> torch.Tensor:
        return (prediction - target).square().mean()


SHAPE = ClipShape(frames=9, height=64, width=64)


def made(live: LiveModel, folder: Path, steps: Steps, **options: Any) -> Parts:
    return Parts(folder, Line(), live, steps, steps, **options)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize(("every", "bad"), [(2, 3), (50, 3), (2, 4), (50, 5), (1, 0)])
def test_a_bad_step_names_itself_and_its_rows_and_is_never_saved(
    what: str, every: int, bad: int, live_model: LIVE, tmp_path: Path
) -> None:
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(bad, what), checkpointing_steps=every)
    with pytest.raises(RunError, match=rf"the {what} of step {bad + 1} is nan; rank 0 trained on rows \[{bad}\]"):
        parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    assert parts.saves.steps == [step for step in (2, 4, 6) if every == 2 and step <= bad]
    assert [line["step"] for line in parts.lines()] == list(range(1, bad + 2))


class Layer(Line):
    """The same as a layer with a child of its own, in front of a list of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.first.add_module("seldom", nn.Linear(1, 1))
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        (block,) = self.blocks
        return self.weight * block(self.first(noisy + 1))  # type: ignore[no-any-return]


class Layers(Steps):
    """Steps of that model."""

    def predict(self, model: nn.Module, noisy: torch.Tensor, timesteps: Any, conditions: Any) -> torch.Tensor:
        prediction: torch.Tensor = model(noisy)
        if self.bad:
            prediction.register_hook(lambda gradient: gradient * torch.nan)
        return prediction


@pytest.mark.parametrize("seen", [{9}, set(), set(range(12))], ids=["one rank's", "nobody saw it", "all"])
def test_a_bad_gradient_names_the_rank_whose_own_it_was_or_all_rows(
    seen: set[int], live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve ranks, of which this one trains and the others have its numbers."""
    steps = Layers(1, "gradient norm")
    trainer = Parts(tmp_path, Layer(), live_model("cogvideox-fun"), steps, steps).trainer
    monkeypatch.setattr("vfun_cli.training.trainer.gather_all", lambda rows: [[100 + rank] for rank in range(12)])
    gather = trainer.gather

    def of_twelve(*numbers: Any) -> torch.Tensor:
        ranks = gather(*numbers).repeat(12, 1)
        assert math.isfinite(ranks[0, 1]) == (not ranks[0, 3]), "seen where it was"
        ranks[:, 3] = torch.tensor([rank in seen and bool(ranks[0, 3]) for rank in range(12)])
        return ranks

    trainer.gather = of_twelve  # type: ignore[method-assign]
    with pytest.raises(RunError) as caught:
        trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    named = re.findall(r"rank (\d+) trained on rows \[1(\d+)\]", caught.value.message)
    file = RunDir(tmp_path).bad_step
    if len(seen) == 1:
        assert named == [("9", "09")] and not file.exists()
        return
    assert [int(rank) for rank, _ in named] == [*range(8)] == [int(row) for _, row in named]
    assert f"the rows of all 12 such ranks are in {file}" in caught.value.message
    assert json.loads(file.read_text()) == {"step": 2, "rows": {str(rank): [100 + rank] for rank in range(12)}}


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("told_after", [2, 3])
def test_a_run_that_is_stopped_saves_no_bad_step(what: str, told_after: int, live_model: LIVE, tmp_path: Path) -> None:
    """The second step is bad; the wish to stop comes with it or with the one after."""
    steps = Steps(1, what)
    parts = made(live_model("cogvideox-fun"), tmp_path, steps)
    parts.stop.reason = lambda: PREEMPTED if steps.trained >= told_after else CONTINUE
    with pytest.raises(RunError, match=f"the {what} of step 2 is nan"):
        parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)
    assert parts.saves.steps == []


def test_a_step_that_the_strategy_leaves_out_for_its_gradients_is_called_bad(live_model: LIVE, tmp_path: Path) -> None:
    """As DeepSpeed does: the weights stay as they are."""
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(0, "gradient norm"))
    parts.trainer.state.optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RunError, match="the gradient norm of step 1 is nan"):
        parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0)


@pytest.mark.parametrize(("limit", "moment"), [(0, 0.2), (0.5, 0.05)])
def test_a_limit_of_zero_clips_no_gradient(limit: float, moment: float, live_model: LIVE, tmp_path: Path) -> None:
    """The gradient is 2; AdamW's first moment is a tenth of what is left of it."""
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(), max_grad_norm=limit)
    parts.trainer.total_steps = 1
    parts.trainer.train(iter([batch(0, SHAPE)]), 0)
    (state,) = parts.trainer.state.optimizer.state.values()
    assert state["exp_avg"].item() == pytest.approx(moment, rel=1e-3)
    assert parts.lines()[0]["grad_norm"] == pytest.approx(2)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_wish_to_stop_is_heard_before_the_next_step_though_its_clips_never_come(
    hangs: bool, live_model: LIVE, tmp_path: Path
) -> None:
    steps = Steps()
    parts = made(live_model("cogvideox-fun"), tmp_path, steps)
    asked = iter([CONTINUE] * 4)
    parts.stop.reason = lambda: next(asked, PREEMPTED)
    arriving = (None if hangs and step >= 2 else batch(step, SHAPE) for step in range(100))
    assert parts.trainer.train(arriving, 0) == PREEMPTED
    done = 2 if hangs else 4
    assert steps.trained == done and parts.saves.steps == [done]
    assert [line["step"] for line in parts.lines()] == list(range(1, done + 1))


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
    monkeypatch.setitem(metrics.TRACKERS, "tensorboard", tracker)
    (tmp_path / "sanity_check").touch()
    (tmp_path / "metrics.jsonl").mkdir()
    parts = made(live_model("cogvideox-fun"), tmp_path, Steps(), report_to="tensorboard")
    monkeypatch.setattr(metrics, "write_first_batch", lambda run, loaded: run.sanity_check.mkdir())
    assert parts.trainer.train(iter(batch(step, SHAPE) for step in range(6)), 0) == CONTINUE
    parts.trainer.metrics.close()
    said = capsys.readouterr().err
    assert parts.saves.steps == [6]
    assert said.count("no way to the server") == 1
    assert said.count("metrics.jsonl cannot be") == 2 and said.count("the first batch cannot be written") == 1


DENSITY: dict[str, Any] = {"weighting_scheme": "logit_normal", "uniform_sampling": False, "logit_mean": -1.0}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("wan-fun-control", {"weighting_scheme": "sigma_sqrt"}),
    ("wan-fun-control", {"weighting_scheme": "cosmap"}),
    ("wan-fun-control", DENSITY),
    ("wan-fun-control", {"weighting_scheme": "mode", "uniform_sampling": False}),
    ("wan-fun-control", {"motion_sub_loss": True}),
    ("wan-fun-control", {"noise_share_in_frames": True}),
    ("wan-fun-control", {**DENSITY, "motion_sub_loss": True, "noise_share_in_frames": True}),
    ("cogvideox-fun", {"motion_sub_loss": True, "motion_sub_loss_ratio": 0.5}),
    ("cogvideox-fun", {"noise_share_in_frames": True, "noise_share_in_frames_ratio": 0.75}),
    ("hunyuanvideo-t2v", {"guidance_scale": 2.0}),
    ("hunyuanvideo-i2v", {"weighting_scheme": "cosmap", "motion_sub_loss": True}),
]


def trained(live: LiveModel, folder: Path, steps: range, before: nn.Module | None, **options: Any) -> Any:
    """The model, the optimizer's state and the losses of these steps; of a fresh model, or one that goes on."""
    folder.mkdir()
    config = replace(live.config, **options)
    objective = make_objective(
        live.spec.model.objective, live.spec.model.objective_options, live.folder, variant_of(config)
    )
    adapter = copy.copy(live.adapter)
    adapter.options = adapter_options(config, live.spec, torch.device("cpu"))
    model, moments = before or (live.transformer(), None)
    parts = Parts(folder, model, live, adapter, objective, learning_rate=1e-3, first_step=steps.start)
    if moments is not None:
        parts.trainer.state.optimizer.load_state_dict(moments)
    _, clip = live.cached(12, 64, 64)
    requests = [live.request(row, 12, 64, 64) for row in range(10)]
    parts.trainer.total_steps = steps.stop
    batches = (loaded(step, requests[2 * step : 2 * step + 2], [clip, clip]) for step in steps)
    assert parts.trainer.train(batches, steps.start) == CONTINUE
    state = parts.trainer.state.model, copy.deepcopy(parts.trainer.state.optimizer.state_dict())
    return state, [line["loss"] for line in parts.lines()]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), ASKED, ids=str)
def test_what_a_run_asks_for_is_trained_with_and_goes_on_as_if_it_had_not_stopped(
    family: str, options: dict[str, Any], live_model: LIVE, tmp_path: Path
) -> None:
    """Micro-batches of two clips."""
    live = live_model(family)
    _, without = trained(live, tmp_path / "without", range(4), None)
    (whole, _), losses = trained(live, tmp_path / "whole", range(4), None, **options)
    half, first = trained(live, tmp_path / "half", range(2), None, **options)
    (resumed, _), second = trained(live, tmp_path / "resumed", range(2, 4), half, **options)
    assert all(math.isfinite(loss) for loss in losses) and losses[0] != without[0]
    assert first + second == losses
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
