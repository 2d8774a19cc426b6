"""``vfun resume`` and ``train --resume-from-checkpoint``: two ways to the same continuation."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import TRAIN, TRAINED, Vfun

pytestmark = pytest.mark.slow

RESUME = ("resume", "--demo")
AGAIN = (*TRAIN, *TRAINED[:-2], "--resume-from-checkpoint", "latest")
"""The same run, but for the accumulation, which is typed nowhere."""


@pytest.fixture(autouse=True)
def workplace(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.mark.parametrize("command", [RESUME, AGAIN], ids=["resume", "train"])
def test_on_another_number_of_processes_a_step_stays_what_it_was(command: tuple[str, ...], vfun: Vfun) -> None:
    said = vfun(*command, "--ddp", "--num-processes", "2", "--dry-run", "--json")
    assert said.code == 0, said.err
    config = json.loads(said.out)["config"]
    assert (config["num_processes"], config["gradient_accumulation_steps"]) == (2, 1)


@pytest.mark.parametrize("command", [RESUME, AGAIN], ids=["resume", "train"])
def test_another_accumulation_on_as_many_processes_is_refused_with_the_command_that_is_not(
    command: tuple[str, ...], vfun: Vfun
) -> None:
    refused = vfun(*command, "--gradient-accumulation-steps", "1", "--dry-run")
    assert refused.code == 5 and "gradient_accumulation_steps 2 -> 1" in refused.err
    vfun_word, *allowed = shlex.split(refused.err.partition("you mean it: ")[2])
    assert vfun_word == "vfun"
    said = vfun(*allowed, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["config"]["gradient_accumulation_steps"] == 1


def test_the_checkpoint_of_another_command_is_refused_with_the_command_that_takes_it(vfun: Vfun) -> None:
    refused = vfun("lora", *AGAIN[1:], "--dry-run")
    assert refused.code == 5 and "a run of vfun train wan-s2v" in refused.err, refused.err
    _, *taken = shlex.split(refused.err.partition("next: ")[2])
    assert vfun(*taken, "--dry-run").code == 0


@pytest.fixture
def copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder and its run, free to move and to spoil, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "copy"))


FURTHER = ("--max-train-steps", "6", "--dry-run", "--json")
DEMO = Path("vfun-demo/wan-s2v")


def test_a_run_goes_on_from_any_folder_wherever_its_model_and_data_lie_now(copy: Path, vfun: Vfun) -> None:
    def resume(root: Path, *options: str) -> None:
        said = vfun("resume", str(root / "vfun-demo/output_dir"), *options, *FURTHER)
        assert said.code == 0, said.err

    resume(copy)
    moved = copy.rename("moved")
    resume(moved)  # what its options name lies beside it, as before
    (moved / DEMO / "model").rename("model")
    resume(moved, "--pretrained-model-name-or-path", "model")
    (moved / DEMO / "data").rename("data")
    data = ("--train-data-dir", "data", "--train-data-meta", "data/metadata.json")
    resume(moved, "--pretrained-model-name-or-path", "model", *data)


def spoil(path: Path) -> None:
    """Another content of the same size and time; a caption in the metadata."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(b"text") + 8 if path.suffix == ".json" else len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("option", "spoiled", "named"),
    [
        ("pretrained-model-name-or-path", "model/Wan2.1_VAE.pth", "Wan2.1_VAE.pth has other contents"),
        ("train-data-dir", "data/wav/00000003.wav", "row 2, audio_path (wav/00000003.wav) has other contents"),
        ("train-data-meta", "data/metadata.json", "row 0 has other contents"),
    ],
)
def test_other_contents_under_the_old_name_size_and_time_are_refused_and_what_is_allowed_is_noted(
    option: str, spoiled: str, named: str, copy: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    vfun("resume", "--demo", *FURTHER)  # what is remembered of the files must not hide it
    spoil(DEMO / spoiled)
    refused = vfun("resume", "--demo", *FURTHER)
    assert refused.code == 5 and named in refused.err, refused.err
    command = shlex.split(refused.err.partition("you mean it: vfun ")[2])
    allowed = vfun(*command, *FURTHER[2:])
    assert allowed.code == 0, allowed.err
    (run_json,) = [text for path, text in json.loads(allowed.out)["files"].items() if path.endswith("run.json")]
    (noted,) = json.loads(run_json)["allowed"]
    assert (noted["step"], noted["option"]) == (4, option.replace("-", "_")) and noted["before"] != noted["after"]
    again = vfun(*AGAIN, "--gradient-accumulation-steps", "2", *FURTHER)
    assert again.code == 5 and named in again.err, again.err


def test_a_run_of_which_no_contents_are_noted_goes_on_with_a_notice_if_its_metadata_are_the_same(
    copy: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    run_json = Path("vfun-demo/output_dir/run.json")
    run_json.write_text(json.dumps({**json.loads(run_json.read_text()), "contents": {}}))
    said = vfun("resume", "--demo", *FURTHER)
    assert said.code == 0 and "noted nothing" in said.err, said.err
    spoil(DEMO / "data/metadata.json")
    refused = vfun("resume", "--demo", *FURTHER)
    assert refused.code == 5 and "train_data_meta" in refused.err, refused.err
