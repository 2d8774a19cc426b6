"""What people and programs are told about a plan."""

import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.table import ClipTable
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.picture import plot
from vfun_cli.plan.preview import preview
from vfun_cli.plan.report import plan_json, totals, why, why_lines
from vfun_cli.plan.run_plan import RunPlan

OPTIONS = PlanOptions(
    video_sample_size=256, image_sample_size=768, token_sample_size=512, video_sample_n_frames=49,
    video_sample_stride=2, random_hw_adapt=True, training_with_video_token_length=True, world_size=8,
)  # fmt: skip


def plan_of(spec: FamilySpec, table: ClipTable, options: PlanOptions = OPTIONS, num_epochs: int = 2) -> RunPlan:
    return RunPlan(spec=spec, dims=spec.model.dims, options=options, table=table, num_epochs=num_epochs)


def shown(renderable: Any, width: int, *, encoding: str = "utf-8", colour: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, force_terminal=colour, color_system="256" if colour else None).print(renderable)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_json_keeps_its_contract(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_of(plain, mixed(400))
    epochs = list(plan.epochs())
    found = json.loads(json.dumps(plan_json(plan, epochs)))
    assert found["family"] == "plain"
    assert {"size": 512, "frames": 49, "tokens": 13312}.items() <= found["sizes"][2].items()
    ledger = found["ledger"]
    assert ledger["rows"] == 400 == ledger["used"] + sum(ledger["dropped"].values())
    assert sum(bucket["clips"] for bucket in found["buckets"]) == ledger["used"]
    for bucket in found["buckets"]:
        expected = ((bucket["frames"] - 1) // 4 + 1) * (bucket["height"] // 16) * (bucket["width"] // 16) + 10
        assert bucket["tokens"] == expected
    assert sum(bucket["compute_share"] for bucket in found["buckets"]) == pytest.approx(1, abs=1e-3)
    assert found["balance"]["world_size"] == 8
    assert found["balance"]["mean_over_max_flops"] > 0.98 > found["balance"]["independent_draws"]
    assert found["steps_per_epoch"] == epochs[0].num_steps == ledger["trained"] // 8
    assert [epoch["digest"] for epoch in found["epochs"]] == [epoch.digest() for epoch in epochs]


def test_without_metadata_the_json_is_the_size_table() -> None:
    spec = FAMILIES["wan-s2v"]
    options = PlanOptions.pick(
        spec.defaults.train, video_sample_size=768, token_sample_size=512, video_sample_n_frames=49
    )
    found = plan_json(plan_of(spec, ClipTable.empty(), options))
    assert set(found) == {"family", "sizes", "image_sizes"}
    size = next(size for size in found["sizes"] if size["size"] == 512)
    assert (size["frames"], size["tokens"], size["clip_frames"]) == (49, 13312, 48)
    assert size["sequence_tokens"] > size["tokens"]
    assert found["image_sizes"] == []


def test_totals_count_seconds_of_motion_and_frame_rates(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(
        width=[512] * 3, height=[512] * 3, frames=[250, 97, 1], fps=[(25, 1), (25, 1), (0, 0)],
        is_image=[False, False, True],
    )  # fmt: skip
    options = PlanOptions(video_sample_size=512, token_sample_size=512, video_sample_n_frames=49, video_sample_stride=2)
    plan = plan_of(plain, table, options)
    sums = totals(plan, plan.first_epoch)
    assert sums.seconds_total == pytest.approx((250 + 97) / 25)
    assert sums.seconds_kept == pytest.approx((49 * 2 + 97) / 25)  # the last frame of a file has no second half
    assert [(float(fps), stride, videos) for fps, stride, videos in sums.frame_rates] == [(25.0, 2, 2)]
    assert sums.own_tokens == 2 * 13312 + 1024
    assert sums.tokens == sums.own_tokens + 3 * 10


@pytest.mark.parametrize("width", [80, 120])
def test_the_preview_fits_the_terminal_and_names_every_part(
    plain: FamilySpec, mixed: Callable[..., ClipTable], width: int
) -> None:
    plan = plan_of(plain, mixed(3000))
    text = shown(preview(plan, list(plan.epochs())), width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    parts = ("Sizes", "Buckets", "Epoch", "Rows", "Balance", "independent draws", "motion kept", "too-short", "speed")
    for part in parts:
        assert part in text


def test_an_epoch_without_steps_is_shown_too(plain: FamilySpec, tmp_path: Path) -> None:
    table = ClipTable.from_columns(width=[640], height=[640], frames=[100], fps=(25, 1))
    plan = plan_of(plain, table)
    epoch = plan.first_epoch
    assert epoch.num_steps == 0
    assert "0 in, 1 on to the next epoch" in shown(preview(plan, [epoch]), 80)
    assert plan_json(plan, [epoch])["steps_per_epoch"] == 0
    plot(tmp_path / "plan.svg", plan, epoch)


def test_what_is_shown_of_a_run_too_small_for_a_step_is_what_it_trains(plain: FamilySpec) -> None:
    plan = plan_of(plain, ClipTable.from_columns(width=[640], height=[640], frames=[100], fps=(25, 1)), num_epochs=1)
    assert [epoch.digest() for epoch in plan.epochs()] == [plan.first_epoch.digest()]
    assert plan.steps() == plan.first_epoch.num_steps == 1


def test_a_step_limit_ends_a_run_whatever_its_epochs_hold(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_of(plain, mixed(200))
    assert plan.steps() == sum(epoch.num_steps for epoch in plan.epochs()) > 3
    assert replace(plan, max_steps=3).steps() == 3


def test_the_preview_without_metadata_is_the_size_table(plain: FamilySpec) -> None:
    text = shown(preview(plan_of(plain, ClipTable.empty())), 80)
    assert "13,312" in text and "Buckets" not in text


def test_the_preview_needs_no_colour_and_no_unicode(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_of(plain, mixed(300))
    found = preview(plan, [plan.first_epoch])
    assert "\x1b" not in shown(found, 80)
    assert "\x1b[" in shown(found, 80, colour=True)
    assert "####" in shown(found, 80, encoding="ascii")


@pytest.mark.slow
def test_why_follows_a_clip_from_file_to_rank(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_of(plain, mixed(120))
    epochs = list(plan.epochs())
    batches = {
        (sample.row, sample.epoch): (batch.shape, step, rank)
        for rank in range(8)
        for epoch in epochs
        for step, of_step in enumerate(epoch.micro_batches_for(rank))
        for batch in of_step
        for sample in batch.samples
        if sample.epoch == epoch.epoch
    }
    checked = 0
    for row in range(120):
        story = why(plan, row, epochs)
        assert json.dumps(story) and why_lines(story)[0].startswith(f"row {row}: ")
        for draw in story.get("draws", ()):
            if draw["carried"]:
                assert (row, draw["epoch"]) not in batches
                continue
            shape, step, rank = batches[row, draw["epoch"]]
            assert (draw["frames"], draw["height"], draw["width"]) == (shape.frames, shape.height, shape.width)
            assert (draw["step"], draw["rank"]) == (step, rank)
            checked += 1
    assert checked > 200


def test_why_says_why_a_clip_is_dropped(plain: FamilySpec) -> None:
    table = ClipTable.from_columns(width=[640, 64], height=[480, 64], frames=[5, 90], fps=(25, 1), row=[3, 8])
    plan = plan_of(plain, table)
    short, small = (why(plan, row) for row in (3, 8))
    assert (short["dropped"], small["dropped"]) == ("too-short", "too-small")
    assert "dropped: too-short" in why_lines(short)[-1]
    with pytest.raises(ConfigError, match="no row 4"):
        why(plan, 4)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_the_same_for_the_same_plan(
    plain: FamilySpec, mixed: Callable[..., ClipTable], tmp_path: Path, suffix: str
) -> None:
    plan = plan_of(plain, mixed(400))
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        plot(file, plan, plan.first_epoch)
    assert files[0].read_bytes() == files[1].read_bytes()
    if suffix == "svg":
        root = ElementTree.parse(files[0]).getroot()
        texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "this plan" in texts and "768, 21 frames" in texts
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        for box in root.iter("{http://www.w3.org/2000/svg}rect"):
            if "x" in box.attrib:
                assert 0 <= float(box.attrib["x"]) <= float(box.attrib["x"]) + float(box.attrib["width"]) <= width
                assert 0 <= float(box.attrib["y"]) <= float(box.attrib["y"]) + float(box.attrib["height"]) <= height


def test_an_unknown_picture_format_is_refused(
    plain: FamilySpec, mixed: Callable[..., ClipTable], tmp_path: Path
) -> None:
    plan = plan_of(plain, mixed(50))
    with pytest.raises(ConfigError, match=r"plan\.gif"):
        plot(tmp_path / "plan.gif", plan, plan.first_epoch)


def test_an_epoch_without_steps_has_no_balance_and_says_why(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    plan = plan_of(plain, mixed(40), replace(OPTIONS, world_size=1000))
    found = plan_json(plan, [plan.first_epoch])
    assert found["steps_per_epoch"] == 0 and found["balance"]["mean_over_max_flops"] is None
    text = " ".join(shown(preview(plan, [plan.first_epoch]), 80).split())
    assert "no steps" in text and "100.0%" not in text.partition("Balance")[2]
    assert "warning: a step takes 1,000 micro-batches" in text
