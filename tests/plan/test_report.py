"""What people and programs are told about a plan."""

import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
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
from vfun_cli.plan.schedule import plan_epoch, plan_epochs

OPTIONS = PlanOptions(
    video_sample_size=256, image_sample_size=768, token_sample_size=512, video_sample_n_frames=49,
    video_sample_stride=2, random_hw_adapt=True, training_with_video_token_length=True, world_size=8,
)  # fmt: skip


def shown(renderable: Any, width: int, *, encoding: str = "utf-8", colour: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, force_terminal=colour, color_system="256" if colour else None).print(renderable)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_json_keeps_its_contract(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    table = mixed(400)
    plans = list(plan_epochs(plain, plain.model.dims, table, OPTIONS, 2))
    found = json.loads(json.dumps(plan_json(plain, plain.model.dims, OPTIONS, table, plans)))
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
    assert found["steps_per_epoch"] == plans[0].num_steps == ledger["trained"] // 8
    assert [epoch["digest"] for epoch in found["epochs"]] == [plan.digest() for plan in plans]


def test_without_metadata_the_json_is_the_size_table() -> None:
    spec = FAMILIES["wan-s2v"]
    options = PlanOptions.pick(
        spec.defaults.train, video_sample_size=768, token_sample_size=512, video_sample_n_frames=49
    )
    found = plan_json(spec, spec.model.dims, options)
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
    plan = plan_epoch(plain, plain.model.dims, table, options, 0)
    sums = totals(plan, table, plain)
    assert sums.seconds_total == pytest.approx((250 + 97) / 25)
    assert sums.seconds_kept == pytest.approx((49 * 2 + 97) / 25)  # the last frame of a file has no second half
    assert [(float(fps), stride, videos) for fps, stride, videos in sums.frame_rates] == [(25.0, 2, 2)]
    assert sums.own_tokens == 2 * 13312 + 1024
    assert sums.tokens == sums.own_tokens + 3 * 10


@pytest.mark.parametrize("width", [80, 120])
def test_the_preview_fits_the_terminal_and_names_every_part(
    plain: FamilySpec, mixed: Callable[..., ClipTable], width: int
) -> None:
    table = mixed(3000)
    plans = list(plan_epochs(plain, plain.model.dims, table, OPTIONS, 2))
    text = shown(preview(plain, plain.model.dims, OPTIONS, table, plans), width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    parts = ("Sizes", "Buckets", "Epoch", "Rows", "Balance", "independent draws", "motion kept", "too-short", "speed")
    for part in parts:
        assert part in text


def test_an_epoch_without_steps_is_shown_too(plain: FamilySpec, tmp_path: Path) -> None:
    table = ClipTable.from_columns(width=[640], height=[640], frames=[100], fps=(25, 1))
    plan = plan_epoch(plain, plain.model.dims, table, OPTIONS, 0)
    assert plan.num_steps == 0
    assert "0 in, 1 on to the next epoch" in shown(preview(plain, plain.model.dims, OPTIONS, table, [plan]), 80)
    assert plan_json(plain, plain.model.dims, OPTIONS, table, [plan])["steps_per_epoch"] == 0
    plot(tmp_path / "plan.svg", plain, plain.model.dims, OPTIONS, plan)


def test_the_preview_without_metadata_is_the_size_table(plain: FamilySpec) -> None:
    text = shown(preview(plain, plain.model.dims, OPTIONS), 80)
    assert "13,312" in text and "Buckets" not in text


def test_the_preview_needs_no_colour_and_no_unicode(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    table = mixed(300)
    plan = preview(plain, plain.model.dims, OPTIONS, table, [plan_epoch(plain, plain.model.dims, table, OPTIONS, 0)])
    assert "\x1b" not in shown(plan, 80)
    assert "\x1b[" in shown(plan, 80, colour=True)
    assert "####" in shown(plan, 80, encoding="ascii")


def test_why_follows_a_clip_from_file_to_rank(plain: FamilySpec, mixed: Callable[..., ClipTable]) -> None:
    table = mixed(120)
    plans = list(plan_epochs(plain, plain.model.dims, table, OPTIONS, 2))
    batches = {
        (sample.row, sample.epoch): (batch.shape, step, rank)
        for rank in range(8)
        for plan in plans
        for step, of_step in enumerate(plan.micro_batches_for(rank))
        for batch in of_step
        for sample in batch.samples
        if sample.epoch == plan.epoch
    }
    checked = 0
    for row in range(120):
        story = why(plain, plain.model.dims, table, OPTIONS, row, plans)
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
    short, small = (why(plain, plain.model.dims, table, OPTIONS, row) for row in (3, 8))
    assert (short["dropped"], small["dropped"]) == ("too-short", "too-small")
    assert "dropped: too-short" in why_lines(short)[-1]
    with pytest.raises(ConfigError, match="no row 4"):
        why(plain, plain.model.dims, table, OPTIONS, 4)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_the_same_for_the_same_plan(
    plain: FamilySpec, mixed: Callable[..., ClipTable], tmp_path: Path, suffix: str
) -> None:
    table = mixed(400)
    plan = plan_epoch(plain, plain.model.dims, table, OPTIONS, 0)
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        plot(file, plain, plain.model.dims, OPTIONS, plan)
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
    with pytest.raises(ConfigError, match=r"plan\.gif"):
        plot(
            tmp_path / "plan.gif",
            plain,
            plain.model.dims,
            OPTIONS,
            plan_epoch(plain, plain.model.dims, mixed(50), OPTIONS, 0),
        )
