"""Rows that are validated on: which, as what, when, and what that costs."""

import json
from collections.abc import Callable
from itertools import islice, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfun_cli import families
from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.metadata.checks import table_without_files
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.held_out import QUANTILES, HeldOut, hold_out
from vfun_cli.plan.report import plan_json, why
from vfun_cli.plan.run_plan import RunPlan

SPEC = families.find("cogvideox-fun")
DIMS = SPEC.model.dims


def row(video: str, text: str = "", frames: int = 100) -> dict[str, Any]:
    return {
        "file_path": video, "text": text, "type": "video", "width": 640, "height": 640, "frames": frames, "fps": 24,
    }  # fmt: skip


VIDEOS = [f"clips/{number}.mp4" for number in range(30)]


@pytest.fixture(scope="session")
def table_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[RunConfig, ClipTable]]:
    """The options of a run on these rows, and its table with what is held out marked."""
    meta = tmp_path_factory.mktemp("rows") / "metadata.json"

    def make(rows: list[dict[str, Any]], **options: Any) -> tuple[RunConfig, ClipTable]:
        meta.write_text(json.dumps(rows), encoding="utf-8")
        config = RunConfig(**{"train_data_meta": parse_data_sets(meta, "meta"), "num_processes": 1, **options})
        table = table_without_files(read_metadata(meta))
        assert table is not None
        return config, hold_out(config, SPEC, DIMS, table)

    return make


def chosen(rows: list[dict[str, Any]], table: ClipTable) -> set[str]:
    return {rows[index]["file_path"] for index in np.flatnonzero(table.held_out)}


@pytest.mark.slow
@given(order=st.permutations(VIDEOS), wanted=st.integers(1, 29), seed=st.integers(0, 2**63 - 1))
def test_which_rows_are_held_out_does_not_depend_on_their_order(
    order: list[str], wanted: int, seed: int, table_of: Callable[..., Any]
) -> None:
    found = []
    for videos in (VIDEOS, order):
        rows = [row(video) for video in videos]
        _, table = table_of(rows, validation_rows=wanted, seed=seed)
        found.append(chosen(rows, table))
    assert found[0] == found[1] and len(found[0]) == wanted


def test_other_seeds_hold_out_other_rows_and_more_rows_the_same_and_others(table_of: Callable[..., Any]) -> None:
    rows = [row(video) for video in VIDEOS]
    by_seed = {frozenset(chosen(rows, table_of(rows, validation_rows=5, seed=seed)[1])) for seed in range(20)}
    assert len(by_seed) > 15
    sizes = [chosen(rows, table_of(rows, validation_rows=wanted)[1]) for wanted in range(1, 30)]
    assert all(fewer < more for fewer, more in pairwise(sizes))


def test_rows_of_one_video_are_held_out_together(table_of: Callable[..., Any]) -> None:
    for order in islice(permutations(range(8)), 0, 40320, 4001):
        rows = [row(f"{number // 2}.mp4", text=str(number)) for number in order]
        _, table = table_of(rows, validation_rows=3)
        held_out = chosen(rows, table)
        assert len(held_out) == 2 and table.held_out.sum() == 4
        assert [each["file_path"] in held_out for each in rows] == table.held_out.tolist()


def test_only_rows_that_could_be_trained_are_held_out(table_of: Callable[..., Any]) -> None:
    rows = [row(video, frames=1 if index % 2 else 100) for index, video in enumerate(VIDEOS)]
    _, table = table_of(rows, validation_rows=14)
    assert table.held_out.sum() == 14 and not table.held_out[1::2].any()


@pytest.mark.parametrize("wanted", [30, 31])
def test_something_is_left_to_train_on(wanted: int, table_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=f"validation_rows {wanted} of the 30 rows .* nothing to train on") as caught:
        table_of([row(video) for video in VIDEOS], validation_rows=wanted)
    assert "--validation-meta" in str(caught.value.hint)


def plan_of(config: RunConfig, table: ClipTable, **more: Any) -> RunPlan:
    return RunPlan.of(config, SPEC, DIMS, table, **more)


def held_out_of(plan: RunPlan) -> HeldOut:
    assert plan.held_out is not None
    return plan.held_out


def test_held_out_rows_are_in_the_ledger_and_in_no_epoch(table_of: Callable[..., Any]) -> None:
    config, table = table_of([row(video) for video in VIDEOS], validation_rows=7, num_train_epochs=3)
    plan, held_out = plan_of(config, table), set(np.flatnonzero(table.held_out).tolist())
    epochs = list(plan.epochs())
    assert len(epochs) == 3
    for epoch in epochs:
        assert not held_out & set(epoch.row.tolist()) and len(epoch.row) == 23
    found = plan_json(plan, epochs)
    ledger = found["ledger"]
    assert ledger["dropped"] == {"held-out": 7} and ledger["used"] + 7 == ledger["rows"] == 30
    assert why(plan, min(held_out), epochs)["dropped"] == "held-out"


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_held_out_row_is_one_clip_whatever_the_ranks(world_size: int, table_of: Callable[..., Any]) -> None:
    options = {"validation_rows": 7, "training_with_video_token_length": True, "image_sample_size": 1024}
    config, table = table_of([row(video) for video in VIDEOS], **options)
    found = held_out_of(plan_of(config, table, world_size=world_size))
    assert found == held_out_of(plan_of(config, table, world_size=3))
    assert [clip.row for clip in found.clips] == np.flatnonzero(table.held_out).tolist()
    assert len({clip.shape for clip in found.clips}) > 1


def test_the_cost_of_a_look_is_that_of_its_forward_passes(table_of: Callable[..., Any]) -> None:
    options = {"validation_rows": 6, "validation_steps": 12, "max_train_steps": 1000}
    config, table = table_of([row(video) for video in VIDEOS], **options)
    plan = plan_of(config, table)
    found, clips = plan_json(plan, [plan.first_epoch])["held_out"], held_out_of(plan).clips
    one = SPEC.model.forward_flops(clips[0].shape, DIMS)
    assert {clip.shape for clip in clips} == {clips[0].shape}, "all of one size here"
    assert found["rows"] == 6 and found["passes"] == 6 * len(QUANTILES) == 54
    assert found["flops"] == pytest.approx(54 * one) and found["every_steps"] == 12
    assert found["share_of_training"] == pytest.approx(54 / (12 * 3), rel=1e-3)
    averaged = plan_of(RunConfig(**{**vars(config), "use_ema": True}), table)
    assert plan_json(averaged, [averaged.first_epoch])["held_out"]["passes"] == 108


def test_the_cost_of_samples_is_that_of_their_denoising_steps(table_of: Callable[..., Any]) -> None:
    options = {"validation_rows": 6, "validation_steps": 120, "max_train_steps": 1000}
    config, table = table_of([row(video) for video in VIDEOS], **options)
    one = SPEC.model.forward_flops(held_out_of(plan_of(config, table)).clips[0].shape, DIMS)
    for changed, passes in (
        ({}, 6 * SPEC.sampling.steps * 2),
        ({"validation_sampling_steps": 8}, 6 * 8 * 2),
        ({"validation_sampling_steps": 8, "use_ema": True}, 2 * 6 * 8 * 2),
        ({"validation_sampling_steps": 8, "validation_guidance": 1.0}, 6 * 8),
    ):
        plan = plan_of(RunConfig(**{**vars(config), **changed}), table)
        found = plan_json(plan, [plan.first_epoch])["samples"]
        assert (found["rows"], found["passes"], found["every_steps"]) == (6, passes, 120)
        assert found["flops"] == pytest.approx(passes * one)
        assert found["share_of_training"] == pytest.approx(passes / (120 * 3), rel=1e-3)
    without = plan_of(RunConfig(**{**vars(config), "validation_samples": False}), table)
    assert "samples" not in plan_json(without, [without.first_epoch])


def test_a_plan_without_held_out_rows_says_nothing_of_them(table_of: Callable[..., Any]) -> None:
    config, table = table_of([row(video) for video in VIDEOS])
    plan = plan_of(config, table)
    assert plan.held_out is None and not {"held_out", "samples"} & plan_json(plan, [plan.first_epoch]).keys()
    assert list(plan.validations()) == []


def test_rows_of_their_own_take_none_from_the_training(table_of: Callable[..., Any], tmp_path: Path) -> None:
    config, table = table_of([row(video) for video in VIDEOS], validation_meta=tmp_path / "validation.json")
    own = ClipTable.from_columns(width=[640] * 2, height=[640] * 2, frames=[100, 1], fps=(24, 1))
    plan = plan_of(config, table, validation_table=own)
    assert plan.first_epoch.ledger.used == 30
    assert [clip.row for clip in held_out_of(plan).clips] == [0], "the other one is too short"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"validation_steps": 20, "max_train_steps": 50}, [0, 20, 40, 50]),
        ({"checkpointing_steps": 25, "max_train_steps": 50}, [0, 25, 50]),
        ({"validation_epochs": 1, "num_train_epochs": 3}, [0, 23, 46, 69]),
        ({"validation_epochs": 2, "max_train_steps": 100}, [0, 46, 92, 100]),
        ({"validation_epochs": 1, "validation_steps": 23, "max_train_steps": 60}, [0, 23, 46, 60]),
        ({"validation_epochs": 1, "validation_steps": 30, "max_train_steps": 60}, [0, 23, 30, 46, 60]),
        ({"validation_steps": 100, "max_train_steps": 0}, [0]),
    ],
)
def test_a_run_validates_before_its_first_step_as_often_as_asked_and_after_its_last(
    options: dict[str, Any], expected: list[int], table_of: Callable[..., Any]
) -> None:
    config, table = table_of([row(video) for video in VIDEOS], validation_rows=7, **options)
    assert list(plan_of(config, table).validations()) == expected
