"""Options: the documents' defaults, every way to set one, who wins, and what is said of a wrong one."""

import os
from pathlib import Path
from typing import Any

import pytest

from vfun_cli import docs, families
from vfun_cli.config import RunConfig, default_of, options, parse
from vfun_cli.errors import ConfigError
from vfun_cli.resolve import Resolved, resolve

# What the five documents type, family by family; values as typed there.
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
SEEDS: list[tuple[str, str, str, dict[str, Any]]] = [
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


def settle(
    command: str = "train",
    family: str = "wan-s2v",
    given: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    toml: str | None = None,
    folder: Path = Path("nowhere"),
) -> Resolved:
    if toml is not None:
        (folder / "vfun.toml").write_text(toml, encoding="utf-8")
    return resolve(command, families.find(family), given or {}, environ=environ or {}, directory=folder)


@pytest.mark.parametrize(("command", "family", "strategy", "typed"), SEEDS)
def test_defaults_are_the_documents_command_lines(
    command: str, family: str, strategy: str, typed: dict[str, Any]
) -> None:
    resolved = settle(command, family, {"strategy": strategy})
    got = {name: getattr(resolved.config, name) for name in typed}
    assert got == {name: parse(name, value, "document") for name, value in typed.items()}
    assert len(typed) >= 20


def test_every_family_has_a_documented_command_line() -> None:
    assert {family for _, family, _, _ in SEEDS} == set(families.FAMILIES)


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("MODEL_NAME", "pretrained_model_name_or_path"),
        ("DATASET_NAME", "train_data_dir"),
        ("DATASET_META_NAME", "train_data_meta"),
    ],
)
def test_the_documents_variables_are_read(variable: str, option: str) -> None:
    resolved = settle(environ={variable: "some/place"})
    assert getattr(resolved.config, option) == Path("some/place")
    assert resolved.sources[option] == f"${variable}"


def test_option_wins_over_environment_over_file_over_family(tmp_path: Path) -> None:
    toml = "seed = 1\nlearning-rate = 1e-3\n[wan-s2v]\nseed = 2\nmax-grad-norm = 0.5\n[cogvideox-fun]\nseed = 9\n"
    environ = {"VFUN_SEED": "3", "VFUN_LOW_VRAM": "false"}
    resolved = settle(given={"seed": 4}, environ=environ, toml=toml, folder=tmp_path)
    assert (resolved.config.seed, resolved.sources["seed"]) == (4, "option")
    resolved = settle(environ=environ, toml=toml, folder=tmp_path)
    assert (resolved.config.seed, resolved.sources["seed"]) == (3, "$VFUN_SEED")
    assert resolved.config.low_vram is False
    resolved = settle(toml=toml, folder=tmp_path)
    assert (resolved.config.seed, resolved.sources["seed"]) == (2, f"{tmp_path / 'vfun.toml'} [wan-s2v]")
    assert resolved.config.max_grad_norm == 0.5
    assert resolved.config.learning_rate == 1e-3
    assert (resolved.config.adam_epsilon, resolved.sources["adam_epsilon"]) == (1e-10, "wan-s2v default")
    assert (resolved.config.adam_beta1, resolved.sources["adam_beta1"]) == (0.9, "default")


def test_the_names_own_variable_wins_over_the_documents() -> None:
    both = {"MODEL_NAME": "old", "VFUN_PRETRAINED_MODEL_NAME_OR_PATH": "new"}
    assert settle(environ=both).config.pretrained_model_name_or_path == Path("new")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"toml": "lerning_rate = 1\n"}, ["lerning_rate", "learning_rate", "vfun.toml"]),
        ({"toml": "[wan-s2v]\nsed = 1\n"}, ["sed", "seed", "[wan-s2v]"]),
        ({"toml": "[cogvideox-fun]\nsed = 1\n"}, ["sed", "seed", "[cogvideox-fun]"]),
        ({"toml": "[wan-s2w]\nseed = 1\n"}, ["[wan-s2w]", "'wan-s2v'"]),
        ({"toml": "seed = \n"}, ["vfun.toml", "not valid TOML"]),
        ({"toml": "seed = 'many'\n"}, ["seed", "'many'", "whole number"]),
        ({"toml": "seed = true\n"}, ["seed", "True", "whole number"]),
        ({"toml": "low_vram = 'perhaps'\n"}, ["low_vram", "'perhaps'", "true or false"]),
        ({"environ": {"VFUN_LERNING_RATE": "1"}}, ["$VFUN_LERNING_RATE", "learning_rate"]),
        ({"environ": {"VFUN_LEARNING_RATE": "nan"}}, ["VFUN_LEARNING_RATE", "finite"]),
        ({"given": {"lr_scheduler": "cosin"}}, ["--lr-scheduler", "'cosine'"]),
        ({"given": {"video_sample_size": 0}}, ["--video-sample-size", "16"]),
        ({"given": {"train_mode": "control"}}, ["wan-s2v", "'control'", "--train-mode"]),
        ({"given": {"loss_type": "flow"}}, ["loss_type", "wan-s2v"]),
        ({"given": {"strategy": "single", "num_processes": 2}}, ["single", "num_processes 2"]),
        ({"given": {"num_machines": 2, "num_processes": 3}}, ["num_processes 3", "num_machines 2"]),
        ({"given": {"num_machines": 2, "num_processes": 2}}, ["port", "--main-process-port"]),
        ({"given": {"machine_rank": 1}}, ["machine_rank 1"]),
        ({"given": {"use_ema": True, "strategy": "fsdp"}}, ["use_ema", "fsdp", "--ddp"]),
        ({"given": {"trainable_modules": ()}}, ["trainable_modules"]),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(wrong: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(**wrong, folder=tmp_path)
    said = f"{caught.value.message} {caught.value.hint or ''}"
    assert all(word in said for word in words), said


def test_run_json_holds_the_whole_configuration() -> None:
    config = settle(given={"trainable_modules": ("blocks", "head"), "max_train_steps": 3}).config
    assert RunConfig.from_json(config.to_json()) == config
    assert set(config.to_json()) == set(options())


def test_a_data_directory_defaults_to_the_folder_of_the_metadata() -> None:
    resolved = settle(given={"train_data_meta": "somewhere/metadata.json"})
    assert resolved.config.train_data_dir == Path("somewhere")


def test_lists_come_comma_separated_or_as_toml_lists(tmp_path: Path) -> None:
    assert settle(toml="trainable_modules = ['a', 'b']\n", folder=tmp_path).config.trainable_modules == ("a", "b")
    assert settle(environ={"VFUN_TRAINABLE_MODULES": "a, b"}).config.trainable_modules == ("a", "b")


@pytest.mark.parametrize("name", docs.PAGES)
def test_the_generated_pages_are_up_to_date(name: str) -> None:
    assert (docs.DOCS / name).read_text(encoding="utf-8") == docs.PAGES[name](), "run: make docs"


def test_every_option_is_explained() -> None:
    for name, (_, _, opt) in options().items():
        assert opt.help.endswith((".", "always so).")), name
        assert not opt.choices or default_of(name) in (*opt.choices, None, "auto"), name


def test_nothing_in_this_process_sets_options() -> None:
    """The tests above mean what they say only without such variables."""
    assert not [name for name in os.environ if name.startswith("VFUN_")]
