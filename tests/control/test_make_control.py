"""``vfun make-control``: control clips that are their videos' twins, frame for frame."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import digest
from tests.control.conftest import write_clip, write_picture
from tests.jobs import Said, finish, start, vfun_here
from vfun_cli import devices
from vfun_cli.metadata.opening import open_media
from vfun_cli.metadata.probe import probe_visual
from vfun_cli.metadata.timeline import read_timeline
from vfun_cli.modeling.media.frames import every_frame, read_frames

cv2 = pytest.importorskip("cv2")

UNEVEN = [0, 24, 48, 60, 72, 120, 144, 150, 168]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    write_clip(folder / "a" / "1.mp4", rate=Fraction(30000, 1001))
    write_clip(folder / "a" / "2.mov", frames=5, size=(49, 65))
    write_clip(folder / "3.mp4", times=UNEVEN)
    write_picture(folder / "4.jpg")
    (folder / "a" / "1.txt").write_text("a square")
    return folder


def make(*arguments: object) -> Said:
    return vfun_here("make-control", *arguments)


def pictures(path: Path) -> np.ndarray:
    with open_media(path) as container:
        timeline = read_timeline(container, by_packets=True)
    return np.stack(list(every_frame(path, timeline)))


def edges(frames: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    return np.stack([cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), low, high) for frame in frames])


TWINS = {"a/1.mp4": "a/1.mp4", "a/2.mov": "a/2.mp4", "3.mp4": "3.mp4"}


def test_a_control_clip_has_the_frames_the_size_and_the_rate_of_its_video(clips: Path) -> None:
    said = make(clips)
    assert (said.code, said.out) == (0, "done: 4 made\n"), said.err
    for name, twin in TWINS.items():
        video, control = probe_visual(clips / name), probe_visual(clips / "control" / twin)
        assert (control.frames, control.height, control.width) == (video.frames, video.height, video.width)
        assert control.fps == video.fps and not control.variable
    assert probe_visual(clips / "3.mp4").variable


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_every_frame_of_a_control_clip_is_the_edges_of_the_frame_that_training_sees(name: str, clips: Path) -> None:
    assert make(clips).code == 0
    facts = probe_visual(clips / name)
    seen = read_frames(clips / name, range(facts.frames), facts.height, facts.width).permute(0, 2, 3, 1).numpy()
    drawn, wanted = pictures(clips / "control" / TWINS[name]), edges(seen) > 0
    assert wanted.any(axis=(1, 2)).all()
    assert np.mean((drawn.mean(axis=3) > 127) == wanted) > 0.995


@pytest.mark.slow
def test_a_picture_becomes_a_picture_of_its_exact_edges(clips: Path) -> None:
    assert make(clips, "--low", 50, "--high", 80, "--blur", 1.5).code == 0
    drawn = np.asarray(Image.open(clips / "control/4.png"))
    grey = cv2.GaussianBlur(cv2.cvtColor(np.asarray(Image.open(clips / "4.jpg")), cv2.COLOR_RGB2GRAY), (0, 0), 1.5)
    assert np.array_equal(drawn, np.repeat(cv2.Canny(grey, 50, 80)[..., None], 3, axis=2)) and drawn.any()


@pytest.mark.parametrize("name", TWINS)
def test_all_frames_at_once_are_those_that_are_read_one_by_one(name: str, clips: Path) -> None:
    facts = probe_visual(clips / name)
    each = [read_frames(clips / name, [i], facts.height, facts.width)[0] for i in range(facts.frames)]
    assert np.array_equal(pictures(clips / name), np.stack([one.permute(1, 2, 0).numpy() for one in each]))


@pytest.mark.slow
def test_the_same_clips_become_the_same_bytes_by_any_number_of_processes(clips: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "again", tmp_path / "three"]
    for out, workers in zip(outs, (1, 1, 3), strict=True):
        assert make(clips, "--out", out, "--workers", workers).code == 0
    assert len(digest(outs[0])) == 4
    assert digest(outs[0]) == digest(outs[1]) == digest(outs[2])
    assert not (clips / "control").exists()


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_second_run_makes_what_is_missing_or_whose_video_or_settings_changed(clips: Path) -> None:
    assert make(clips).code == 0
    before = stamps(clips / "control")
    assert make(clips).out == "done: 4 there already\n"
    assert stamps(clips / "control") == before
    (clips / "control/a/2.mp4").unlink()
    write_clip(clips / "3.mp4", frames=7)
    assert make(clips).out == "done: 2 made, 2 there already\n"
    after = stamps(clips / "control")
    assert {name for name in before if after[name] == before[name]} == {"a/1.mp4", "4.png"}
    assert probe_visual(clips / "control/3.mp4").frames == 7
    os.utime(clips / "4.jpg")  # newer than its control picture
    assert make(clips).out == "done: 1 made, 3 there already\n"
    assert make(clips, "--high", 150).out == "done: 4 made\n"


def test_what_others_made_is_left_alone(clips: Path) -> None:
    mine = write_clip(clips / "control/3.mp4", frames=3).read_bytes()
    write_clip(clips / "a/1_control.mp4")
    said = make(clips)
    assert said.code == 3 and "3.mp4 has no control clip" in said.err and "did not write it" in said.err
    assert said.out == "done: 2 made, 1 with one of their own, 1 failed\n"
    assert (clips / "control/3.mp4").read_bytes() == mine and not (clips / "control/a/1.mp4").exists()


def test_a_broken_video_is_named_and_the_others_are_made(clips: Path) -> None:
    whole = (clips / "a/1.mp4").read_bytes()
    (clips / "a/5.mp4").write_bytes(whole[: len(whole) // 2])
    (clips / "6.mp4").write_text("no video")
    said = make(clips, "--json")
    assert said.code == 3
    told = json.loads(said.out)
    assert {each["file_path"] for each in told["broken"]} == {"a/5.mp4", "6.mp4"}
    assert "a/5.mp4 has no control clip" in said.err and "6.mp4 has no control clip" in said.err
    assert len(told["clips"]) == 4 and len(stamps(clips / "control")) == 4


def test_two_clips_that_would_have_one_control_clip_are_told(clips: Path) -> None:
    write_clip(clips / "3.mov", frames=3)
    said = make(clips)
    assert said.code == 3 and "3.mp4 has no control clip: its control clip would be that of 3.mov" in said.err
    assert probe_visual(clips / "control/3.mp4").frames == 3


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_alone_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for number in range(6):
        write_clip(folder / f"{number}.mp4", frames=60, size=(480, 640))
    job = start("make-control", folder, "--workers", 2)
    deadline = time.monotonic() + 60
    while not list(folder.glob("control/[0-9].mp4")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    finish(job, 130)
    names = sorted(path.name for path in (folder / "control").iterdir())
    assert 0 < len(names) < 6 and not [name for name in names if name.startswith(".")]
    assert all(len(pictures(folder / "control" / name)) == 60 for name in names)
    assert make(folder).out == f"done: {6 - len(names)} made, {len(names)} there already\n"


@pytest.mark.slow
def test_a_folder_with_its_control_clips_passes_validation_as_a_folder_and_as_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for name in ("1.mp4", "a/2.mov"):
        write_clip(folder / name, size=(352, 416))
    write_picture(folder / "3.jpg", size=(352, 416))
    rows = json.loads(make(folder, "--json").out)["clips"]
    assert [row["control_file_path"] for row in rows] == ["control/1.mp4", "control/3.png", "control/a/2.mp4"]
    meta = tmp_path / "meta.jsonl"
    meta.write_text("".join(json.dumps({**row, "text": "a square"}) + "\n" for row in rows))
    for named, more in ((meta, ("--data-root", folder)), (folder, ())):
        said = vfun_here(
            "validate-meta", named, *more, "--family", "wan-fun-control", "--deep", "--json", "--video-sample-stride", 1
        )
        told = json.loads(said.out)
        assert said.code == 0 and told["ok"] == 3, said.out
        codes = {problem["code"] for problem in told["problems"]}
        assert codes <= {"missing-type", "missing-caption"}, said.out


def test_control_clips_never_become_clips(clips: Path, tmp_path: Path) -> None:
    said = make(clips, "--out", clips / "edges")
    assert said.code == 2 and "would be read as clips" in said.err
    assert make(clips, "--out", clips).code == 2
    assert make(clips, "--out", clips / "a" / "control").code == 0
    assert make(tmp_path / "none").code == 2
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").code == 3


WRONG = [
    (("--kind", "cany"), 2, "Did you mean 'canny'?"),
    (("--low", 300), 2, "above --high"),
    (("--model", "."), 2, "has no model"),
    (
        ("--kind", "depth"),
        2,
        "To get one: hf download depth-anything/Depth-Anything-V2-Small-hf --local-dir models/depth",
    ),
    (("--kind", "depth"), 2, "no folder is named by --model"),
    (("--kind", "depth", "--model", "none"), 2, "there is no folder none"),
    (("--kind", "depth", "--model", "no ne"), 2, "V2-Small-hf --local-dir 'no ne'"),
]


@pytest.mark.parametrize(("typed", "code", "words"), WRONG)
def test_wrong_options_are_told_before_anything_is_made(
    typed: tuple[object, ...], code: int, words: str, clips: Path
) -> None:
    said = make(clips, *typed)
    assert said.code == code and words in said.err, said.err
    assert not (clips / "control").exists()


def test_a_missing_package_is_told_with_the_line_that_installs_it(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *_: Any) -> None:
        return None

    monkeypatch.setattr(devices, "find_spec", without)
    said = make(clips)
    assert said.code == 6 and "next: pip install opencv-python-headless" in said.err
    assert not (clips / "control").exists()


@pytest.mark.slow
def test_edges_are_found_without_torch(clips: Path) -> None:
    """Neither by the command nor by the process that draws."""
    program = (
        "import sys\nfrom vfun_cli.main import main\n"
        f"try:\n    main(['make-control', {str(clips)!r}, '--workers', '1'])\nexcept SystemExit:\n    pass\n"
        "from pathlib import Path\nfrom vfun_cli.control import canny, kinds, worker\n"
        "draw = canny.canny(kinds.Settings(kind='canny'))\n"
        f"folder = Path({str(clips)!r})\n"
        "worker.make_video(folder / '3.mp4', folder / 'x.mp4', 'c', draw, lambda n: None)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.slow
def test_a_folder_that_is_full_of_nothing_to_do_starts_nothing(clips: Path) -> None:
    assert make(clips).code == 0
    shutil.copytree(clips, clips.parent / "copied")  # times are kept
    assert make(clips.parent / "copied").out == "done: 4 there already\n"
