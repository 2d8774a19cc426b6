"""The held-out loss: the same bits for any number of ranks, and nothing of the training touched by it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import FAMILIES, LiveModel
from torch import nn
from trainer_parts import Parts, batch

from vfun_cli.encoding.encode import Sample
from vfun_cli.errors import MetadataError
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import ClipShape
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.modeling.inputs import Value, nested_inputs
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.held_out import QUANTILES
from vfun_cli.run.rundir import RunDir
from vfun_cli.training import heldout
from vfun_cli.training.heldout import HeldOutLoss, records
from vfun_cli.training.looking import Stopped
from vfun_cli.training.model import adapter_options
from vfun_cli.training.objectives import FlowMatching
from vfun_cli.training.signals import CONTINUE, PREEMPTED
from vfun_cli.training.validation import Validation, held_out_look
from vfun_cli.training.variant import Variant

pytestmark = pytest.mark.slow

LIVE = Callable[[str], LiveModel]
SHAPE = ClipShape(frames=9, height=64, width=64)
TWICE = {"checkpointing_steps": 2}


class Model(nn.Module):
    """A layer, and a dropout that would use torch's own random state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.constant_(self.layer.bias, 0.1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        passed: torch.Tensor = self.dropout(self.layer(noisy))
        return passed


class Rows:
    """An adapter whose latents are its row's key."""

    encoders = Encoders({}, torch.device("cpu"))

    def __init__(self) -> None:
        self.passes: list[float] = []
        """The timestep of each forward pass that was not trained."""

    def assemble(self, outputs: Any, keys: Sequence[SampleKey]) -> Any:
        return torch.stack([key.normal("latents", (3, 2, 2, 2)) for key in keys]), {}

    def predict(self, model: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            self.passes += timesteps.tolist()
        prediction: torch.Tensor = model(noisy)
        return prediction


def request(row: int) -> SampleRequest:
    return SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=row, drops=False), record={}, kind="video", frames=9, height=64, width=64,
        stride=1, total_frames=40, fps=(16, 1),
    )  # fmt: skip


def parts_of(live: LiveModel, folder: Path, rows: Rows, **options: Any) -> Parts:
    torch.manual_seed(0)
    return Parts(folder, Model(), live, rows, FlowMatching(shift=3.0), **options)


def held_out_of(parts: Parts, rows: Rows, count: int = 5) -> HeldOutLoss:
    trainer, adapter = parts.trainer, rows
    stop: Any = parts.stop
    anything: Any = adapter
    return HeldOutLoss(
        accelerator=parts.accelerator, adapter=anything, state=trainer.state, objective=trainer.objective,
        dtype=torch.float32, requests=[request(10 * row) for row in range(count)],
        load=lambda request: Sample(inputs={}, values={}), cache=None, stop=stop,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_ranks_share_the_rows_and_come_to_the_same_bits(
    ranks: int, live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows()
    held_out = held_out_of(parts_of(live_model("cogvideox-fun"), tmp_path, rows), rows)
    alone = held_out.compute()["trained"]
    assert len(alone) == 5 and all(len(losses) == len(QUANTILES) for losses in alone)
    assert len({loss for losses in alone for loss in losses}) == 45, "each has a noise of its own"

    mine: list[dict[int, list[float]]] = []
    monkeypatch.setattr(heldout, "gather_all", lambda found: (mine.append(found), [found])[1])
    passes = []
    for rank in range(ranks):
        rows.passes.clear()
        held_out.accelerator = SimpleNamespace(  # type: ignore[assignment]
            num_processes=ranks, process_index=rank
        )
        held_out.encoded = []
        held_out.compute()
        passes.append(len(rows.passes))
    assert passes == [len(QUANTILES) * -(-5 // ranks)] * ranks, "as many collectives on each"
    assert sorted(row for found in mine for row in found) == list(range(5)), "each row counts once"
    shared = {row: losses for found in mine for row, losses in found.items()}
    assert [shared[row] for row in range(5)] == alone


def test_the_means_are_over_rows_and_then_over_quantiles() -> None:
    losses = [[float(quantile + 10 * row) for quantile in range(9)] for row in range(3)]
    (record,) = records(7, {"trained": losses}, 1.5)
    assert record["by_quantile"] == [10.0 + quantile for quantile in range(9)] and record["loss"] == 14.0
    assert (record["step"], record["weights"], record["rows"], record["seconds"]) == (7, "trained", 3, 1.5)


def test_each_row_is_seen_at_the_nine_timesteps_with_the_same_noise(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    held_out_of(parts_of(live_model("cogvideox-fun"), tmp_path, rows), rows, count=2).compute()
    sigmas = [3 * step / (1 + 2 * step) for step in QUANTILES]
    assert rows.passes == pytest.approx([1000 * sigma for sigma in sigmas] * 2)


@pytest.mark.parametrize("scheme", ["cosmap", "logit_normal"])
def test_what_a_run_asks_for_moves_the_timesteps_and_nothing_else(
    scheme: str, live_model: LIVE, tmp_path: Path
) -> None:
    """Losses of runs that weigh samples otherwise can be compared."""
    rows, asked = (
        Rows(),
        Variant(weighting_scheme=scheme, logit_mean=-2.0, motion_sub_loss_ratio=0.5, noise_share_in_frames_ratio=0.5),
    )
    held_out = held_out_of(parts_of(live_model("cogvideox-fun"), tmp_path, rows), rows, count=2)
    plain, timesteps = held_out.compute()["trained"], list(rows.passes)
    held_out.objective = FlowMatching(shift=3.0, variant=asked)
    rows.passes.clear()
    found = held_out.compute()["trained"]
    if scheme == "cosmap":
        assert (found, rows.passes) == (plain, timesteps)
    at = [1000 * held_out.objective.sigmas()[held_out.objective.at_quantile(each)].item() for each in QUANTILES]
    assert rows.passes == pytest.approx(at * 2)
    assert (found != plain) == (scheme == "logit_normal")


def test_weights_random_state_and_mode_are_afterwards_what_they_were(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows, use_ema=True)
    state = parts.trainer.state
    assert state.average is not None
    for shadow in state.average.shadow:
        shadow += 1
    before = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in state.model.named_parameters()}
    random_state = torch.get_rng_state()
    found = held_out_of(parts, rows).compute()
    assert found["ema"] != found["trained"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert state.model.training and all(weight.grad is None for weight in state.model.parameters())
    for name, weight in state.model.named_parameters():
        assert (weight.data_ptr(), True) == (before[name][0], torch.equal(weight, before[name][1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_condition_of_a_held_out_row_is_left_out(family: str, live_model: LIVE) -> None:
    """An empty caption, in any family; what else may be dropped hangs on the same draws."""
    live = live_model(family)
    options = adapter_options(live.config, live.spec, torch.device("cpu"))
    empty = []
    for drops in (True, False):
        count = 0
        for row in range(100):
            asked = live.request(row, 8, 64, 64)
            inputs = adapter_of(live.spec).inputs(replace(asked, key=replace(asked.key, drops=drops)), options)
            leaves = [leaf for each in inputs.values() for leaf in nested_inputs(each.lazy)]
            count += Value("") in leaves
        empty.append(count)
    assert empty[0] > 0 and empty[1] == 0


def look_at(parts: Parts, rows: Rows, dates: Sequence[int], first_step: int = 0) -> None:
    """Let the trainer compute the held-out loss at these steps."""
    run = RunDir(parts.metrics_file.parent)
    look = held_out_look(held_out_of(parts, rows), parts.trainer.metrics, run, first_step)
    parts.trainer.validation = Validation(iter(dates), [look])


def trained(parts: Parts, steps: int = 4, first_step: int = 0) -> int:
    parts.trainer.total_steps = steps
    return parts.trainer.train(iter(batch(step, SHAPE) for step in range(first_step, steps)), first_step)


def recorded(parts: Parts) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in parts.metrics_file.read_text().splitlines()]
    return [(line["step"], line["weights"]) for line in lines if line.get("event") == "held-out"]


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_losses_of_the_training_are_the_same_with_and_without(
    use_ema: bool, live_model: LIVE, tmp_path: Path
) -> None:
    losses = []
    for name in ("without", "with"):
        rows, folder = Rows(), tmp_path / name
        folder.mkdir()
        parts = parts_of(live_model("cogvideox-fun"), folder, rows, use_ema=use_ema, **TWICE)
        if name == "with":
            look_at(parts, rows, [0, 1, 3, 4])
        assert trained(parts) == CONTINUE and parts.saves.steps == [2, 4]
        losses.append([line["loss"] for line in parts.lines()])
    weights = ["trained", "ema"] if use_ema else ["trained"]
    assert recorded(parts) == [(step, each) for step in (0, 1, 3, 4) for each in weights]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("asked_at", [0, 20, 44])
def test_a_wish_to_stop_is_heard_within_a_forward_pass_and_leaves_no_record(
    asked_at: int, live_model: LIVE, tmp_path: Path
) -> None:
    rows = Rows()
    parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows, **TWICE)
    look_at(parts, rows, [2, 4])
    parts.stop.reason = lambda: PREEMPTED if len(rows.passes) >= asked_at and parts.saves.steps else CONTINUE
    assert trained(parts) == PREEMPTED
    assert len(rows.passes) == asked_at
    assert parts.saves.steps == [2] and recorded(parts) == []
    assert parts.trainer.state.model.training


def test_a_continuation_records_what_was_not_recorded_and_nothing_twice(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    for first_step in (0, 2, 2):
        parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows, first_step=first_step, **TWICE)
        look_at(parts, rows, [0, 2], first_step)
        if first_step == 0:
            parts.stop.reason = lambda: PREEMPTED if len(rows.passes) > 50 else CONTINUE
        trained(parts, 3, first_step)
        expected = [(0, "trained")] if first_step == 0 else [(0, "trained"), (2, "trained")]
        assert recorded(parts) == expected


def test_a_row_that_cannot_be_decoded_ends_the_run_before_its_first_step(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows)
    held_out = held_out_of(parts, rows)

    def load(request: SampleRequest) -> Sample:
        if request.key.row == 30:
            raise MetadataError("row 30 of those to validate on: it is broken.")
        return Sample(inputs={}, values={})

    held_out.load = load
    look = held_out_look(held_out, parts.trainer.metrics, RunDir(tmp_path), 0)
    parts.trainer.validation = Validation(iter([0]), [look])
    with pytest.raises(MetadataError, match="row 30 of those to validate on"):
        trained(parts)
    assert parts.lines() == [] and parts.saves.steps == []


def test_what_was_encoded_is_not_asked_for_again(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    held_out = held_out_of(parts_of(live_model("cogvideox-fun"), tmp_path, rows), rows)
    asked: list[int] = []
    held_out.load = lambda request: (asked.append(request.key.row), Sample(inputs={}, values={}))[1]
    once, again = held_out.compute(), held_out.compute()
    assert asked == [0, 10, 20, 30, 40] and once == again


def test_trackers_get_a_curve_for_each_quantile(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows, use_ema=True)
    noted: dict[str, tuple[float, int]] = {}
    tracker = SimpleNamespace(
        log=lambda record: None, log_values=lambda values, step: noted.update({n: (v, step) for n, v in values.items()})
    )
    parts.trainer.metrics.trackers["tensorboard"] = tracker  # type: ignore[assignment]
    look_at(parts, rows, [3])
    trained(parts)
    found = [json.loads(line) for line in parts.metrics_file.read_text().splitlines() if "held-out" in line]
    assert len(found) == 2 and len(noted) == 20
    for name, record in zip(("held-out", "held-out-ema"), found, strict=True):
        assert noted[f"{name}/loss"] == (record["loss"], 3)
        assert [noted[f"{name}/q{quantile}"][0] for quantile in QUANTILES] == record["by_quantile"]


def test_stopped_in_the_middle_it_can_be_asked_again(live_model: LIVE, tmp_path: Path) -> None:
    rows = Rows()
    parts = parts_of(live_model("cogvideox-fun"), tmp_path, rows)
    held_out = held_out_of(parts, rows)
    whole = held_out.compute()
    parts.stop.reason = lambda: PREEMPTED
    with pytest.raises(Stopped):
        held_out.compute()
    parts.stop.reason = lambda: CONTINUE
    assert held_out.compute() == whole
