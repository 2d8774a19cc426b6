"""What every command keeps: names, dry runs that touch nothing, one JSON object, plain text where no terminal is."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands.conftest import Vfun, digest
from tests.jobs import losses, vfun_process
from tests.test_children import LEFT_OVER
from vfun_cli import devices, families, main
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.launch import show
from vfun_cli.launch.job import decide
from vfun_cli.modeling.media.writing import write_png, write_wav
from vfun_cli.run.rundir import RunDir

COMMANDS = (
    "validate-meta",
    "make-meta",
    "make-control",
    "fetch",
    "plan-buckets",
    "train",
    "lora",
    "resume",
    "export-bf16",
    "generate",
    "acceptance",
)
DRY = ("--demo", "--dry-run")


def test_help_lists_the_commands(vfun: Vfun) -> None:
    said = vfun("--help")
    assert said.code == 0
    assert set(COMMANDS) <= set(said.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_eighty_columns_and_shows_an_example(command: str, vfun: Vfun) -> None:
    said = vfun(command, "--help")
    assert said.code == 0 and max(map(len, said.out.splitlines())) <= 80
    assert "Example" in said.out and "--json" in said.out and "--debug" in said.out


def test_train_without_a_family_lists_the_families(vfun: Vfun) -> None:
    said = vfun("train")
    assert said.code == 2
    assert set(families.FAMILIES) <= set(said.out.split())
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("trian",), "train"),
        (("plan-bucket",), "plan-buckets"),
        (("lora", "cogvideox-fum"), "cogvideox-fun"),
        (("plan-buckets", "wan-s2w"), "wan-s2v"),
        (("validate-meta", "--famly", "wan-s2v"), "--family"),
        (("train", "wan-s2v", "--zero_4"), "--zero3"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(typed: tuple[str, ...], meant: str, vfun: Vfun) -> None:
    said = vfun(*typed)
    assert said.code == 2 and meant in said.err


def test_a_line_of_an_old_script_works_as_pasted(place: Path, vfun: Vfun) -> None:
    pasted = shlex.split(
        "--config_path=config/wan2.2/wan_civitai_s2v.yaml --video_sample_size=96 --token_sample_size=96 "
        "--train_batch_size=1 --learning_rate=2e-05 --lr_scheduler=constant_with_warmup --mixed_precision=bf16 "
        "--gradient_checkpointing --random_hw_adapt --training_with_video_token_length --enable_bucket "
        "--uniform_sampling --low_vram --trainable_modules '.'"
    )
    said = vfun("train", "wan-s2v", *DRY, "--json", *pasted)
    assert said.code == 0, said.err
    config = json.loads(said.out)["config"]
    assert (config["video_sample_size"], config["learning_rate"], config["low_vram"]) == (96, 2e-5, True)
    assert "--config-path has no effect" in said.err


def test_hyphens_and_underscores_name_the_same_options() -> None:
    given = ["train", "--video_sample_size=6_4", "--output_dir", "my_run", "--", "--as_it_is"]
    assert main.hyphenate(given) == ["train", "--video-sample-size=6_4", "--output-dir", "my_run", "--", "--as_it_is"]


PROMPTS = ["--validation-prompts", "a cat, red", "--validation-prompts", "a dog"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (
            ["train", "wan-s2v", "--trainable_modules", "attn1", "attn2", "--fsdp"],
            ["train", "wan-s2v", "--trainable-modules", "attn1", "--trainable-modules", "attn2", "--fsdp"],
        ),
        (
            ["train", "wan-s2v", "--validation_prompts", "a cat, red", "a dog", "--seed=1"],
            ["train", "wan-s2v", *PROMPTS, "--seed=1"],
        ),
        (
            ["lora", "--fsdp", "wan-s2v", "--validation_prompts", "a cat, red", "a dog"],
            ["lora", "--fsdp", "wan-s2v", *PROMPTS],
        ),
        # Where no family was named yet, the next word may be it.
        (["train", "--trainable_modules", "attn1", "wan-s2v"], ["train", "--trainable-modules", "attn1", "wan-s2v"]),
        (["resume", "--trainable-modules", "a", "run"], ["resume", "--trainable-modules", "a", "run"]),
        (["train", "wan-s2v", "--trainable-modules=a", "b"], ["train", "wan-s2v", "--trainable-modules=a", "b"]),
        (["train", "wan-s2v", "--trainable-modules"], ["train", "wan-s2v", "--trainable-modules"]),
        (["train", "wan-s2v", "--seed", "1", "2"], ["train", "wan-s2v", "--seed", "1", "2"]),
    ],
)
def test_lists_are_taken_with_spaces_as_the_original_scripts_write_them(typed: list[str], meant: list[str]) -> None:
    assert main.hyphenate(typed) == meant


def test_the_validation_of_an_old_script_works_as_pasted(place: Path, vfun: Vfun) -> None:
    pasted = shlex.split(
        "--validation_prompts 'a cat, red' 'a dog' --validation_image_paths 'one, two.png' b.png --validation_steps=10 "
        "--validation_epochs=5 --trainable_modules self_attn ffn --validation_audio_paths a.wav"
    )
    for name in ("one, two.png", "b.png"):
        write_png(place / name, torch.zeros(3, 64, 64))
    write_wav(place / "a.wav", np.ones(16000, np.float32), 16000)
    said = vfun("train", "wan-s2v", *DRY, "--json", *pasted)
    assert said.code == 0, said.err
    config = json.loads(said.out)["config"]
    assert config["validation_prompts"] == ["a cat, red", "a dog"]
    assert config["validation_image_paths"] == ["one, two.png", "b.png"]
    assert (config["validation_steps"], config["validation_epochs"]) == (10, 5)
    assert config["trainable_modules"] == ["self_attn", "ffn"]


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (["--validation-steps", "5"], "validation_steps is 5, but there is nothing to validate on"),
        (["--validation-epochs", "1"], "validation_epochs is 1, but there is nothing to validate on"),
        (["--validation-rows", "2", "--validation-meta", "x.json"], "are two sets of held-out rows"),
        (["--validation-rows", "6"], "would leave nothing to train on"),
    ],
)
def test_a_validation_that_cannot_be_is_refused_with_the_way_out(
    options: list[str], meant: str, place: Path, vfun: Vfun
) -> None:
    said = vfun("train", "wan-s2v", *DRY, *options)
    assert said.code == 2 and meant in " ".join(said.err.split()) and "next: " in said.err


def test_rows_to_validate_on_are_checked_like_those_to_train_on(place: Path, vfun: Vfun) -> None:
    rows = json.loads((place / "vfun-demo/wan-s2v/data/metadata.json").read_text(encoding="utf-8"))[:2]
    rows[1]["file_path"] = "train/none.mp4"
    (place / "validation.json").write_text(json.dumps(rows), encoding="utf-8")
    said = vfun("train", "wan-s2v", *DRY, "--validation-meta", "validation.json")
    words = " ".join(said.err.split())
    assert said.code == 3 and "row 1, file_path: missing-file" in words
    assert "vfun validate-meta validation.json" in words


def test_the_plan_says_what_the_held_out_loss_costs(place: Path, vfun: Vfun) -> None:
    given = ("wan-s2v", "--demo", "--validation-rows", "2", "--validation-steps", "3")
    planned = json.loads(vfun("plan-buckets", *given, "--json").out)
    assert planned["held_out"]["rows"] == 2 and planned["held_out"]["passes"] == 18
    assert planned["ledger"]["dropped"] == {"held-out": 2}
    trained = json.loads(vfun("train", *given, "--dry-run", "--json").out)
    assert trained["plan"]["held_out"] | {"share_of_training": 0} == planned["held_out"] | {"share_of_training": 0}
    said = " ".join(vfun("plan-buckets", *given).out.split())
    assert "Held-out loss 2 rows at 9 timesteps" in said and "in 18 forward passes every 3 steps" in said
    steps = families.find("wan-s2v").sampling.demo["steps"]
    assert planned["samples"]["passes"] == trained["plan"]["samples"]["passes"] == 2 * steps * 2
    assert f"Samples 2 rows in {steps} denoising steps" in said
    without = json.loads(vfun("plan-buckets", *given, "--no-validation-samples", "--json").out)
    assert "held_out" in without and "samples" not in without


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--gradient_checkpointing", "--fsdp"], ["--gradient-checkpointing=block", "--fsdp"]),
        (["--gradient-checkpointing"], ["--gradient-checkpointing=block"]),
        (["--no_gradient_checkpointing"], ["--gradient-checkpointing=none"]),
        (["--gradient_checkpointing", "selective"], ["--gradient-checkpointing", "selective"]),
        (["--gradient-checkpointing=none"], ["--gradient-checkpointing=none"]),
    ],
)
def test_gradient_checkpointing_is_a_switch_and_a_choice(typed: list[str], meant: list[str]) -> None:
    assert main.hyphenate(typed) == meant


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "wan-s2v", *DRY),
        ("train", "wan-s2v", "--fsdp", *DRY),
        ("train", "cogvideox-fun", "--zero3-offload", *DRY),
        ("plan-buckets", "wan-s2v", "--demo"),
        ("plan-buckets", "hunyuanvideo-t2v"),
        ("validate-meta", "--family", "wan-s2v", "--demo"),
    ],
)
def test_json_is_one_object_and_nothing_else(arguments: tuple[str, ...], place: Path, vfun: Vfun) -> None:
    before = digest(place)
    said = vfun(*arguments, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["schema"] == 1
    assert said.out.count("\n") == 1
    assert digest(place) == before


def test_json_of_the_families(vfun: Vfun) -> None:
    said = vfun("train", "--json")
    assert said.code == 2 and set(json.loads(said.out)["families"]) == set(families.FAMILIES)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero2", "zero3", "zero3-offload"])
def test_a_dry_run_shows_everything_and_writes_nothing(
    strategy: str, place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(place)
    monkeypatch.setenv("HOME", str(place / "home"))  # where the headers of files are remembered
    said = vfun("train", "wan-s2v", *DRY, "--strategy", strategy, "--json")
    content = json.loads(said.out)
    assert content["config"]["strategy"] == strategy and content["sources"]["strategy"] == "option"
    assert content["argv"][-1] in content["files"]
    assert any(path.endswith("accelerate.yaml") for path in content["files"])
    assert any(path.endswith("deepspeed.json") for path in content["files"]) == strategy.startswith("zero")
    assert content["plan"]["ledger"]["rows"] == 6
    disk = content["disk"]
    assert disk["total_bytes"] == disk["checkpoints"] * disk["checkpoint_bytes"] and disk["free_bytes"] > 0
    assert disk["checkpoint_bytes"] == pytest.approx(9.1e6 if strategy == "zero2" else 7.8e6, rel=0.02)
    assert not Path("vfun-demo/output_dir").exists()
    assert digest(place) == before and not (place / "home").exists()


def test_a_dry_run_may_be_for_another_machine(place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
    node = ("train", "wan-s2v", "--fsdp", *DRY, "--device", "cuda", "--no-fit-check")
    said = vfun(*node, "--num-processes", "8")
    assert said.code == 0 and re.search(r"num_processes = 8 +option", said.out), said.err
    assert "mean over max FLOPs of 8 ranks" in said.out and "num_processes: 8" in said.out
    said = vfun(*node)
    assert said.code == 6 and "--num-processes" in said.err
    assert vfun("train", "wan-s2v", "--demo", "--device", "cuda", "--num-processes", "8", "--fsdp").code == 6


def test_what_the_machine_decides_is_told_with_the_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = families.find("cogvideox-fun")
    demo = demo_default.make(spec)
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: False)
    show.preview(decide("train", spec, resolve("train", spec, {"device": "cpu"}, demo=demo)))
    assert "mixed_precision no: its processor has no units for bf16" in capfd.readouterr().err


def test_a_dry_run_for_people_shows_options_files_command_and_plan(place: Path, vfun: Vfun) -> None:
    before = digest(place)
    said = vfun("train", "wan-s2v", "--fsdp", *DRY, "--seed", "7")
    assert re.search(r"seed = 7 +option", said.out) and re.search(r"adam_epsilon = 1e-10 +wan-s2v default", said.out)
    assert all(word in said.out for word in ("accelerate.yaml", "fsdp_config", "vfun_cli.training.launcher", "Epoch"))
    assert re.search(
        r"^checkpoints: 7\.77 MB each, at most \d+ at a time: [\d.]+ MB; .* are free$", said.out, re.MULTILINE
    )
    assert "network_alpha" not in said.out, "an option of lora alone"
    assert digest(place) == before and not Path("vfun-demo/output_dir").exists()


def test_more_than_one_strategy_is_refused(place: Path, vfun: Vfun) -> None:
    said = vfun("train", "wan-s2v", "--fsdp", "--zero2")
    assert said.code == 2 and "fsdp, zero2" in said.err


def test_debug_shows_the_traceback_and_nothing_else_does(place: Path, vfun: Vfun) -> None:
    broken = ("train", "wan-s2v", "--demo", "--train-data-meta", "none.json")
    assert "Traceback" not in vfun(*broken).err
    said = vfun(*broken, "--debug")
    assert said.code == 3 and "Traceback" in said.err and "error:" in said.err


def test_a_fault_of_ours_is_one_message_too(place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(families, "find", fail)
    said = vfun("train", "wan-s2v")
    assert said.code == 1 and "ZeroDivisionError: by nought" in said.err and "--debug" in said.err
    assert "Traceback" not in said.err
    said = vfun("train", "wan-s2v", "--debug", "--json")
    assert "Traceback" in said.err and "ZeroDivisionError" in json.loads(said.out)["error"]["message"]


@pytest.mark.slow
def test_no_colour_when_not_a_terminal(place: Path) -> None:
    for arguments in (["--help"], ["plan-buckets", "wan-s2v"], ["train", "nope"]):
        said = vfun_process(*arguments)
        assert "\x1b" not in said.out + said.err


@pytest.mark.slow
def test_no_color_is_heeded_on_a_terminal(place: Path) -> None:
    """Under a pseudo-terminal: colours by default, none with NO_COLOR."""
    script = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'vfun_cli', 'train', 'nope']) >> 8)"
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    seen = {}
    for no_color in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment | {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {}),
            check=False,
        )
        assert done.returncode == 2
        seen[no_color] = done.stdout
    assert re.search("\x1b\\[[0-9;]*3[0-9]m", seen[""])
    assert not re.search("\x1b\\[[0-9;]*3[0-9]m", seen["1"])


@pytest.mark.slow
def test_the_demo_is_made_without_a_word_from_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = vfun_process("train", "hunyuanvideo-i2v", "--demo", "--dry-run", "--json", code=0)
    lines = said.err.splitlines()
    assert lines and all(line.startswith("making the demo's ") for line in lines), lines
    assert [*tmp_path.iterdir()] == [], "a dry run writes nothing"
    config = json.loads(said.out)["config"]
    assert Path(config["pretrained_model_name_or_path"]) == demo_default.FOLDER / "hunyuanvideo-i2v" / "model"


@pytest.mark.long
def test_a_run_by_hand_amid_planted_files_is_that_of_vfun_in_a_shell_full_of_another_launch(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO, whose launcher puts the folder that it is started in on the path of the ranks."""
    train = ("train", "cogvideox-fun", "--demo", "--zero2", "--max-train-steps", "3", "--dataloader-num-workers", "0")
    plan = json.loads(vfun_process(*train, "--output-dir", "by-hand", "--dry-run", "--json").out)
    assert not Path("by-hand").exists()
    for name, text in plan["files"].items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("accelerate", "av", "deepspeed", "queue", "torch", "vfun_cli"):
        (elsewhere / f"{name}.py").write_text("from pathlib import Path\nPath(__file__ + '.imported').touch()\n")
    subprocess.run(plan["argv"], cwd=elsewhere, check=True, capture_output=True, timeout=300)
    assert not [*elsewhere.glob("*.imported")]
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    vfun_process(*train, "--output-dir", "by-vfun", code=0)
    by_hand, by_vfun = RunDir(Path("by-hand")), RunDir(Path("by-vfun"))
    assert losses(by_hand) == losses(by_vfun) and len(losses(by_hand)) == 3
    assert by_vfun.rank_log(1).stat().st_mode & 0o111 == 0, "a log is no program"
    assert not by_vfun.rank_error_spaces()


@pytest.mark.slow
def test_paths_with_spaces_quotes_and_letters_of_any_alphabet(place: Path) -> None:
    folder = place / "bücher 'und' \"Filme\" $HOME; 影片"
    folder.mkdir()
    data = folder / "data & metadata"
    Path("vfun-demo/cogvideox-fun/data").rename(data)
    model = folder / "ein modell"
    Path("vfun-demo/cogvideox-fun/model").rename(model)
    output = folder / "out put"
    said = vfun_process(
        "train", "cogvideox-fun", "--max-train-steps", "2", "--dataloader-num-workers", "0",
        "--video-sample-size", "64", "--image-sample-size", "64", "--token-sample-size", "64",
        "--video-sample-n-frames", "9", "--video-sample-stride", "1",
        "--pretrained-model-name-or-path", str(model), "--train-data-meta", str(data / "metadata.json"),
        "--output-dir", str(output), "--json", code=0,
    )  # fmt: skip
    assert Path(json.loads(said.out)["checkpoint"]).is_dir() and len(losses(RunDir(output))) == 2
    exported = vfun_process("export-bf16", str(output / "checkpoint-2"), "--json", code=0)
    assert json.loads(exported.out)["verified"]
