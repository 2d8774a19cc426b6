"""``vfun generate`` through the command line: whose videos, which files, what fails alone, and how it ends."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from tests.commands.conftest import Vfun
from tests.jobs import MARK, Job, environment_of, finish, start, vfun_process, wait_for
from tests.metadata.small_media import write_sound
from vfun_cli import children, families
from vfun_cli.commands import generating
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import MetadataError
from vfun_cli.sampling import films, make, processes, progress
from vfun_cli.sampling.events import MADE, Event
from vfun_cli.sampling.loop import Sampler

pytestmark = pytest.mark.slow

DATA = Path("vfun-demo/wan-s2v/data")
COG = ("generate", "cogvideox-fun", "--demo", "--output", "out")
"""The quickest of the demos."""


@pytest.fixture(scope="session")
def models(pristine: Path) -> Path:
    """The demo of every family; the rows of wan-s2v have all that the others take."""
    for spec in families.FAMILIES.values():
        demo_default.make_model(spec, pristine / "vfun-demo")
    return pristine


@pytest.fixture
def there(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the demos, which nobody changes."""
    (tmp_path / "vfun-demo").symlink_to(models / "vfun-demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(*rows: dict[str, Any], name: str = "rows.json") -> str:
    Path(name).write_text(json.dumps(rows), encoding="utf-8")
    return name


def rows_of_the_demo(count: int, *, seconds: float) -> list[dict[str, Any]]:
    """Rows of a data set, with absolute paths and a sound that is as short."""
    rows = json.loads((DATA / "metadata.json").read_text(encoding="utf-8"))[:count]
    sounds = [write_sound(Path(f"{number}.wav"), seconds=seconds) for number in range(count)]
    return [
        {key: str((DATA / value).absolute()) if key.endswith("_path") else value for key, value in row.items()}
        | {"audio_path": str(sound.absolute())}
        for row, sound in zip(rows, sounds, strict=True)
    ]


def files(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def pictures(path: Path) -> NDArray[np.uint8]:
    """[F, H, W, 3]"""
    with av.open(str(path)) as film:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in film.decode(video=0)])


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_makes_a_video_of_its_demo(family: str, there: Path, vfun: Vfun) -> None:
    transformers_logging.enable_progress_bar()
    spec = families.find(family)
    meta = write_rows(*rows_of_the_demo(1, seconds=1.25))
    said = vfun("generate", family, "--demo", "--meta", meta, "--steps", "1", "--output", "out", "--json")
    assert said.code == 0, said.err
    assert "\r" not in said.err and "Loading" not in said.err and said.err.splitlines() == ["out/video-0.mp4"]
    assert json.loads(said.out) == {"schema": 1, "videos": ["out/video-0.mp4"], "failed": []}
    facts = json.loads(Path("out/video-0.json").read_text(encoding="utf-8"))
    with av.open("out/video-0.mp4") as film:
        assert Fraction(film.streams.video[0].average_rate or 0) == spec.sampling.fps
        assert bool(film.streams.audio) == ("audio" in spec.sampling.required)
        assert film.duration is not None
        seconds = film.duration / av.time_base
    frames, height, width, _ = pictures(Path("out/video-0.mp4")).shape
    assert (height, width) == (facts["height"], facts["width"]) and height * width == pytest.approx(64 * 64, rel=0.3)
    if spec.sampling.by_sound:
        assert (frames, facts["frames"]) == (17, 16)  # of 20: the model's first 3 come before the first that is shown
        assert seconds == pytest.approx(17 / 16, abs=0.1)
    else:
        assert frames == facts["frames"] == 9


def test_a_picture_is_a_png(there: Path, vfun: Vfun) -> None:
    said = vfun(*COG, "--prompt", "a kite", "--frames", "1", "--steps", "1")
    assert (said.code, said.out) == (0, "out/video-0.png\n"), said.err
    assert set(files()) == {"video-0.png", "video-0.json"}
    to_a_file = vfun(*COG[:3], "--prompt", "a kite", "--frames", "1", "--steps", "1", "--output", "kite.png")
    assert to_a_file.out == "kite.png\n" and Path("kite.png").read_bytes() == files()["video-0.png"]


def test_the_file_beside_a_video_makes_it_again_to_the_bit(there: Path, vfun: Vfun) -> None:
    meta = write_rows({"prompt": "a"}, {"prompt": "b", "seed": 7, "guidance": 2.5, "width": 96, "steps": 3})
    assert vfun(*COG, "--meta", meta, "--steps", "2").code == 0
    said = vfun(*COG[:3], "--meta", "out/video-1.json", "--output", "again")
    assert (said.code, said.out) == (0, "again/video-1.mp4\n"), said.err
    assert files("again") == {name: content for name, content in files().items() if name.startswith("video-1")}


def test_a_clip_is_edited_as_much_as_is_asked_for(there: Path, vfun: Vfun) -> None:
    clip = str((DATA / "train/00000001.mp4").absolute())
    size = ("--height", "64", "--width", "64", "--frames", "9", "--steps", "10", "--guidance", "1")
    edits = {0.1: "a-little", 0.5: "half", 1: "whole"}
    for strength, folder in edits.items():
        said = vfun(*COG[:3], "--prompt", "a", "--edit", clip, *size, "--strength", str(strength), "--output", folder)
        assert said.code == 0, said.err
    shown = {folder: pictures(Path(folder, "video-0.mp4")).astype(float) for folder in edits.values()}
    changed = [np.abs(shown[folder] - shown["a-little"]).mean() for folder in edits.values()]
    assert changed == sorted(changed) and changed[1] > 5
    assert json.loads(Path("half/video-0.json").read_text())["strength"] == 0.5
    assert vfun(*COG[:3], "--meta", "half/video-0.json", "--output", "again").code == 0
    assert files("again") == files("half")


def test_a_video_continues_its_image_if_it_starts_from_it(there: Path, vfun: Vfun) -> None:
    (row,) = rows_of_the_demo(1, seconds=0.5)
    command = ("generate", "wan-s2v", "--demo", "--meta", write_rows(row), "--steps", "1", "--frames", "8")
    assert vfun(*command, "--start-from-ref", "--output", "still").code == 0
    assert vfun(*command, "--output", "shown").code == 0
    still, shown = (pictures(Path(folder, "video-0.mp4")) for folder in ("still", "shown"))
    assert (len(still), len(shown)) == (8, 5)  # without, the first three are before what is shown
    assert json.loads(Path("still/video-0.json").read_text())["start_from_ref"] is True
    assert vfun(*command[:3], "--meta", "still/video-0.json", "--output", "again").code == 0
    assert files("again") == files("still")


def test_what_is_there_is_not_made_twice_and_never_written_over(there: Path, vfun: Vfun) -> None:
    kite = (*COG, "--steps", "1", "--prompt", "a kite")
    assert vfun(*kite).out == "out/video-0.mp4\n"
    first = files()
    again = vfun(*kite)
    assert again.out == "out/video-0.mp4\n" and "1 of 1 videos are there already" in again.err
    assert vfun(*kite, "--seed", "1").out == "out/video-0-2.mp4\n"
    assert vfun(*kite, "--seed", "1").out == "out/video-0-2.mp4\n"
    assert {name: files()[name] for name in first} == first and len(files()) == 4
    assert vfun(*kite, "--seed", "1", "--overwrite").out == "out/video-0.mp4\n"
    assert files()["video-0.mp4"] == files()["video-0-2.mp4"]


def test_rows_that_state_the_same_row_have_files_of_their_own(there: Path, vfun: Vfun) -> None:
    meta = write_rows({"prompt": "a", "row": 1}, {"prompt": "b"}, {"prompt": "a", "row": 1})
    said = vfun(*COG, "--meta", meta, "--steps", "1")
    assert said.out.split() == ["out/video-1.mp4", "out/video-1-2.mp4", "out/video-1-3.mp4"]
    assert files()["video-1.mp4"] == files()["video-1-3.mp4"] != files()["video-1-2.mp4"]
    assert "3 of 3 videos are there already" in vfun(*COG, "--meta", meta, "--steps", "1").err


def test_a_video_older_than_its_weights_is_made_again_under_another_name(there: Path, vfun: Vfun) -> None:
    kite = (*COG, "--steps", "1", "--prompt", "a kite")
    assert vfun(*kite).code == 0
    os.utime("out/video-0.mp4", (1, 1))
    assert vfun(*kite).out == "out/video-0-2.mp4\n"


def test_a_model_beside_itself_shows_the_same_twice(there: Path, vfun: Vfun) -> None:
    said = vfun(*COG, "--prompt", "a", "--prompt", "b", "--steps", "1", "--compare", "vfun-demo/cogvideox-fun/model")
    assert said.code == 0 and len(said.out.split()) == 2, said.err
    for name in ("video-0", "video-1"):
        shown = pictures(Path(f"out/{name}.mp4")).astype(int)
        assert shown.shape[:2] == (9, 64) and shown.shape[2] >= 128
        assert abs(shown[:, :, :64] - shown[:, :, -64:]).mean() < 2
        assert json.loads(Path(f"out/{name}.json").read_text())["compare"].endswith("vfun-demo/cogvideox-fun/model")


def test_the_encoders_are_gone_before_the_transformer_comes(
    there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def opened(*arguments: Any) -> Any:
        adapter, place = open_model(*arguments)

        def placed() -> None:
            kinds = {parameter.device.type for parameter in adapter.transformer.parameters()}
            assert kinds == {"cpu"} and all(parameter.stride() == (0,) * parameter.ndim for parameter in parameters())
            seen.append((set(adapter.encoders.loaded), set(adapter.encoders)))
            place()

        def parameters() -> Iterator[torch.Tensor]:
            return adapter.transformer.parameters()

        return adapter, placed

    open_model = make.open_model
    monkeypatch.setattr(make, "open_model", opened)
    assert vfun(*COG, "--prompt", "a kite", "--steps", "1").code == 0
    assert len(seen) == 1 and seen[0][0] == set() and len(seen[0][1]) >= 2


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["none", "--prompt", "a"], 5, "there is no none"),
        ([], 5, "output_dir"),
        (["wan-s2v", "--demo", "--meta", "a.json", "--prompt", "a"], 2, "--meta names the videos, and so do --prompt"),
        (["cogvideox-fun", "--demo", "--prompt", "a", "--frames", "8"], 2, "the nearest is 9"),
        (["cogvideox-fun", "--demo", "--prompt", "a", "--audio", "a.wav"], 2, "cogvideox-fun makes no video from it"),
        (["wan-s2v", "--demo", "--prompt", "a"], 2, "no --image is given"),
        (["cogvideox-fun", "--demo", "--meta", "none.json"], 3, "none.json"),
        (["cogvideox-fun", "--demo", "--image", "none.png", "--prompt", "a"], 3, "missing-file"),
        (["cogvideox-fun", "--demo", "--prompt", "a", "--device", "tpu"], 2, "choose one of: cuda, cpu"),
        (["cogvideox-fun", "--demo", "--prompt", "a", "--prompt", "b", "--output", "a.mp4"], 2, "one file, for 2"),
        (["cogvideox-fun", "--demo", "--prompt", "a", "--output", "a.png"], 2, "this video becomes a.mp4"),
        (
            ["cogvideox-fun", "--demo", "--prompt", "a", "--compare", "vfun-demo/wan-s2v/model"],
            2,
            "vfun-demo/wan-s2v/model is wan-s2v, and vfun-demo/cogvideox-fun/model is cogvideox-fun",
        ),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    typed: list[str], code: int, words: str, there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vfun_cli.sampling.make", None)  # to import it is an error
    said = vfun("generate", *typed, "--json")
    assert said.code == code and words in " ".join(said.err.split()), said.err
    assert "next: " in said.err and json.loads(said.out)["error"]["exit_code"] == code


def test_all_bad_rows_are_told_at_once(there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vfun_cli.sampling.make", None)
    meta = write_rows({"prompt": "a"}, {"prompt": "b", "image": "none.png"}, {"prompt": 3}, {"prompt": "d", "steps": 0})
    said = vfun(*COG, "--meta", meta)
    assert said.code == 3 and "3 of 4 videos cannot be made" in said.err
    assert [f"row {row}" in said.err for row in range(4)] == [False, True, True, True]


def test_a_demo_that_nobody_trained_says_so(there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "_made", lambda job, places, *more: iter(()))
    said = vfun("generate", "--demo")
    assert said.code == 0 and "these videos are of an untrained wan-s2v" in said.err


# What fails alone ----------------------------------------------------------------------------------------------------


def spoil(path: Path) -> Path:
    """A copy whose header is whole: only who decodes it finds that its pictures or sounds are not."""
    content = bytearray(path.read_bytes())
    begin, moov = content.index(b"mdat") + 4, content.index(b"moov")
    content[begin : min(begin + 20_000, moov if moov > begin else len(content))] = b"\xff" * (
        min(begin + 20_000, moov if moov > begin else len(content)) - begin
    )
    spoilt = Path(f"spoilt{path.suffix}")
    spoilt.write_bytes(content)
    return spoilt


def test_what_only_decoding_finds_broken_keeps_no_other_video_from_being_made(there: Path, vfun: Vfun) -> None:
    spoilt = str(spoil(Path("vfun-demo/cogvideox-fun/data/train/00000001.mp4")))
    meta = write_rows({"prompt": "a", "image": spoilt}, {"prompt": "b"}, {"prompt": "c", "image": spoilt})
    said = vfun(*COG, "--meta", meta, "--steps", "1", "--json")
    told = json.loads(said.out)
    assert said.code == 3 and told["videos"] == ["out/video-1.mp4"] and set(files()) == {"video-1.mp4", "video-1.json"}
    assert [each["video"] for each in told["failed"]] == ["video-0", "video-2"]
    assert all("spoilt.mp4" in each["message"] for each in told["failed"])
    assert (
        "warning: video-0 is not made: " in said.err and "2 of 3 videos could not be made: video-0, video-2" in said.err
    )


def test_a_video_that_is_too_large_keeps_no_other_from_being_made(
    there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Sampler.predict

    def limited(self: Sampler, latents: torch.Tensor, *more: Any) -> torch.Tensor:
        if latents.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB.")
        return predict(self, latents, *more)

    monkeypatch.setattr(Sampler, "predict", limited)
    meta = write_rows({"prompt": "a", "width": 128}, {"prompt": "b"})
    said = vfun(*COG, "--meta", meta, "--steps", "1")
    assert (said.code, said.out) == (4, "out/video-1.mp4\n"), said.err
    assert "Tried to allocate 90.00 GiB" in said.err and "--low-vram" in said.err


def test_a_disk_that_is_full_leaves_no_half_file_and_is_told(
    there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *more: Any) -> None:
        path.write_bytes(b"half")
        if "video-0" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(films, "write_video", full)
    said = vfun(*COG, "--prompt", "a", "--prompt", "b", "--steps", "1")
    assert (said.code, said.out) == (6, "out/video-1.mp4\n")
    assert "No space left on device" in said.err and "out/video-0.mp4" in said.err
    assert set(files()) == {"video-1.mp4", "video-1.json"}
    film = films.Film(pixels=torch.zeros(2, 3, 8, 8), fps=Fraction(8), heard_from=Fraction(0))
    with pytest.raises(OSError, match="No space"):
        films.write_film(film, Path("while training/video-0"), {})
    assert not files("while training")
    monkeypatch.undo()
    os.chdir(there)
    again = vfun(*COG, "--prompt", "a", "--prompt", "b", "--steps", "1")
    assert again.code == 0 and "1 of 2 videos are there already" in again.err


def test_a_sound_that_cannot_be_written_is_told_of_its_video_alone(
    there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decoded twice: for the model, and to be heard."""
    rows = rows_of_the_demo(2, seconds=0.5)
    read = films.read_sound

    def broken(path: str, *more: Any) -> Any:
        if path == rows[0]["audio_path"]:
            raise MetadataError(f"{path}: the audio cannot be decoded (by a test).")
        return read(path, *more)

    monkeypatch.setattr(films, "read_sound", broken)
    said = vfun("generate", "wan-s2v", "--demo", "--meta", write_rows(*rows), "--steps", "1", "--output", "out")
    assert (said.code, said.out) == (3, "out/video-1.mp4\n"), said.err
    assert "0.wav: the audio cannot be decoded" in said.err


# How it goes on and ends ---------------------------------------------------------------------------------------------


def left_over(job: Job, mark: str) -> list[int]:
    """Processes of a job that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if environment_of(int(process.name)).get(MARK) == mark:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def started(*rows: dict[str, Any], more: Sequence[str] = ()) -> Job:
    """A command whose rows of one step are made, in the middle of the others."""
    job = start(*COG, "--meta", write_rows(*rows), *more)
    for row in (row for row, each in enumerate(rows) if each["steps"] == 1):
        wait_for(Path(f"out/video-{row}.json").exists, job)
    time.sleep(0.3)
    return job


SHORT, ENDLESS = {"prompt": "a", "steps": 1}, {"prompt": "b", "steps": 1000, "frames": 49}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "next:")]
)
def test_a_command_that_is_stopped_in_a_video_ends_at_once_and_goes_on_where_it_was(
    number: signal.Signals, code: int, word: str, there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = started(SHORT, ENDLESS)
    job.send_signal(number)
    said = finish(job, code, within=10)
    assert word in said.err and "Traceback" not in said.err and said.out == "out/video-0.mp4\n"
    assert set(files()) == {"video-0.mp4", "video-0.json"}
    places: list[int] = []
    monkeypatch.setattr(generating, "_made", lambda job, left, *more: iter(places.extend(left) or ()))
    vfun(*COG, "--meta", "rows.json")
    assert places == [1]


@pytest.mark.long
@pytest.mark.parametrize("to_all", [True, False], ids=["as a terminal", "as kill"])
def test_ctrl_c_ends_all_processes(to_all: bool, there: Path) -> None:
    job = started(SHORT, SHORT, ENDLESS, ENDLESS, more=("--num-processes", "2"))
    mark = environment_of(job.pid)[MARK]
    assert len(left_over(job, mark)) == 3
    (os.killpg if to_all else os.kill)(job.pid, signal.SIGINT)
    said = finish(job, 130, within=10)
    assert "interrupted" in said.err and "Traceback" not in said.err
    assert not left_over(job, mark) and {name.partition(".")[0] for name in files()} == {"video-0", "video-1"}


@pytest.mark.slow
def test_two_processes_share_the_rows_and_make_the_files_of_one(there: Path, vfun: Vfun) -> None:
    spoilt = str(spoil(Path("vfun-demo/cogvideox-fun/data/train/00000001.mp4")))
    five = [
        {"prompt": "a"},
        {"prompt": "b", "row": 0},
        {"prompt": "c", "image": spoilt},
        {"prompt": "d"},
        {"prompt": "e"},
    ]
    command = (*COG[:3], "--steps", "2", "--meta", write_rows(*five), "--json", "--output")
    two = vfun_process(*command, "two", "--num-processes", "2", code=3)
    one = vfun(*command, "one")
    assert one.code == 3 and files("one") == files("two") and len(files("one")) == 8
    told = json.loads(two.out.replace("two/", "one/"))
    assert told["videos"] == [f"one/video-{name}.mp4" for name in ("0", "0-2", "3", "4")]
    assert told == json.loads(one.out) and two.out.count("\n") == 1


Child = Callable[[str], Iterator[tuple[int, Event]]]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Child:
    """What is heard of two processes that run a script in the command's place."""

    def run(script: str) -> Iterator[tuple[int, Event]]:
        begin = f"import json, os, signal, sys, time\nplace = os.environ[{processes.SHARE!r}]\n"

        def command(module: str, *arguments: str, variables: dict[str, str]) -> list[str]:
            stated = [f"{name}={value}" for name, value in variables.items()]
            return ["/usr/bin/env", *stated, sys.executable, "-c", begin + script]

        monkeypatch.setattr(children, "command", command)
        return processes.run_shares([3, 4, 5], 2, gpus=False)

    return run


def test_what_processes_tell_is_heard_and_what_else_they_print_is_not(
    shared: Child, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = sorted(
        (number, event.video)
        for number, event in shared(
            "print('Welcome to a library'); print(json.dumps({'video': place, 'exit_code': 0}));"
            "print(json.dumps({'schema': 1, 'exit_code': 0})); print('a warning', file=sys.stderr)"
        )
    )
    assert heard == [(0, "3,5"), (1, "4")]
    assert capfd.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 4, "ended by SIGKILL: the host probably ran out of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "ended by SIGSEGV"),
        ("print('error: the file is cut off.', file=sys.stderr); sys.exit(5)", 5, "failed: the file is cut off."),
        ("raise ValueError('of a test')", 1, "failed: ValueError: of a test."),
    ],
)
def test_a_process_that_dies_ends_the_others_and_says_why(
    end: str, code: int, words: str, shared: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = f"if place == '4':\n    open('pid', 'w').write(str(os.getpid())); time.sleep(60)\n{end}"
    with pytest.raises(Exception, match="process 0, which makes a part of the videos, ") as caught:
        list(shared("while place == '3,5' and not os.path.exists('pid'): time.sleep(0.01)\n" + script))
    assert words in str(caught.value) and caught.value.exit_code == code and caught.value.hint  # type: ignore[attr-defined]
    assert not Path(f"/proc/{Path('pid').read_text()}").exists()


def test_a_video_has_a_bar_of_a_terminal_s_width(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    shown = io.StringIO()
    monkeypatch.setattr(progress.console, "err", Console(file=shown, width=80, force_terminal=True, color_system=None))
    with progress.Bars([f"video-{row}" for row in range(3)]) as bars:
        for event in (
            Event(doing="reading what they are made from", done=1, total=3),
            Event(video="video-0", done=20, total=160),
            Event(video="video-0", exit_code=MADE),
            Event(video="video-1", exit_code=3),
            Event(video="video-2", of_base=True, done=7, total=160),
        ):
            bars.show(0, event)
    lines = [line.rpartition("\x1b[2K")[2] for line in shown.getvalue().splitlines()]
    assert max(map(len, lines)) == 80
    assert any(line.startswith("video-0 ━") and "20/160" in line for line in lines)
    assert "0 of 3 made, next: video-1" in lines and "1 of 3 made, 1 failed" in lines
    assert any(line.startswith("video-2, base ") for line in lines)


@pytest.mark.slow
def test_a_trained_demo_shows_what_it_learnt(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vfun: Vfun
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    short = ("--demo", "--steps", "1", "--meta", write_rows(*rows_of_the_demo(1, seconds=0.5)))
    names: tuple[list[str], ...] = ([], ["vfun-demo/output_dir"], ["checkpoint-4"])
    made = [vfun("generate", *named, *short) for named in names]
    by_checkpoint = Path("vfun-demo/output_dir/checkpoint-4-videos/video-0.mp4")
    assert [said.out.strip() for said in made] == [str(by_checkpoint)] * 3, made[0].err
    assert all("1 of 1 videos are there already" in said.err for said in made[1:])
    assert vfun("export-bf16", "checkpoint-4", "--demo").code == 0
    exported = vfun("generate", "checkpoint-4-outputs", *short)
    assert exported.code == 0, exported.err
    assert Path(exported.out.strip()).read_bytes() == by_checkpoint.read_bytes()
