"""validate-meta and plan-buckets as typed: what they print, which row they mean, what they write."""

import errno
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import av
import pytest
from PIL import Image

from tests.commands.conftest import Vfun
from vfun_cli.metadata.codes import CODES

DATA = Path("vfun-demo/wan-s2v/data")
META = DATA / "metadata.json"


def rows() -> list[dict[str, Any]]:
    return json.loads(META.read_text(encoding="utf-8"))


def write(changed: list[dict[str, Any]]) -> None:
    META.write_text(json.dumps(changed), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan-s2v", "cogvideox-fun"])
def test_the_demo_is_clean(family: str, place: Path, vfun: Vfun) -> None:
    said = vfun("validate-meta", "--family", family, "--demo", "--json", "--deep")
    assert (said.code, json.loads(said.out)["problems"]) == (0, [])


def test_clips_too_small_for_every_size_are_told_before_the_plan_leaves_them_out(place: Path, vfun: Vfun) -> None:
    folder = Path("vfun-demo/cogvideox-fun/data")
    Image.new("RGB", (800, 800), "red").save(folder / "train/large.jpg")
    changed = json.loads((folder / "metadata.json").read_text())
    small = len(changed)
    (folder / "metadata.json").write_text(
        json.dumps([*changed, {"file_path": "train/large.jpg", "text": "Red.", "type": "image"}])
    )
    modes = "random_hw_adapt = false\ntraining_with_video_token_length = false\n"
    Path("vfun.toml").write_text(f"video_sample_size = 384\nimage_sample_size = 384\n{modes}")
    said = vfun("validate-meta", str(folder / "metadata.json"), "--family", "cogvideox-fun", "--json")
    problems = json.loads(said.out)["problems"]
    assert said.code == 0
    assert [(problem["row"], problem["code"]) for problem in problems] == [(row, "too-small") for row in range(small)]
    assert problems[0]["message"] == "256x256 would be enlarged 1.50 times for the smallest bucket, 384x384"
    said = vfun(
        "plan-buckets",
        "cogvideox-fun",
        "--json",
        "--meta",
        str(folder / "metadata.json"),
        "--train-data-dir",
        str(folder),
    )
    assert json.loads(said.out)["ledger"]["dropped"] == {"too-small": small}


def test_an_untyped_picture_is_refused_by_a_family_that_trains_on_videos(place: Path, vfun: Vfun) -> None:
    Image.new("RGB", (512, 512), "red").save(DATA / "train/still.jpg")
    changed = rows()
    changed[0] = {"file_path": "train/still.jpg", "audio_path": changed[0]["audio_path"], "text": "A still."}
    write(changed)
    said = vfun("validate-meta", "--family", "wan-s2v", "--demo", "--json")
    found = {(problem["row"], problem["code"]) for problem in json.loads(said.out)["problems"]}
    assert (0, "unsupported-type") in found and said.code == 3


def test_warnings_of_many_rows_are_one_line_and_a_command_before_training(place: Path, vfun: Vfun) -> None:
    write([{**row, "text": ""} for row in rows()])
    said = vfun("train", "wan-s2v", "--demo", "--dry-run")
    assert said.code == 0
    assert said.err.count("warning") == 1
    assert "empty-caption: 6 rows, first row 0: the caption is empty" in said.err
    assert f"vfun validate-meta {META} --family wan-s2v" in " ".join(said.err.split())


def test_explain_prints_one_code_or_all(vfun: Vfun) -> None:
    said = vfun("validate-meta", "--explain", "too-small")
    assert said.code == 0 and "1.25" in said.out and "warning" in said.out
    everything = vfun("validate-meta", "--explain", "all").out
    assert all(name in everything for name in CODES)
    assert vfun("validate-meta", "--explain", "to-small").code == 2
    (code,) = json.loads(vfun("validate-meta", "--explain", "too-small", "--json").out)["codes"]
    assert (code["name"], code["severity"]) == ("too-small", "warning")


@pytest.mark.parametrize(
    "clip", ["2", "train/00000003.mp4", "00000003.mp4", "00000003.wav", "00000003", f"{DATA}/train/00000003.mp4"]
)
def test_why_takes_a_row_a_path_or_a_name(clip: str, place: Path, vfun: Vfun) -> None:
    said = vfun("plan-buckets", "wan-s2v", "--demo", "--why", clip, "--json")
    story = json.loads(said.out)
    assert (story["row"], story["file"]) == (2, "train/00000003.mp4")
    text = vfun("plan-buckets", "wan-s2v", "--demo", "--why", clip).out
    assert "row 2 (train/00000003.mp4): video, 192x320" in text and "rank" in text


def test_why_names_the_nearest_file_and_ambiguous_rows(place: Path, vfun: Vfun) -> None:
    said = vfun("plan-buckets", "wan-s2v", "--demo", "--why", "train/0000003.mp4")
    assert said.code == 2 and "Did you mean 'train/00000003.mp4'" in " ".join(said.err.split())
    write([*rows(), {**rows()[2], "text": "Again."}])
    said = vfun("plan-buckets", "wan-s2v", "--demo", "--why", "00000003.mp4")
    assert said.code == 2 and "2 rows: 2, 6" in said.err


def test_the_assignment_lists_every_sample_once(place: Path, vfun: Vfun) -> None:
    said = vfun("plan-buckets", "wan-s2v", "--demo", "--json", "--assignment", "--world-size", "2", "--epochs", "3")
    epochs = json.loads(said.out)["epochs"]
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(sample["row"] for batch in epoch["assignment"] for sample in batch["samples"]) == list(range(6))
        assert {(batch["step"], batch["rank"]) for batch in epoch["assignment"]} == {
            (step, rank) for step in range(3) for rank in range(2)
        }


def test_rows_that_state_everything_are_planned_without_their_files(place: Path, vfun: Vfun) -> None:
    said = vfun("validate-meta", "--family", "wan-s2v", "--demo", "--fix", "stated.json")
    assert said.code == 0
    before = vfun("plan-buckets", "wan-s2v", "--demo", "--json")
    for path in (DATA / "train").iterdir():
        path.unlink()
    after = vfun("plan-buckets", "wan-s2v", "--demo", "--meta", "stated.json", "--json")
    assert after.code == 0 and json.loads(after.out) == json.loads(before.out)


def test_plots_are_pictures(place: Path, vfun: Vfun) -> None:
    assert vfun("plan-buckets", "wan-s2v", "--demo", "--plot", "plan.svg").code == 0
    assert ElementTree.parse("plan.svg").getroot().tag.endswith("svg")
    assert vfun("plan-buckets", "wan-s2v", "--demo", "--plot", "plan.png").code == 0
    with Image.open("plan.png") as picture:
        assert min(picture.size) > 300


def test_problems_go_to_a_file_and_max_bad_forgives(place: Path, vfun: Vfun) -> None:
    (DATA / "train/00000002.mp4").unlink()
    command = ("validate-meta", "--family", "wan-s2v", "--demo", "--problems", "problems.jsonl")
    assert vfun(*command).code == 3
    (problem,) = map(json.loads, Path("problems.jsonl").read_text().splitlines())
    assert (problem["row"], problem["code"]) == (1, "missing-file")
    assert vfun(*command, "--max-bad", "1").code == 0


def test_a_second_validation_reads_no_headers(place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    first = vfun("validate-meta", "--family", "wan-s2v", "--demo", "--json")
    opened: list[Any] = []
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args))
    assert vfun("validate-meta", "--family", "wan-s2v", "--demo", "--json") == first
    assert opened == []


@pytest.mark.slow
def test_deep_gives_a_file_so_many_seconds(place: Path, vfun: Vfun) -> None:
    said = vfun("validate-meta", "--family", "wan-s2v", "--demo", "--deep", "--deep-timeout", "0", "--json")
    assert {problem["code"] for problem in json.loads(said.out)["problems"]} == {"decode-timeout"}


OUTPUTS = {
    "--problems": ("validate-meta", "--demo", "--family", "wan-s2v", "--problems"),
    "--fix": ("validate-meta", "--demo", "--family", "wan-s2v", "--fix"),
    "--plot": ("plan-buckets", "wan-s2v", "--demo", "--plot"),
}


@pytest.mark.parametrize("option", OUTPUTS)
def test_an_output_replaces_nothing_that_vfun_did_not_write(option: str, place: Path, vfun: Vfun) -> None:
    """Whatever the name: inputs, links to them, and files of one's own."""
    suffix = ".svg" if option == "--plot" else ".json"
    Path(f"link{suffix}").symlink_to(META)
    Path(f"hard{suffix}").hardlink_to(META)
    Path(f"own{suffix}").write_text("mine")
    Path(f"folder{suffix}").mkdir()
    os.mkfifo(f"pipe{suffix}")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    names = [f"{name}{suffix}" for name in ("link", "hard", "own", "folder", "pipe", "no/folder/x", "a" * 300)]
    for name in [*names, *([] if option == "--plot" else [str(META), f"./{DATA}/train/../{META.name}", "/dev/null"])]:
        said = vfun(*OUTPUTS[option], name, "--json")
        assert said.code == 2 and f"with {option}" in " ".join(said.err.split()), (name, said)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", OUTPUTS)
def test_an_output_on_a_full_disk_leaves_nothing(
    option: str, place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(place.iterdir())
    said = vfun(*OUTPUTS[option], "out.svg", "--json")
    assert said.code == 6 and "No space left on device" in " ".join(said.err.split())
    assert said.out.count('"schema"') <= 1
    assert sorted(place.iterdir()) == before


def test_outputs_of_an_earlier_run_are_replaced(place: Path, vfun: Vfun) -> None:
    for name in ("plan.svg", "plan.png"):
        for _ in range(2):
            assert vfun(*OUTPUTS["--plot"], name).code == 0
    film = DATA / "train/00000002.mp4"
    for place_of_film, problems in ((film, 0), (DATA / "elsewhere", 1), (film, 0)):  # from none to one and back
        next(path for path in (film, DATA / "elsewhere") if path.exists()).rename(place_of_film)
        vfun(*OUTPUTS["--problems"], "problems.jsonl")
        assert len(Path("problems.jsonl").read_text().splitlines()) == problems


def test_what_fix_did_is_said_for_people_and_programs(place: Path, vfun: Vfun) -> None:
    bad = rows()
    bad[0] |= {"width": 1, "type": "image"}
    bad[1] |= {"audio_path": "wav/9.wav"}
    write(bad)
    said = vfun(*OUTPUTS["--fix"], "fixed.json", "--json")
    fixed = json.loads(said.out)["fixed"]
    assert (fixed["rows"], fixed["changed"]) == (5, 5)
    assert fixed["left_out"] == [{"row": 1, "codes": ["missing-file"]}]
    assert {"wrong-size": 1, "video-as-image": 1}.items() <= fixed["put_right"].items()
    said = vfun(*OUTPUTS["--fix"], "again.json")
    told = " ".join(said.err.split())
    assert "again.json: 5 rows, 5 of them changed" in told and "wrong-size in 1 row" in told
    assert "left out: 1 row (counted from 0) missing-file: 1 row: 1" in told


def test_metadata_that_is_not_named_is_a_matter_of_usage(place: Path, vfun: Vfun) -> None:
    Path("vfun.toml").write_text("train_data_meta = 5")
    said = vfun("validate-meta")
    assert said.code == 2 and "train_data_meta is 5; it takes a path" in " ".join(said.err.split())
    Path("vfun.toml").unlink()
    said = vfun("validate-meta")
    assert said.code == 2 and "Name a file or folder behind vfun validate-meta" in " ".join(said.err.split())


def test_metadata_that_is_not_there_is_one_line_and_no_table(place: Path, vfun: Vfun) -> None:
    said = vfun("validate-meta", "none.json")
    assert said.code == 3 and said.out.count("none.json") == 1 and len(said.out.splitlines()) == 2
