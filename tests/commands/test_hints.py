"""The command that a hint names works in the situation that the hint was given in."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands.conftest import ENDLESS, QUICK, TRAIN, TRAINED, Vfun
from tests.disks import file_system
from tests.jobs import finish, start, training_processes, wait_for, wait_for_step
from tests.test_messages import MODULES, raised
from vfun_cli.devices import require_package
from vfun_cli.errors import EnvironmentFault
from vfun_cli.run.rundir import RunDir

DATA = Path("vfun-demo/wan-s2v/data")
RUN = RunDir(Path("vfun-demo/output_dir"))
DRY = "--dry-run"
TRAINS = ("train", "lora", "resume")
NAN = "1e38"
"""A learning rate after which the next loss is not a number."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A command that ends with a hint, and what the command in that hint is answered with."""

    name: str
    typed: tuple[str, ...]
    hint: str
    """How the hint goes on after ``vfun``, as a pattern."""
    code: int = 0
    """Of the command in the hint: to check what is broken finds it broken."""
    damage: Callable[[], object] = lambda: None


def drop_a_field() -> None:
    rows = json.loads((DATA / "metadata.json").read_text())
    rows[2].pop("audio_path")
    (DATA / "metadata.json").write_text(json.dumps(rows))


def drop_a_control_clip() -> None:
    rows = json.loads((DATA / "metadata.json").read_text())
    rows[2].pop("control_file_path")
    (DATA / "metadata.json").write_text(json.dumps(rows))


def write_small_rows() -> None:
    row = {"file_path": "a.mp4", "text": "A dog.", "type": "video", "width": 8, "height": 8, "frames": 99, "fps": 25}
    Path("small.json").write_text(json.dumps([row]))


def add_an_option() -> None:
    content = json.loads(RUN.run_json.read_text())
    content["config"]["of_another_version"] = 1
    RUN.run_json.write_text(json.dumps(content))


def spoil_pictures() -> None:
    """Headers stay whole: only who decodes finds it."""
    for path in (DATA / "train").glob("*.mp4"):
        content = bytearray(path.read_bytes())
        begin = content.index(b"mdat") + 4
        end = min(begin + 20_000, len(content))
        content[begin:end] = bytes(end - begin) if content.index(b"moov") < begin else b"\xff" * (end - begin)
        path.write_bytes(content)


UNTRAINED = (
    Situation(
        name="a code that does not exist",
        typed=("validate-meta", "--explain", "nothing"),
        hint="validate-meta --explain all",
    ),
    Situation(
        name="rows that cannot be trained on", typed=TRAIN, damage=drop_a_field,
        hint="validate-meta .*metadata.json --family wan-s2v --data-root .*", code=3,
    ),
    Situation(
        name="no such metadata", typed=(*TRAIN, "--train-data-meta", "none.json"),
        hint="validate-meta none.json --family wan-s2v .*", code=3,
    ),
    Situation(
        name="rows that the plan leaves out", typed=("plan-buckets", "cogvideox-fun", "--meta", "small.json"),
        damage=write_small_rows, hint="validate-meta small.json --family cogvideox-fun.*", code=3,
    ),
    Situation(
        name="rows with a warning", typed=(*TRAIN, DRY), damage=drop_a_control_clip,
        hint="validate-meta .*metadata.json --family wan-s2v --data-root .*",
    ),
    Situation(
        name="a plan without its metadata", typed=("plan-buckets", "wan-s2v", "--meta", "none.json"),
        hint="validate-meta none.json --family wan-s2v.*", code=3,
    ),
)  # fmt: skip

AFTER_A_RUN = (
    Situation(name="the directory holds a run", typed=(*TRAIN, *TRAINED), hint="resume vfun-demo/output_dir"),
    Situation(name="a run that is complete", typed=("resume", "--demo"), hint="export-bf16 .*checkpoint-4"),
    Situation(
        name="another learning rate", typed=("resume", "--demo", "--learning-rate", "0.5"),
        hint="resume .*checkpoint-4 --learning-rate 0.5 --allow learning-rate",
    ),
    Situation(
        name="another learning rate of train",
        typed=(*TRAIN, *TRAINED, "--learning-rate", "0.5", "--resume-from-checkpoint", "latest"),
        hint="resume .*checkpoint-4 --learning-rate 0.5 --allow learning-rate",
    ),
    Situation(
        name="the checkpoint of another command",
        typed=("lora", *TRAIN[1:], "--resume-from-checkpoint", "checkpoint-4"),
        hint="resume .*checkpoint-4",
    ),
    Situation(
        name="another optimizer", typed=("resume", "--demo", "--optimizer", "adafactor", "--max-train-steps", "8"),
        hint="export-bf16 .*checkpoint-4",
    ),
    Situation(
        name="an option that run.json should not have", typed=("resume", "--demo"), damage=add_an_option,
        hint="train --help",
    ),
    Situation(
        name="a newer checkpoint that is damaged", typed=("resume", "--demo", DRY),
        damage=(RUN.checkpoint(4) / "manifest.json").unlink, hint="checkpoints verify .*checkpoint-4", code=5,
    ),
    Situation(
        name="a loss that is not a number",
        typed=("resume", "--demo", "--learning-rate", NAN, "--allow", "learning-rate", "--max-train-steps", "8"),
        hint=r"resume .*output_dir --learning-rate 1e\+37 --allow learning-rate",
    ),
)  # fmt: skip


def command_in(said: str) -> list[str]:
    """Of the last hint: a command is all of the hint, or what stands after its last colon."""
    found = re.findall(r"^(?:next: |.*: )vfun ([a-z].*)$", said, re.MULTILINE)
    assert found, said
    return shlex.split(found[-1])


def check(situation: Situation, vfun: Vfun) -> None:
    situation.damage()
    said = vfun(*situation.typed)
    command = command_in(said.err)
    assert re.fullmatch(situation.hint, shlex.join(command)), said.err
    answer = vfun(*command, *([DRY] if command[0] in TRAINS else []))
    assert answer.code == situation.code, answer.err
    assert "Usage:" not in answer.err


@pytest.mark.parametrize("situation", UNTRAINED, ids=lambda situation: situation.name)
def test_the_command_of_a_hint_works(situation: Situation, place: Path, vfun: Vfun) -> None:
    check(situation, vfun)


@pytest.mark.slow
@pytest.mark.parametrize("situation", AFTER_A_RUN, ids=lambda situation: situation.name)
def test_the_command_of_a_hint_works_after_a_run(
    situation: Situation, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vfun: Vfun
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    check(situation, vfun)


@pytest.mark.long
def test_a_run_that_saved_nothing_begins_anew_as_its_hint_says(place: Path, vfun: Vfun) -> None:
    command = (*TRAIN, *QUICK, "--max-train-steps", "3", "--learning-rate", NAN)
    said = vfun(*command)
    assert said.code == 1 and "is nan" in said.err, said.err
    found = re.search(r"the same command with (.*) begins anew", said.err)
    assert found and "vfun resume" not in said.err, said.err
    assert found[1] == "--learning-rate 1e+37 --overwrite"
    again = vfun(*command, *shlex.split(found[1]), "--learning-rate", "1e-5", "--max-train-steps", "1")
    assert again.code == 0, again.err


@pytest.mark.long
def test_a_run_that_a_second_ctrl_c_stops_goes_on_as_its_hint_says(place: Path, vfun: Vfun) -> None:
    job = start(*ENDLESS)
    wait_for_step(RUN, 3, job)
    for rank in training_processes(RUN)[1]:
        os.kill(rank, signal.SIGSTOP)  # in a step whose end does not come
    job.send_signal(signal.SIGINT)
    wait_for(RUN.stop_request().exists, job)
    job.send_signal(signal.SIGINT)
    said = finish(job, 130)
    assert "stopped at once" in said.err, said.err
    command = command_in(said.err)
    assert command == ["resume", "vfun-demo/output_dir"]
    assert vfun(*command, DRY).code == 0


@pytest.mark.long
def test_a_run_whose_disk_is_full_goes_on_as_its_hint_says(place: Path, vfun: Vfun) -> None:
    with file_system(place / "disk", "size=12M"):  # a checkpoint takes 8
        said = vfun(*ENDLESS, "--output-dir", "disk/run")
        assert said.code == 1 and "no checkpoint can be written" in said.err, said.err
        command = command_in(said.err)
        assert command == ["resume", str(place / "disk/run")]
        assert vfun(*command, DRY).code == 0


@pytest.mark.slow
def test_a_file_that_only_decoding_finds_broken_is_found_by_the_command_of_the_hint(place: Path, vfun: Vfun) -> None:
    spoil_pictures()
    said = vfun(*TRAIN, "--max-train-steps", "1")
    assert said.code == 3 and "--on-bad-sample skip" in said.err, said.err
    command = command_in(said.err)
    assert "--deep" in command
    assert vfun(*command).code == 3


@pytest.mark.slow
def test_a_missing_package_is_installed_by_the_command_of_the_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentFault) as missing:
        require_package("tracker", "a_tracker", install="a-tracker-that-is-missing")
    wheel = tmp_path / "a_tracker_that_is_missing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        described = "Metadata-Version: 2.1\nName: a-tracker-that-is-missing\nVersion: 1.0\n"
        file.writestr("a_tracker_that_is_missing-1.0.dist-info/METADATA", described)
        file.writestr("a_tracker_that_is_missing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("a_tracker_that_is_missing-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "DRY_RUN": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    command = shlex.split(missing.value.hint or "")
    assert command[0] == "pip"
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Would install" in done.stdout, done.stderr


@pytest.mark.slow
def test_every_hint_with_a_command_stands_in_this_file() -> None:
    """A new one has to be run in its situation too."""
    commands = {
        hint
        for module in MODULES
        for _, _, hints in raised(module)
        for hint in hints
        if re.search(r"(^|: )(vfun|pip) [a-z]", hint)
    }
    assert commands == {
        "vfun resume {}",  # the checkpoint of another command
        "The options: vfun train --help",  # an option that run.json should not have
        "pip install {}",  # a missing package
        "vfun export-bf16 {}, and name the folder that it writes.",  # a checkpoint as --transformer-path
        "pip install 'vfun[parquet]'",  # a Parquet file without pyarrow: tests/metadata/test_parquet.py
        # what --fix cannot write of a folder: tests/commands/test_folders.py
        "vfun make-meta FOLDER; of a metadata file, vfun validate-meta META --fix OUT fills in what it lacks.",
        "Go on with --optimizer {}, or begin a new run from the weights: vfun export-bf16 {}",  # another optimizer
        # rows that cannot be trained on
        "{} All that is wrong: vfun validate-meta",
        "All codes: vfun validate-meta --explain all",  # a code that does not exist
        "What to do: vfun validate-meta --explain {}",  # rows that no video can be made of: tests/sampling/test_rows.py
        "All files that cannot be decoded: vfun validate-meta --deep",  # a file that only decoding finds broken
    }
