"""Commands on a folder of media: validated, planned, written as metadata, trained on."""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import QUICK, Vfun, digest
from tests.jobs import losses, vfun_process
from vfun_cli.run.rundir import RunDir

DATA = Path("vfun-demo/wan-s2v/data")


@pytest.fixture
def clips(place: Path) -> Path:
    """The demo's clips as people keep them: half of the twins beside them, half in folders."""
    for number, row in enumerate(json.loads((DATA / "metadata.json").read_text())):
        where = Path("clips") / ("city" if number % 2 else "")
        name = f"{number}.mp4"
        twins = ("control/" + name, f"audio/{number}.wav") if number % 3 else (f"{number}_control.mp4", f"{number}.wav")
        for source, target in zip(("file_path", "control_file_path", "audio_path"), (name, *twins), strict=True):
            (where / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(DATA / row[source], where / target)
        (where / f"{number}.txt").write_text(row["text"] + "\n")
    return Path("clips")


def test_a_folder_is_validated_and_is_clean(clips: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASET_NAME", "elsewhere")
    before = digest(clips)
    for more in ((), ("--family", "wan-s2v", "--deep")):
        said = vfun("validate-meta", str(clips), "--json", *more)
        assert (said.code, json.loads(said.out)["problems"], json.loads(said.out)["rows"]) == (0, [], 6)
    assert digest(clips) == before


@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_what_make_meta_writes_is_the_folder_again_with_the_same_plan(format: str, clips: Path, vfun: Vfun) -> None:
    said = vfun("make-meta", str(clips), "--format", format)
    assert said.code == 0 and f"--train-data-dir {clips}" in said.err
    Path(f"meta.{format}").write_text(said.out)
    plans = []
    for meta, more in ((clips, ()), (f"meta.{format}", ("--train-data-dir", str(clips)))):
        told = vfun("plan-buckets", "wan-s2v", "--demo", "--json", "--assignment", "--meta", str(meta), *more)
        assert told.code == 0, told.err
        plans.append(json.loads(told.out)["epochs"])
    assert plans[0] == plans[1]
    if format == "json":
        rows = json.loads(said.out)
        assert {row["fps"] for row in rows} == {25, 16, "30000/1001"}
        assert all(
            {"file_path", "audio_path", "control_file_path", "text", "type", "width"} <= row.keys() for row in rows
        )


def test_make_meta_writes_nothing_where_a_file_cannot_be_read(clips: Path, vfun: Vfun) -> None:
    (clips / "0.mp4").write_bytes(b"nothing")
    said = vfun("make-meta", str(clips), "--out", "meta.json")
    assert said.code == 3 and "0.mp4" in said.err and not Path("meta.json").exists()
    assert vfun("validate-meta", str(clips), "--fix", "fixed.json").code == 3
    assert len(json.loads(Path("fixed.json").read_text())) == 5


def test_make_meta_overwrites_nothing_and_names_absolute_paths(clips: Path, vfun: Vfun) -> None:
    assert vfun("make-meta", str(clips), "--absolute", "--out", "meta.jsonl").code == 0
    rows = [json.loads(line) for line in Path("meta.jsonl").read_text().splitlines()]
    assert all(Path(row[name]).is_absolute() for row in rows for name in ("file_path", "audio_path"))
    before = Path("meta.jsonl").read_bytes()
    assert vfun("make-meta", str(clips), "--out", "meta.jsonl").code == 2
    assert Path("meta.jsonl").read_bytes() == before
    assert vfun("make-meta", "meta.jsonl").code == 2 and vfun("make-meta", str(DATA.parent / "model")).code == 3


def test_videos_without_a_sound_file_state_themselves_and_must_have_a_track(clips: Path, vfun: Vfun) -> None:
    for sound in clips.rglob("*.wav"):
        sound.unlink()
    assert vfun("make-meta", str(clips)).code == 0
    said = vfun("make-meta", str(clips), "--audio-from-video")
    assert said.code == 3 and "no-audio-stream" in said.err and said.out == ""


def test_a_root_that_was_typed_beside_a_folder_is_told_to_be_of_no_use(clips: Path, vfun: Vfun) -> None:
    said = vfun("validate-meta", str(clips), "--data-root", "vfun-demo")
    assert said.code == 0 and "not from vfun-demo" in " ".join(said.err.split())


@pytest.mark.slow
def test_a_run_trains_on_a_folder_as_on_its_metadata(clips: Path, vfun: Vfun) -> None:
    assert vfun("make-meta", str(clips), "--out", str(clips / "meta.json")).code == 0
    shutil.move(clips / "meta.json", "meta.json")
    found = []
    for run, meta in (("one", str(clips)), ("two", "meta.json")):
        vfun_process(
            "train", "wan-s2v", "--demo", *QUICK, "--max-train-steps", "2", "--output-dir", run,
            "--train-data-meta", meta, "--train-data-dir", str(clips), code=0,
        )  # fmt: skip
        found.append(losses(RunDir(Path(run))))
    assert len(found[0]) == 2 and found[0] == found[1]
    (clips / "0.txt").write_text("Another caption.")
    said = vfun("resume", "one", "--max-train-steps", "3")
    assert said.code == 5 and "train_data_meta" in said.err
