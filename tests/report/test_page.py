"""The page of a run: every section, from files that may be torn, hostile, missing or too large."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.report.written import FAMILY, VIDEO, held_out, step, write_metrics, write_run, write_sample
from vfun_cli.errors import CheckpointError
from vfun_cli.report import gather, page
from vfun_cli.report.media import MOST_INSIDE, Media
from vfun_cli.run.messages import Outcome, RankError
from vfun_cli.run.rundir import RunDir

EMPTY = ("area", "base", "br", "col", "hr", "img", "input", "link", "meta", "line", "circle", "polyline")


class Page(HTMLParser):
    """What a browser would take from a page; a tag that is not closed in its turn fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words = ""
        self.sections: dict[str, str] = {"": ""}
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.plots: list[dict[str, Any]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.tags.append(tag)
        self.sources += [str(told[name]) for name in ("src", "href", "srcset", "poster", "data") if name in told]
        if "data-plot" in told:
            self.plots.append(json.loads(str(told["data-plot"])))
        if tag == "section":
            self.sections[str(told["id"])] = ""
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words += f"{data} "
            self.sections[list(self.sections)[-1]] += f"{data} "

    def section(self, title: str) -> str:
        """What is read under a heading, in one line."""
        return " ".join(self.sections[title.lower()].split())


def read(run: RunDir, target: Path | None = None, most: int = MOST_INSIDE) -> Page:
    told = gather.gather(run)
    text = page.render(told, Media(target or run.report_html, page.shown_first(told), most))
    assert page.OURS.match(text.encode())
    return Page(text)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 40 steps at step 30, with held-out losses and samples of two rows."""
    found = write_run(tmp_path / "run")
    steps = [step(number) for number in range(1, 31)]
    checked = [held_out(number, weights) for number in (10, 20, 30) for weights in ("trained", "ema")]
    write_metrics(found, *steps, *checked, {"event": "checkpoint", "step": 20, "seconds": 4.0})
    for number in (10, 20):
        write_sample(found, number, 0)
        write_sample(found, number, 0, ema=True)
        write_sample(found, number, 3)
    found.sampled_clips.mkdir()
    (found.sampled_clips / "row-0.mp4").write_bytes(b"the row's own")
    return found


def test_a_page_tells_everything_of_a_run(run: RunDir) -> None:
    found = read(run)
    assert tuple(found.sections) == ("", "loss", "samples", "numbers", "plan", "options")
    assert f"lora {FAMILY}" in found.words and "step 30 of 40" in found.words
    assert "Held-out loss" in found.section("Loss") and "By noise level" in found.section("Loss")
    assert "its own clip step 10 step 20" in found.section("Samples")
    numbers = found.section("Numbers")
    for said in ("Tokens a second 2,500 2,500", "MFU 41.0%", "Memory 3 GiB", "Data wait 5.0%", "Padding 1.0%"):
        assert said in numbers
    assert "1 in 4 s" in numbers and "10 steps in about 20 s" in numbers and "30 in 60 s" in numbers
    assert "3 of 3 used" in found.section("Plan")
    assert "--learning-rate 0.0003 0.0001 command line" in found.section("Options")
    assert found.tags.count("video") == 2 * 3 + 2  # of each line its samples, and the own clip of the row that has one


def test_the_curves_are_those_of_the_run(run: RunDir) -> None:
    plots = read(run).plots
    raw, mean = plots[0]["curves"]
    assert [(x, y) for x, y, _ in raw["points"]] == [(n, float(f"{1 / n:.5g}")) for n in range(1, 31)]
    assert len(mean["points"]) == 30
    trained, ema = plots[1]["curves"]
    assert [point[0] for point in trained["points"]] == [10, 20, 30] and trained["role"] == "trained"
    assert trained["points"] == ema["points"]  # of other weights the same numbers here
    first, last, _ = plots[2]["curves"]
    assert [x for x, _, _ in last["points"]] == [round(0.1 * n, 1) for n in range(1, 10)]
    assert all(before[1] > after[1] for before, after in zip(first["points"], last["points"], strict=True))
    assert len(plots[3]["curves"]) == 9


def test_torn_lines_and_losses_that_are_no_numbers_are_passed_over(run: RunDir) -> None:
    lines = [json.dumps(step(1)), json.dumps(step(2, loss=None)), '{"step": 3, "los', "\0\0\0", json.dumps(step(4))]
    run.metrics.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe\n{"step": 5')
    found = read(run)
    assert [x for x, _, _ in found.plots[0]["curves"][0]["points"]] == [1, 4]
    assert "1 steps had a loss that is no finite number" in found.section("Loss")


@pytest.mark.parametrize("value", ["much", [1], {"a": 2}, True, -1, 0, 1e308, pytest.param(10**400, id="immense")])
def test_no_value_in_a_record_breaks_the_page(value: object, run: RunDir) -> None:
    spoilt = {name: value for name in step(2) if name != "step"}
    wrong = {name: value for name in held_out(2) if name not in ("event", "step")}
    spoilt_steps = [{**spoilt, "step": number} for number in (2, 3, 4, 10**400)]
    write_metrics(
        run, step(1), *spoilt_steps, *({**wrong, "event": "held-out", "step": number} for number in (2, 3, 10**400))
    )
    run.plan_json.write_text(json.dumps({"ledger": value, "balance": value, "totals": {"tokens": value}, "buckets": 1}))
    assert "lora" in read(run).words


def test_what_a_caption_holds_is_text(run: RunDir) -> None:
    hostile = "</p></table><script>alert(1)</script><img src=https://there/x onerror=alert(2)> & \u202e \ud800 一群 \"'"
    write_sample(run, 20, 7, prompt=hostile, negative_prompt=hostile, seed=hostile, image=f"/a/{hostile}")
    write_sample(run, 20, 8, error=hostile)
    RankError(
        rank=1, time=0, message=hostile, hint=hostile, exit_code=1, crash=False, traceback=""
    ).write(run)  # fmt: skip
    found = read(run)
    assert found.tags.count("script") == 1 and found.tags.count("img") == 1  # ours, and the plan
    assert found.words.count("<script>alert(1)</script>") >= 5 and "一群" in found.words
    assert "\\u202e" in found.words and "\\ud800" in found.words


def test_nothing_refers_to_the_network(run: RunDir) -> None:
    found = read(run)
    assert len(found.sources) > 10
    for source in found.sources:
        assert source.startswith(("data:", "#")), source
    text = page.render(gather.gather(run), Media(run.report_html, []))
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


def test_pictures_and_videos_in_the_page_are_those_of_the_run(run: RunDir) -> None:
    write_sample(run, 20, 3, content=bytes(range(256)))
    (run.samples(20) / "row-5.png").write_bytes(b"a picture")
    inside = [source for source in read(run).sources if source.startswith(("data:video/mp4", "data:image/png"))]
    content = [base64.b64decode(source.partition(",")[2], validate=True) for source in inside]
    assert content.count(b"the row's own") == 2 and content.count(bytes(range(256))) == 1
    assert content.count(VIDEO) == 5 and content.count(b"a picture") == 1


def test_what_is_too_large_for_the_page_is_a_link_that_leads_there(run: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere #1" / "of it.html"
    target.parent.mkdir()
    write_sample(run, 10, 3, content=VIDEO * 1000)
    found = read(run, target, most=1000)
    assert "1 of 7 files are too large" in found.section("Samples")
    links = [source for source in found.sources if not source.startswith(("data:", "#"))]
    assert len(links) == 1 and (target.parent / unquote(links[0])).samefile(run.samples(10) / "row-3.mp4")


def test_the_newest_samples_are_in_the_page_first(run: RunDir) -> None:
    told = gather.gather(run)
    media = Media(run.report_html, page.shown_first(told), len(b"the row's own") + 3 * len(VIDEO))
    assert {path.parent.name for path in media.inside} == {"rows", "step-20"}
    assert {path.parent.name for path in media.linked} == {"step-10"} and len(media.linked) == 3


def test_a_row_that_failed_says_why(run: RunDir) -> None:
    write_sample(run, 20, 9, error="row 9 does not fit.")
    assert "row 9 does not fit." in read(run).section("Samples")


def test_a_run_that_has_only_begun_says_how_to_get_the_rest(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run"))
    assert "No step was recorded yet" in found.section("Loss")
    assert "No samples: give --validation-prompts" in found.section("Samples")
    assert "running, or killed" in found.words


def test_without_held_out_losses_it_says_how_to_get_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_metrics(run, step(1))
    assert "No held-out loss: give --validation-rows 8" in read(run).section("Loss")


def test_it_says_how_a_run_ended_and_whose_fault_it_was(run: RunDir) -> None:
    run.logs.mkdir()
    Outcome(ending="preempted", step=30).write(run)
    assert "preempted" in read(run).words
    error = {"time": 1.0, "hint": "Free some.", "exit_code": 6, "crash": False, "traceback": "no"}
    for rank in (0, 10, 9):
        RankError(rank=rank, message="the disk is full.", **error).write(run)
    RankError(rank=1, message="rank 0 is gone.", **{**error, "time": 2.0}).write(run)
    words = read(run).words
    assert "failed" in words and "Free some." in words
    assert words.index("rank 0, 9, 10: the disk is full.") < words.index("rank 1: rank 0 is gone.")


def test_the_plan_is_drawn_as_plan_buckets_draws_it(run: RunDir) -> None:
    source = next(each for each in read(run).sources if each.startswith("data:image/svg+xml"))
    assert f"Bucket plan of {FAMILY}" in base64.b64decode(source.partition(",")[2]).decode()


def test_a_plan_that_cannot_be_drawn_is_told_in_numbers_and_why(run: RunDir) -> None:
    described = json.loads(run.run_json.read_text())
    run.run_json.write_text(json.dumps({**described, "plan_digest": "another"}))
    assert "gives another plan than the launch showed" in read(run).section("Plan")
    run.clips().write_bytes(b"PK\x03\x04 no archive")
    assert "cannot be read" in read(run).section("Plan")
    run.clips().unlink()
    told = read(run).section("Plan")
    assert "3 of 3 used" in told and "clips.npz, is not there" in told


def test_options_that_follow_from_others_or_from_the_machine_are_no_differences(tmp_path: Path) -> None:
    told = gather.gather(write_run(tmp_path / "run", video_sample_size=256, seed=42, train_data_meta="/rows.csv"))
    found = {each.name: (each.value, each.default) for each in gather.differences(told)}
    assert found["video_sample_size"] == (256, 512) and found["strategy"] == ("single", "auto")
    assert not {"train_data_dir", "num_processes", "seed", "rank"} & set(found)


def test_a_strategy_s_own_defaults_are_no_differences(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    described = json.loads(run.run_json.read_text())
    config = {**described["config"], "strategy": "zero3", "train_mode": "inpaint"}
    sources = dict.fromkeys(described["sources"], "run.json")
    changed = {"family": "wan-fun-control", "command": "train", "config": config, "sources": sources}
    run.run_json.write_text(json.dumps({**described, **changed}))
    assert "train_mode" not in {each.name for each in gather.differences(gather.gather(run))}


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        gather.gather(RunDir(tmp_path))
