"""A run from --transformer-path and --vae-path, in front of the user: launched, continued, refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.commands.conftest import Vfun
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.usefixtures("never_trains")

TRAIN = ("train", "cogvideox-fun", "--demo", "--output-dir", "run")
MODEL = Path("vfun-demo/cogvideox-fun/model")
FILE = "diffusion_pytorch_model.safetensors"


def other_weights(part: str, target: Path, by: float = 0.5) -> Path:
    """The demo's weights of a part, a little otherwise."""
    tensors = {
        name: value + value.dtype.type(by) if value.dtype.kind == "f" else value
        for name, value in load_file(MODEL / part / FILE).items()
    }
    save_file(tensors, target)
    return target


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize(("option", "part"), [("transformer-path", "transformer"), ("vae-path", "vae")])
def test_a_run_goes_on_with_the_same_contents_wherever_they_lie_and_with_no_others(
    option: str, part: str, vfun: Vfun
) -> None:
    Path("w").mkdir()
    file = other_weights(part, Path("w/first.safetensors"))
    said = vfun(*TRAIN, f"--{option.replace('-', '_')}={file}")
    assert said.code == 0, said.err
    name = option.replace("-", "_")
    described = RunDir(Path("run")).read_run()
    assert described["config"][name] == str(file.absolute())
    assert name in described["contents"]

    file.rename("w/moved.safetensors")
    said = vfun("resume", "run", "--max-train-steps", "6", f"--{option}", "w/moved.safetensors")
    assert said.code == 0, said.err

    other_weights(part, Path("w/moved.safetensors"), by=0.25)
    said = vfun("resume", "run", "--max-train-steps", "8", f"--{option}", "w/moved.safetensors")
    assert said.code == 5, said.err
    assert f"{name} w/moved.safetensors: the file has other contents than when the run began" in in_one_line(said.err)
    said = vfun("resume", "run", "--max-train-steps", "8", f"--{option}", "w/moved.safetensors", "--allow", option)
    assert said.code == 0, said.err


def test_weights_that_are_named_for_the_first_time_make_another_run(vfun: Vfun) -> None:
    assert vfun(*TRAIN).code == 0
    file = other_weights("transformer", Path("w.safetensors"))
    said = vfun("resume", "run", "--max-train-steps", "6", "--transformer-path", str(file))
    assert said.code == 5
    assert "transformer_path None ->" in in_one_line(said.err)


def test_a_run_whose_weights_are_no_longer_named_is_another_run(vfun: Vfun) -> None:
    file = other_weights("transformer", Path("w.safetensors"))
    assert vfun(*TRAIN, "--transformer-path", str(file)).code == 0
    said = vfun(*TRAIN, "--max-train-steps", "6", "--resume-from-checkpoint", "run/checkpoint-4")
    assert said.code == 5, said.err
    assert "-> None" in in_one_line(said.err)


def test_what_does_not_fit_is_refused_before_anything_is_started(vfun: Vfun) -> None:
    tensors = load_file(MODEL / "transformer" / FILE)
    first = next(iter(tensors))
    save_file({name: value for name, value in tensors.items() if name != first}, "w.safetensors")
    for command in (TRAIN, ("lora", *TRAIN[1:]), ("cache", *TRAIN[1:3], "--cache", "latents")):
        said = vfun(*command, "--transformer-path", "w.safetensors")
        assert said.code == 5, said.err
        assert f"the tensors in --transformer-path w.safetensors do not fit the model: 1 missing: {first}" in (
            in_one_line(said.err)
        )
    assert not Path("run").exists()


def test_a_fixed_size_and_drawn_aspects_stand_in_run_json_and_change_the_run(vfun: Vfun) -> None:
    said = vfun(*TRAIN, "--fix_sample_size", "64", "96")
    assert said.code == 0, said.err
    assert json.loads(Path("run/run.json").read_text())["config"]["fix_sample_size"] == [64, 96]
    assert vfun("resume", "run", "--max-train-steps", "6").code == 0
    said = vfun("resume", "run", "--max-train-steps", "8", "--fix-sample-size", "64", "64")
    assert said.code == 5
    assert "fix_sample_size [64, 96] -> [64, 64]" in in_one_line(said.err)
    assert "--fix-sample-size 64,64" in in_one_line(said.err)
    shutil.rmtree("run")
    assert vfun(*TRAIN, "--random_ratio_crop").code == 0
    said = vfun("resume", "run", "--max-train-steps", "8", "--no-random-ratio-crop")
    assert said.code == 5
    assert "random_ratio_crop True -> False" in in_one_line(said.err)
