"""Options: the published command lines' defaults, every way to set one, who wins, and what is said of a wrong one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from docs import generate as docs
from vfun_cli import devices, families
from vfun_cli.config.checks import check_guidance, check_streamed_blocks
from vfun_cli.config.options import RunConfig, default_of, options, parse, plain_kind
from vfun_cli.config.resolve import Resolved, resolve
from vfun_cli.errors import ConfigError


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
    assert getattr(resolved.config, option) == parse(option, "some/place", variable)
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
        ({"toml": "seed = " + "[" * 100_000}, ["vfun.toml", "not valid TOML", "nested too deeply"]),
        ({"toml": "seed = " + "9" * 5000}, ["vfun.toml", "not valid TOML"]),
        ({"toml": "#" * (1 << 21)}, ["vfun.toml", "at most 1,048,576"]),
        ({"toml": "seed = 'many'\n"}, ["seed", "'many'", "whole number"]),
        ({"toml": "seed = true\n"}, ["seed", "True", "whole number"]),
        ({"toml": "low_vram = 'perhaps'\n"}, ["low_vram", "'perhaps'", "true or false"]),
        ({"environ": {"VFUN_LERNING_RATE": "1"}}, ["$VFUN_LERNING_RATE", "learning_rate"]),
        ({"environ": {"VFUN_LEARNING_RATE": "nan"}}, ["VFUN_LEARNING_RATE", "finite"]),
        ({"given": {"lr_scheduler": "cosin"}}, ["--lr-scheduler", "'cosine'"]),
        ({"given": {"video_sample_size": 0}}, ["--video-sample-size is 0", "least"]),
        ({"given": {"train_mode": "control"}}, ["wan-s2v", "'control'", "--train-mode"]),
        ({"given": {"loss_type": "flow"}}, ["loss_type", "wan-s2v"]),
        *(
            ({"family": family, "given": {"control_ref_image": "random"}}, ["control_ref_image", family])
            for family in ("hunyuanvideo-t2v", "hunyuanvideo-i2v", "cogvideox-fun")
        ),
        (
            {"family": "easyanimate-v5.1-control", "given": {"control_ref_image": "random"}},
            ["latent frame 0", "first_frame"],
        ),
        (
            {"family": "easyanimate-v5.1-control", "given": {"train_mode": "control_camera_ref"}},
            ["pose files", "control_ref, control"],
        ),
        *(
            ({"family": family, "given": {"weighting_scheme": "cosmap"}}, [family, "denoising diffusion", "Leave"])
            for family in ("cogvideox-fun", "easyanimate-v5-control")
        ),
        *(
            ({"given": {"weighting_scheme": scheme}}, [scheme, "draws all alike", "--no-uniform-sampling"])
            for scheme in ("logit_normal", "mode")
        ),
        ({"given": {"logit_mean": 1}}, ["logit_mean is 1.0", "without weighting_scheme logit_normal"]),
        (
            {"given": {"logit_std": 2, "weighting_scheme": "mode", "uniform_sampling": False}},
            ["logit_std is 2.0", "--weighting-scheme logit_normal --no-uniform-sampling"],
        ),
        ({"given": {"mode_scale": 1, "weighting_scheme": "cosmap"}}, ["mode_scale is 1.0", "weighting_scheme mode"]),
        ({"given": {"motion_sub_loss_ratio": 0.5}}, ["motion_sub_loss_ratio is 0.5", "--motion-sub-loss"]),
        (
            {"family": "cogvideox-fun", "given": {"noise_share_in_frames_ratio": 0.25}},
            ["noise_share_in_frames_ratio is 0.25", "--noise-share-in-frames"],
        ),
        ({"given": {"strategy": "single", "num_processes": 2}}, ["single", "num_processes 2"]),
        ({"given": {"num_machines": 2, "num_processes": 3}}, ["num_processes 3", "num_machines 2"]),
        ({"given": {"machine_rank": 1}}, ["machine_rank 1"]),
        ({"given": {"num_processes": 2, "fsdp_shard_size": 2}}, ["fsdp_shard_size is about FSDP", "add --fsdp"]),
        ({"given": {"strategy": "fsdp", "num_processes": 4, "fsdp_shard_size": 1}}, ["which is DDP", "--ddp"]),
        ({"given": {"strategy": "fsdp", "num_processes": 4, "fsdp_shard_size": 3}}, ["4 does not divide", "divides 4"]),
        (
            {
                "given": {
                    "strategy": "fsdp",
                    "num_processes": 12,
                    "num_machines": 3,
                    "fsdp_shard_size": 6,
                    "main_process_port": 1,
                }
            },
            ["fsdp_shard_size 6", "machines of 4 processes", "Choose 4"],
        ),
        ({"given": {"trainable_modules": ()}}, ["trainable_modules"]),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(wrong: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(**wrong, folder=tmp_path)
    said = f"{caught.value.message} {caught.value.hint or ''}"
    assert all(word in said for word in words), said


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_settings_that_are_no_file_are_neither_read_nor_ignored(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "vfun.toml")
    with pytest.raises(ConfigError, match=r"vfun\.toml cannot be read"):
        settle(folder=tmp_path)


NUMBERS = [name for name, (_, kind, _) in options().items() if plain_kind(kind) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_that_is_kept_and_told(name: str) -> None:
    _, kind, opt = options()[name]
    low = opt.minimum if opt.above is None else opt.above
    high = opt.maximum if opt.below is None else opt.below
    assert low is not None and high is not None and low < high
    assert (opt.minimum is None) == (opt.above is not None) and (opt.maximum is None) == (opt.below is not None)
    inside = [value for value in (opt.minimum, opt.maximum, default_of(name)) if value is not None]
    assert all(parse(name, value, name) == value for value in inside)
    assert all(parse(name, str(int(value)), name) == value for value in inside if value == int(value))
    beyond = [-(10**30), low - 1, opt.above, opt.below, high * 2 + 1, 10**30 if plain_kind(kind) is int else 1e300]
    for value in (each for each in beyond if each is not None):
        with pytest.raises(
            ConfigError, match=f"^{name} is .*, (the (least|most) that makes sense is|it must be)"
        ) as no:
            parse(name, value, name)
        assert no.value.option == f"--{name.replace('_', '-')}"
    for value in ("nan", "inf", "", " ", "1e", "0x10", True):
        with pytest.raises(ConfigError, match=f"^{name} is"):
            parse(name, value, name)
    page = (docs.DOCS / "options.md").read_text(encoding="utf-8")
    assert opt.bounds in next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))


def test_a_step_that_no_machine_can_plan_is_refused_at_once() -> None:
    assert settle(given={"num_processes": 1000, "strategy": "fsdp"}).config.num_processes == 1000
    with pytest.raises(ConfigError, match="the most that makes sense is 10000000"):
        settle(given={"num_processes": 1000, "strategy": "fsdp", "gradient_accumulation_steps": 100_000})


PATHS = [name for name, (_, kind, _) in options().items() if plain_kind(kind) is Path]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_may_begin_at_home_and_is_never_empty(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    command = options()[name][2].commands[-1] if "train" not in options()[name][2].commands else "train"
    said = {"given": {name: "~/x"}, "environ": {f"VFUN_{name.upper()}": "~/x"}, "toml": f'{name} = "~/x"'}
    for way, value in said.items():
        (tmp_path / way).mkdir()
        assert getattr(settle(command, **{way: value}, folder=tmp_path / way).config, name) == tmp_path / "x", way
    for wrong in ("", "~nobody-of-this-name/x", "a\0b", f"a/{'x' * 300}/b"):
        with pytest.raises(ConfigError, match=f"{name} is .* takes a path"):
            parse(name, wrong, name)


def test_an_empty_variable_is_as_good_as_none() -> None:
    empty = {f"VFUN_{name.upper()}": value for name in options() for value in ("", " ")} | {"MODEL_NAME": ""}
    assert settle(environ=empty) == settle()
    assert settle(environ={**empty, "VFUN_OF_NOTHING": ""}) == settle()


def test_run_json_holds_the_whole_configuration() -> None:
    config = settle(given={"trainable_modules": ("blocks", "head"), "max_train_steps": 3}).config
    assert RunConfig.from_json(config.to_json()) == config
    assert set(config.to_json()) == set(options())


def test_a_data_directory_defaults_to_the_folder_of_the_metadata() -> None:
    resolved = settle(given={"train_data_meta": "somewhere/metadata.json"})
    assert resolved.config.train_data_dir == Path("somewhere")


@pytest.mark.parametrize(
    ("given", "environ", "units", "precision", "source"),
    [
        ({}, {}, True, "bf16", "wan-s2v default"),
        ({}, {}, False, "no", "this machine: its processor has no units for bf16"),
        ({"mixed_precision": "bf16"}, {}, False, "bf16", "option"),
        ({}, {"VFUN_MIXED_PRECISION": "bf16"}, False, "bf16", "$VFUN_MIXED_PRECISION"),
        ({"device": "cuda", "num_processes": 1}, {}, False, "bf16", "wan-s2v default"),
    ],
)
def test_a_processor_that_multiplies_bf16_slowly_trains_in_float32_unless_told(
    given: dict[str, Any], environ: dict[str, str], units: bool, precision: str, source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: units)
    resolved = settle(given={"device": "cpu", **given}, environ=environ)
    assert (resolved.config.mixed_precision, resolved.sources["mixed_precision"]) == (precision, source)


def test_only_frozen_blocks_that_are_there_can_be_streamed(tmp_path: Path) -> None:
    in_file: dict[str, Any] = {"toml": "stream_blocks = 2\n", "folder": tmp_path}
    with pytest.raises(ConfigError, match="a full fine-tune changes them"):
        settle("train", **in_file)
    assert settle("cache", **in_file).config.stream_blocks == 2, "it has no say where nothing trains"
    for spec in families.FAMILIES.values():
        blocks = spec.model.blocks(spec.model.dims)
        assert blocks >= 30
        check_streamed_blocks(RunConfig(stream_blocks=blocks - 1), spec, spec.model.dims)
        with pytest.raises(ConfigError, match=f"the model has {blocks} blocks"):
            check_streamed_blocks(RunConfig(stream_blocks=blocks), spec, spec.model.dims)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_embedded_guidance_is_for_a_model_that_is_told_one(family: str) -> None:
    spec = families.find(family)
    check_guidance(RunConfig(), spec, spec.model.dims)
    dims = [spec.model.dims]
    if family.startswith("hunyuanvideo"):
        check_guidance(RunConfig(guidance_scale=4.5), spec, spec.model.dims)
        dims = [spec.model.read_dims({**spec.model.released, "guidance_embeds": False})]
    for each in dims:
        with pytest.raises(ConfigError, match=rf"guidance_scale is 4\.5, but this {family} has no embedded guidance"):
            check_guidance(RunConfig(guidance_scale=4.5), spec, each)


def test_lists_come_comma_separated_or_as_toml_lists(tmp_path: Path) -> None:
    assert settle(toml="trainable_modules = ['a', 'b']\n", folder=tmp_path).config.trainable_modules == ("a", "b")
    assert settle(environ={"VFUN_TRAINABLE_MODULES": "a, b"}).config.trainable_modules == ("a", "b")


@pytest.mark.parametrize("name", docs.PAGES)
def test_the_generated_pages_are_up_to_date(name: str) -> None:
    assert (docs.DOCS / name).read_text(encoding="utf-8") == docs.PAGES[name](), "run: make docs"


def test_every_option_is_explained() -> None:
    for name, (_, _, opt) in options().items():
        assert opt.help.endswith("."), name
        assert not opt.choices or default_of(name) in (*opt.choices, None, "auto"), name


def test_nothing_in_this_process_sets_options() -> None:
    """The tests above mean what they say only without such variables."""
    assert not [name for name in os.environ if name.startswith("VFUN_")]


@pytest.mark.parametrize("text", ["", "ohwx", " ohwx, ", "a, b", "狗", "true", "0", "line\nline"])
@pytest.mark.parametrize("name", ["caption_prefix", "caption_suffix"])
def test_a_text_around_captions_stays_as_it_is_typed(name: str, text: str, tmp_path: Path) -> None:
    resolved = settle(given={name: text}, environ={f"VFUN_{name.upper()}": "exported"})
    assert getattr(resolved.config, name) == text
    assert getattr(settle(toml=f"{name} = {json.dumps(text)}", folder=tmp_path).config, name) == text
    if text:  # an empty variable is how a shell unsets
        assert getattr(settle(environ={f"VFUN_{name.upper()}": text}).config, name) == text
    written = json.loads(json.dumps(resolved.config.to_json()))
    assert RunConfig.from_json(written) == resolved.config


@pytest.mark.parametrize(("value", "words"), [(5, "takes text"), (["a"], "takes text"), ("\ud800", "holds '\\ud800'")])
def test_what_is_no_text_cannot_stand_around_captions(value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("caption_prefix", value, "vfun.toml: caption_prefix")
    assert words in caught.value.message and caught.value.option == "--caption-prefix"


def test_other_captions_are_another_trajectory_and_the_defaults_are_those_of_the_originals() -> None:
    for name in ("caption_prefix", "caption_suffix", "caption_dropout", "shuffle_tags"):
        assert options()[name][2].on_resume == "trajectory"
    config = settle().config
    assert (config.caption_prefix, config.caption_suffix) == ("", "")
    assert (config.caption_dropout, config.shuffle_tags) == (0.1, False)
