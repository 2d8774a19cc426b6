"""What the guides of the original scripts print: command lines, metadata, directories; through the command line."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands import typed_lines
from tests.commands.conftest import Vfun
from tests.metadata.small_media import encode_video, write_sound
from vfun_cli import devices, families
from vfun_cli.config import resolve
from vfun_cli.config.options import RunConfig, options, parse
from vfun_cli.config.originals import FLAGS
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import CheckpointError
from vfun_cli.families import detect

# What the guides type, family by family; values as typed there.
COMMON = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "num_train_epochs": 100,
    "checkpointing_steps": 50,
    "seed": 42,
    "gradient_checkpointing": "block",
    "mixed_precision": "bf16",
    "adam_weight_decay": 3e-2,
    "adam_epsilon": 1e-10,
    "vae_mini_batch": 1,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "enable_bucket": True,
}
FULL = {
    **COMMON,
    "learning_rate": 2e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 100,
    "uniform_sampling": True,
    "trainable_modules": (".",),
}
MODELS = "models/Diffusion_Transformer/"
DATA = {"train_data_dir": "datasets/internal_datasets", "train_data_meta": "datasets/internal_datasets/metadata.json"}


def sizes(image: int | None, video: int, token: int, stride: int, frames: int) -> dict[str, Any]:
    found = {
        "video_sample_size": video,
        "token_sample_size": token,
        "video_sample_stride": stride,
        "video_sample_n_frames": frames,
    }
    return found if image is None else {**found, "image_sample_size": image, "video_repeat": 1}


S2V = {
    **FULL,
    **sizes(None, 640, 640, 1, 80),
    "low_vram": True,
    "output_dir": "output_dir",
    "pretrained_model_name_or_path": MODELS + "Wan2.2-S2V-14B",
    "train_data_dir": "datasets/internal_datasets",
    "train_data_meta": "datasets/internal_datasets/metadata_control.json",
}
HUNYUAN = {
    **FULL,
    **DATA,
    **sizes(640, 640, 640, 2, 81),
    "low_vram": True,
    "output_dir": "output_dir2",
}
EASYANIMATE = {
    **FULL,
    **DATA,
    **sizes(1024, 256, 512, 3, 49),
    "checkpointing_steps": 100,
    "adam_weight_decay": 5e-3,
    "low_vram": False,
    "output_dir": "output_dir",
}
WAN_FUN = {
    **FULL,
    **DATA,
    **sizes(1024, 256, 512, 2, 81),
    "low_vram": True,
    "control_ref_image": "first_frame",
    "output_dir": "output_dir",
    "pretrained_model_name_or_path": MODELS + "Wan2.1-Fun-14B-Control",
}
COGVIDEOX = {
    **COMMON,
    **DATA,
    **sizes(512, 512, 512, 3, 49),
    "learning_rate": 1e-4,
    "low_vram": True,
    "rank": 64,
    "network_alpha": 32,
    "train_mode": "inpaint",
    "output_dir": "output_dir",
    "pretrained_model_name_or_path": MODELS + "CogVideoX-Fun-2b-InP",
}
COMMAND_LINES: list[tuple[str, str, str, dict[str, Any]]] = [
    *[("train", "wan-s2v", strategy, S2V) for strategy in ("single", "zero2", "zero3", "fsdp")],
    *[
        ("train", "hunyuanvideo-t2v", strategy, {**HUNYUAN, "train_mode": "normal"})
        for strategy in ("single", "zero2", "fsdp")
    ],
    ("train", "hunyuanvideo-i2v", "fsdp", {**HUNYUAN, "train_mode": "i2v"}),
    *[
        (
            "train",
            "easyanimate-v5.1-control",
            strategy,
            {**EASYANIMATE, "loss_type": "flow", "train_mode": "control_ref", "control_ref_image": "first_frame"},
        )
        for strategy in ("single", "zero2")
    ],
    *[
        ("train", "easyanimate-v5-control", strategy, {**EASYANIMATE, "loss_type": "ddpm"})
        for strategy in ("single", "zero2")
    ],
    *[
        ("train", "wan-fun-control", strategy, {**WAN_FUN, "train_mode": "control_object"})
        for strategy in ("single", "zero2")
    ],
    ("train", "wan-fun-control", "zero3", {**WAN_FUN, "train_mode": "inpaint"}),
    *[("lora", "cogvideox-fun", strategy, COGVIDEOX) for strategy in ("single", "zero2", "fsdp")],
]

TEXT = "A group of young men in suits and sunglasses are walking down a city street."
SPEECH_ROWS = """[
    {
      "file_path": "train/00000001.mp4",
      "audio_path": "wav/00000001.wav",
      "control_file_path": "control/00000001.mp4",
      "text": "%s",
      "type": "video"
    }
]
"""
CONTROL_ROWS = """[
    {
      "file_path": "train/00000001.mp4",
      "control_file_path": "control/00000001.mp4",
      "text": "%s",
      "type": "video"
    },
    {
      "file_path": "train/00000002.jpg",
      "control_file_path": "control/00000002.jpg",
      "text": "%s",
      "type": "image"
    }
]
"""
PRINTED = {
    "wan-s2v": SPEECH_ROWS % TEXT,
    "wan-fun-control": CONTROL_ROWS % (("一群穿着西装和太阳镜的年轻男子走在城市街道上。",) * 2),
    "easyanimate-v5.1-control": CONTROL_ROWS % (TEXT, TEXT),
    "easyanimate-v5-control": CONTROL_ROWS % (TEXT, TEXT),
}
"""Metadata examples of the guides that have one, without the dots at their end."""


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guides' working directory: models and data where they say, tiny models in the released layouts."""
    root = tmp_path_factory.mktemp("documented")
    for spec in families.FAMILIES.values():
        presets = [preset.train for preset in spec.defaults.presets.values()]
        for values in (spec.defaults.train, *presets):
            if "pretrained_model_name_or_path" in values:
                demo_default.builder(spec)(root / str(values["pretrained_model_name_or_path"]))
    data = root / "datasets/internal_datasets"
    for kind in ("train", "control"):
        encode_video(data / kind / "00000001.mp4", frames=60, width=640, height=640)
        pixels = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)
        Image.fromarray(pixels).save(data / kind / "00000002.jpg")
    write_sound(data / "wav/00000001.wav", seconds=2.5)
    videos = [row for row in json.loads(PRINTED["easyanimate-v5-control"]) if row["type"] == "video"]
    (data / "metadata.json").write_text(json.dumps(videos), encoding="utf-8")
    (data / "metadata_control.json").write_text(PRINTED["wan-s2v"], encoding="utf-8")
    return root


@pytest.fixture
def there(documented: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(documented)
    return documented


@pytest.mark.parametrize(("command", "family", "strategy", "typed"), COMMAND_LINES)
def test_a_dry_run_shows_the_values_that_the_guides_type(
    command: str, family: str, strategy: str, typed: dict[str, Any], there: Path, vfun: Vfun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: True)
    said = vfun(command, family, "--strategy", strategy, "--dry-run", "--json")
    assert said.code == 0, said.err
    config = RunConfig.from_json(json.loads(said.out)["config"])
    assert config.strategy == strategy
    got = {name: getattr(config, name) for name in typed}
    assert got == {name: parse(name, value, "document") for name, value in typed.items()}
    assert len(typed) >= 20


LAUNCHES = [
    pytest.param(command, family, strategy, words, id=f"{command}-{family}-{number}-{strategy}")
    for number, (command, family, strategies, words) in enumerate(typed_lines.LINES)
    for strategy in strategies.split()
]


def as_options(words: list[str]) -> dict[str, Any]:
    """What a command line says, by option, as argparse reads it; of what has no effect, nothing."""
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value or True
        else:
            found[name] = word
    return {name: value for name, value in found.items() if name in options() and name not in FLAGS}


@pytest.mark.parametrize(("command", "family", "strategy", "words"), LAUNCHES)
def test_a_command_of_the_documents_is_taken_as_typed(
    command: str, family: str, strategy: str, words: str, there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: True)
    model = families.find(family).defaults.train["pretrained_model_name_or_path"]
    meta = "metadata_control.json" if family == "wan-s2v" else "metadata.json"
    values = {
        "$MODEL_NAME": str(model),
        "$DATASET_NAME": "datasets/internal_datasets/",
        "$DATASET_META_NAME": f"datasets/internal_datasets/{meta}",
    }
    text = f"{typed_lines.COMMON} {words}"
    for variable, value in values.items():
        text = text.replace(variable, value)
    typed = shlex.split(text)
    said = vfun(command, family, *typed, "--strategy", strategy, "--dry-run", "--json")
    if "--train_mode=inpaint" in typed and family.startswith("easyanimate"):  # of InP models, which no family here is
        assert said.code == 2 and "train_mode" in said.err
        return
    assert said.code == 0, said.err
    config = RunConfig.from_json(json.loads(said.out)["config"])
    expected = {name: parse(name, value, "document") for name, value in as_options(typed).items()}
    if "target_name" in expected:
        aliases = families.find(family).defaults.lora_aliases
        expected["target_name"] = tuple(aliases.get(name, name) for name in expected["target_name"])
    assert {name: getattr(config, name) for name in expected} == expected
    assert len(expected) >= 25 and config.strategy == strategy


UNMOVED = ("output_dir", "train_data_dir", "train_data_meta", "resume_from_checkpoint")
"""Folders, which no preset moves."""

NEWEST = {
    ("train", "wan-s2v"): "wan2.2_s2v",
    ("lora", "wan-s2v"): "wan2.2_s2v_lora",
    ("train", "wan-fun-control"): "wan2.1_fun_control",
    ("lora", "wan-fun-control"): "wan2.1_fun_control_lora",
    ("train", "hunyuanvideo-t2v"): "hunyuanvideo",
    ("lora", "hunyuanvideo-t2v"): "hunyuanvideo_lora",
    ("train", "cogvideox-fun"): "cogvideox_fun",
    ("lora", "cogvideox-fun"): "cogvideox_fun_lora",
}
"""The newest script of each, by the output directory that it types after ``output_dir_``."""


@pytest.mark.parametrize(("command", "family"), NEWEST)
def test_the_preset_of_2026_is_what_the_newest_documents_type(
    command: str, family: str, there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: True)
    line = next(
        words for *key, _, words in typed_lines.LINES
        if key == [command, family] and f"output_dir_{NEWEST[command, family]} " in words
    )  # fmt: skip
    typed = as_options(shlex.split(f"{typed_lines.COMMON} {line}"))
    said = vfun(command, family, "--preset", "2026", "--dry-run", "--json")
    assert said.code == 0, said.err
    config = RunConfig.from_json(json.loads(said.out)["config"])
    named = {name: value for name, value in typed.items() if name not in UNMOVED and "$" not in str(value)}
    expected = {name: parse(name, value, "document") for name, value in named.items()}
    if "target_name" in expected:
        aliases = families.find(family).defaults.lora_aliases
        expected["target_name"] = tuple(aliases.get(name, name) for name in expected["target_name"])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.low_vram == ("low_vram" in typed)
    if "lr_scheduler" not in typed:
        assert (config.lr_scheduler, config.lr_warmup_steps) == ("constant", 0)


@pytest.mark.slow
def test_a_preset_is_named_as_the_source_of_what_it_says_and_yields_to_all_that_is_said(
    there: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*words: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        said = json.loads(vfun("lora", "wan-s2v", *words, "--dry-run", "--json").out)
        return said["config"], said["sources"]

    config, sources = shown("--preset", "2026", "--control-ref-image", "first_frame")
    assert (config["video_sample_stride"], sources["video_sample_stride"]) == (2, "wan-s2v 2026 default")
    assert (config["lr_scheduler"], sources["lr_scheduler"]) == ("constant", "wan-s2v 2026 LoRA default")
    assert (config["control_ref_image"], sources["control_ref_image"]) == ("first_frame", "option")
    monkeypatch.setenv("VFUN_PRESET", "2026")
    assert shown()[0]["video_sample_stride"] == 2
    assert shown("--preset", "2025")[0]["video_sample_stride"] == 1
    monkeypatch.delenv("VFUN_PRESET")
    (there / "vfun.toml").write_text("preset = 2026\n")
    try:
        assert shown()[0]["video_sample_stride"] == 2
    finally:
        (there / "vfun.toml").unlink()
    assert shown()[0]["video_sample_stride"] == 1


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_unknown_preset_is_refused_with_those_of_the_family(family: str, vfun: Vfun) -> None:
    said = vfun("plan-buckets", family, "--preset", "2024")
    assert said.code == 2 and "has no preset '2024'" in said.err and "Its presets: 2025, 2026." in said.err


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_preset_of_2025_is_the_default(family: str) -> None:
    for command in ("train", "lora"):
        plain, named = (
            resolve.family_defaults(command, families.find(family), "fsdp", name) for name in (None, "2025")
        )
        assert plain == named


def test_every_family_has_a_documented_command_line() -> None:
    assert {family for _, family, _, _ in COMMAND_LINES} == set(families.FAMILIES)


@pytest.mark.parametrize("family", PRINTED)
def test_the_metadata_that_a_guide_prints_is_valid_and_is_all_used(family: str, there: Path, vfun: Vfun) -> None:
    path = Path("datasets/internal_datasets") / f"{family}.json"
    path.write_text(PRINTED[family], encoding="utf-8")
    said = vfun("validate-meta", str(path), "--family", family, "--deep", "--json")
    assert (said.code, json.loads(said.out)["problems"]) == (0, []), said.err
    planned = vfun("plan-buckets", family, "--meta", str(path), "--train-data-dir", str(path.parent), "--json")
    ledger = json.loads(planned.out)["ledger"]
    assert ledger["rows"] == len(json.loads(PRINTED[family])) and not ledger["dropped"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_directory_of_another_family_is_refused_and_its_own_is_named(family: str, there: Path) -> None:
    spec = families.find(family)
    for other in families.FAMILIES.values():
        directory = there / str(other.defaults.train["pretrained_model_name_or_path"])
        if other is spec:
            assert detect.read_dims(spec, directory).num_layers > 0
            continue
        with pytest.raises(CheckpointError) as caught:
            detect.read_dims(spec, directory)
        assert f"looks like a {other.name} model, not like {family}" in caught.value.message
        assert f"Train {other.name}," in caught.value.hint
