"""Every flag that the parsers of the original scripts declare, through the command line."""

from pathlib import Path

import pytest

from tests.commands.conftest import Vfun
from vfun_cli import families
from vfun_cli.commands.signature import CHOOSING_FLAGS
from vfun_cli.config.options import default_of, options
from vfun_cli.config.originals import FLAGS, meaning, right_values

SCRIPTS = {
    "S": ("train", "wan-s2v"),
    "s": ("lora", "wan-s2v"),
    "W": ("train", "wan-fun-control"),
    "w": ("lora", "wan-fun-control"),
    "H": ("train", "hunyuanvideo-t2v"),
    "h": ("lora", "hunyuanvideo-t2v"),
    "C": ("train", "cogvideox-fun"),
    "X": ("train", "cogvideox-fun"),
    "c": ("lora", "cogvideox-fun"),
    "E": ("train", "easyanimate-v5.1-control"),
    "e": ("lora", "easyanimate-v5-control"),
}
"""What runs a script's command here: wan2.2/train_s2v.py and its LoRA, wan2.1_fun/train_control.py and its LoRA,
hunyuanvideo/train.py and its LoRA, cogvideox_fun/train.py, train_control.py and train_lora.py (VideoX-Fun 804a425);
train_control.py and train_lora.py (EasyAnimate c2a70d1)."""

DECLARED = {
    "abnormal_norm_clip_start": "SWHCXEe",
    "adam_beta1": "SsWwHhCXcEe",
    "adam_beta2": "SsWwHhCXcEe",
    "adam_epsilon": "SsWwHhCXcEe",
    "adam_weight_decay": "SsWwHhCXcEe",
    "add_full_ref_image_in_self_attention": "Ww",
    "allow_tf32": "SsWwHhCXcEe",
    "auto_tile_batch_size": "SsWwHhCXc",
    "boundary_type": "Ss",
    "cache_dir": "SsWwHhCXcEe",
    "checkpointing_steps": "SsWwHhCXcEe",
    "checkpoints_total_limit": "SsWwHhCXcEe",
    "config_path": "SsWwEe",
    "control_ref_image": "SsWwE",
    "dataloader_num_workers": "SsWwHhCXcEe",
    "enable_bucket": "SsWwHhCXcEe",
    "enable_text_encoder_in_dataloader": "SsWwHhCXcEe",
    "enable_xformers_memory_efficient_attention": "Ee",
    "fix_sample_size": "SsWwHh",
    "gradient_accumulation_steps": "SsWwHhCXcEe",
    "gradient_checkpointing": "SsWwHhCXcEe",
    "guidance_scale": "Hh",
    "hub_model_id": "SsWwHhCXcEe",
    "hub_token": "SsWwHhCXcEe",
    "image_embed_interleave": "Hh",
    "image_repeat_in_forward": "e",
    "image_sample_size": "WwHhCXcEe",
    "initial_grad_norm_ratio": "SWHCXEe",
    "input_perturbation": "SsWwHhCXcEe",
    "keep_all_node_same_token_length": "SsWwHhCXcEe",
    "learning_rate": "SsWwHhCXcEe",
    "local_rank": "SsWwHhCXcEe",
    "logging_dir": "SsWwHhCXcEe",
    "logit_mean": "SsWwHhEe",
    "logit_std": "SsWwHhEe",
    "lora_skip_name": "swh",
    "loss_type": "Ee",
    "low_vram": "SsWwHhCXcEe",
    "lr_scheduler": "SsWwHhCXcEe",
    "lr_warmup_steps": "SsWwHhCXcEe",
    "max_grad_norm": "SsWwHhCXcEe",
    "max_train_samples": "SsWwHhCXcEe",
    "max_train_steps": "SsWwHhCXcEe",
    "mixed_precision": "SsWwHhCXcEe",
    "mode_scale": "SsWwHhEe",
    "motion_frames": "Ss",
    "motion_sub_loss": "SsWwHhCXcEe",
    "motion_sub_loss_ratio": "SsWwHhCXcEe",
    "multi_stream": "SsWwHhCXcEe",
    "network_alpha": "swhce",
    "noise_offset": "SsWwHhCXcEe",
    "noise_share_in_frames": "Ee",
    "noise_share_in_frames_ratio": "Ee",
    "non_ema_revision": "SsWwHhCXcEe",
    "not_sigma_loss": "X",
    "num_hidden_layers_to_skip": "Hh",
    "num_train_epochs": "SsWwHhCXcEe",
    "output_dir": "SsWwHhCXcEe",
    "prediction_type": "SsWwHhCXcEe",
    "pretrained_model_name_or_path": "SsWwHhCXcEe",
    "push_to_hub": "SsWwHhCXcEe",
    "random_flip": "SsWwHhCXcEe",
    "random_frame_crop": "SsWwHhCXcEe",
    "random_hw_adapt": "SsWwHhCXcEe",
    "random_ratio_crop": "SsWwHhCXcEe",
    "rank": "swhce",
    "report_model_info": "SWHCXEe",
    "report_to": "SsWwHhCXcEe",
    "resume_from_checkpoint": "SsWwHhCXcEe",
    "revision": "SsWwHhCXcEe",
    "save_state": "whce",
    "scale_lr": "SsWwHhCXcEe",
    "seed": "SsWwHhCXcEe",
    "snr_loss": "SsWwHhCXcEe",
    "target_name": "swhc",
    "token_sample_size": "SsWwHhCXcEe",
    "tokenizer_max_length": "SsWwHhCXcEe",
    "tracker_project_name": "SsWwHhCXcEe",
    "train_batch_size": "SsWwHhCXcEe",
    "train_data_dir": "SsWwHhCXcEe",
    "train_data_meta": "SsWwHhCXcEe",
    "train_mode": "WwHhCcEe",
    "train_sampling_steps": "SsWwHhCXcEe",
    "train_text_encoder": "swhce",
    "trainable_modules": "SsWHCXE",
    "trainable_modules_low_learning_rate": "SsWHCXE",
    "training_with_video_token_length": "SsWwHhCXcEe",
    "transformer_path": "SsWwHhCXcEe",
    "uniform_sampling": "SsWwHhCXcEe",
    "use_8bit_adam": "SsWwHhCXcEe",
    "use_came": "SsWwHhCXcEe",
    "use_deepspeed": "SsWwHhCXcEe",
    "use_ema": "SsWwHhCXcEe",
    "use_fsdp": "SsWwHhCc",
    "use_peft_lora": "swhc",
    "vae_mini_batch": "SsWwHhCXcEe",
    "vae_path": "SsWwHhCXcEe",
    "validation_audio_paths": "Ss",
    "validation_epochs": "SsWwHhCXcEe",
    "validation_image_paths": "Ss",
    "validation_paths": "WwCXcE",
    "validation_prompts": "SsWwHhCXcEe",
    "validation_steps": "SsWwHhCXcEe",
    "variant": "SsWwHhCXcEe",
    "video_repeat": "SsWwHhCXcEe",
    "video_sample_n_frames": "SsWwHhCXcEe",
    "video_sample_size": "SsWwHhCXcEe",
    "video_sample_stride": "SsWwHhCXcEe",
    "weighting_scheme": "SsWwHhEe",
}
"""Flag: the scripts that declare it."""

SWITCHES = {
    "add_full_ref_image_in_self_attention",
    "allow_tf32",
    "auto_tile_batch_size",
    "enable_bucket",
    "enable_text_encoder_in_dataloader",
    "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing",
    "keep_all_node_same_token_length",
    "low_vram",
    "motion_sub_loss",
    "multi_stream",
    "noise_share_in_frames",
    "not_sigma_loss",
    "push_to_hub",
    "random_flip",
    "random_frame_crop",
    "random_hw_adapt",
    "random_ratio_crop",
    "report_model_info",
    "save_state",
    "scale_lr",
    "snr_loss",
    "train_text_encoder",
    "training_with_video_token_length",
    "uniform_sampling",
    "use_8bit_adam",
    "use_came",
    "use_deepspeed",
    "use_ema",
    "use_fsdp",
    "use_peft_lora",
}
"""Those that take no value."""

PENDING = {
    **dict.fromkeys(("weighting_scheme", "logit_mean", "logit_std", "mode_scale"), "objectives"),
    **dict.fromkeys(("motion_sub_loss", "motion_sub_loss_ratio", "guidance_scale"), "objectives"),
    **dict.fromkeys(("noise_share_in_frames", "noise_share_in_frames_ratio"), "objectives"),
    **dict.fromkeys(("transformer_path", "vae_path", "lora_skip_name"), "weights"),
    **dict.fromkeys(("fix_sample_size", "random_ratio_crop"), "sizes"),
}
"""Options of the originals that have their own tests, by subject."""

ONE_OF_EACH = {"use_8bit_adam", "use_came", "use_deepspeed", "use_fsdp", "resume_from_checkpoint"}
"""Each chooses; typed together they contradict each other, or look for an earlier run."""

REFUSED = {
    "train": {"scale_lr", "train_text_encoder"},
    "lora": {"scale_lr", "train_text_encoder", "trainable_modules", "trainable_modules_low_learning_rate"},
}
"""With the reason; weights of the model itself train in no LoRA run, and did not in the script that declares them."""

TYPED: dict[str, tuple[str, ...]] = {
    "abnormal_norm_clip_start": ("1000",),
    "boundary_type": ("full",),
    "cache_dir": ("models",),
    "checkpoints_total_limit": ("3",),
    "config_path": ("config/wan2.2/wan_civitai_s2v.yaml",),
    "control_ref_image": ("first_frame",),
    "fix_sample_size": ("480", "832"),
    "guidance_scale": ("6.0",),
    "hub_model_id": ("someone/model",),
    "hub_token": ("hf_secret",),
    "image_embed_interleave": ("4",),
    "image_repeat_in_forward": ("0",),
    "image_sample_size": ("512",),
    "initial_grad_norm_ratio": ("5",),
    "input_perturbation": ("0.1",),
    "local_rank": ("-1",),
    "logit_mean": ("0.0",),
    "logit_std": ("1.0",),
    "lora_skip_name": ("audio",),
    "lr_scheduler": ("cosine_with_restarts",),
    "max_train_samples": ("100",),
    "max_train_steps": ("10",),
    "mode_scale": ("1.29",),
    "motion_frames": ("73",),
    "motion_sub_loss_ratio": ("0.25",),
    "noise_offset": ("0.1",),
    "noise_share_in_frames_ratio": ("0.5",),
    "non_ema_revision": ("main",),
    "num_hidden_layers_to_skip": ("2",),
    "prediction_type": ("epsilon",),
    "resume_from_checkpoint": ("latest",),
    "revision": ("main",),
    "target_name": ("q,k,v",),
    "tracker_project_name": ("text2image-fine-tune",),
    "train_sampling_steps": ("1000",),
    "trainable_modules": ("blocks", "head"),
    "trainable_modules_low_learning_rate": ("blocks.1", "blocks.2"),
    "transformer_path": ("transformer.safetensors",),
    "vae_path": ("vae.safetensors",),
    "validation_audio_paths": ("a.wav", "b.wav"),
    "validation_epochs": ("5",),
    "validation_image_paths": ("a.png", "b.png"),
    "validation_paths": ("a.mp4", "b.mp4"),
    "validation_prompts": ("a dog, running", "a cat"),
    "validation_steps": ("2000",),
    "variant": ("fp16",),
    "weighting_scheme": ("none",),
}
"""Values as people type them; the other options' are the family's defaults."""

CHOOSING = {name for flags in CHOOSING_FLAGS.values() for name in flags}


def words(name: str, family: str, *, spelling: str = "underscores") -> list[str]:
    """A flag with its value as it is typed."""
    spec = families.find(family)
    flag = f"--{name}" if spelling == "underscores" else f"--{name.replace('_', '-')}"
    if name in SWITCHES:
        return [flag]
    usual = {name: default_of(name) for name in options()} | {**right_values(spec)} | {**spec.defaults.train}
    values = TYPED[name] if name in TYPED else (str(usual[name]),)
    return [f"{flag}={values[0]}"] if spelling == "equals" and len(values) == 1 else [flag, *values]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with neither model nor data: a command ends there, once its flags are understood."""
    monkeypatch.chdir(tmp_path)


def test_there_are_109_flags_and_all_are_known_or_have_tests_of_their_own() -> None:
    assert len(DECLARED) == 109
    assert not {*DECLARED} - {*options()} - {*FLAGS} - CHOOSING - {*PENDING}
    assert not {*FLAGS} & {*options()}, "one place for each"
    assert {*FLAGS} <= {*DECLARED}, "nothing that nobody types"
    assert SWITCHES & {*FLAGS} == {name for name, flag in FLAGS.items() if flag.switch}


@pytest.mark.parametrize("spelling", ["underscores", "hyphens", "equals"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_flags_of_a_script_are_taken_in_one_command(script: str, spelling: str, vfun: Vfun, empty: None) -> None:
    command, family = SCRIPTS[script]
    names = [name for name, scripts in DECLARED.items() if script in scripts]
    typed = [name for name in names if name not in ONE_OF_EACH | REFUSED[command] and name not in PENDING]
    said = vfun(
        command, family, *(word for name in typed for word in words(name, family, spelling=spelling)), "--dry-run"
    )
    assert said.code in (3, 5), said.err  # no data, no model
    assert "No such option" not in said.err and "hf_secret" not in said.err + said.out
    dead = [name for name in typed if name in FLAGS and FLAGS[name].fate == "dead"]
    line = next(line for line in said.err.splitlines() if line.startswith("Without effect"))
    assert line.count("--") == len(dead) >= 9
    for name in typed:
        idle = name in FLAGS and FLAGS[name].fate == "idle"
        assert (f"--{name.replace('_', '-')} has no effect: " in said.err) == idle, name


@pytest.mark.parametrize("name", sorted(ONE_OF_EACH))
def test_flags_that_choose_are_taken_one_by_one(name: str, vfun: Vfun, empty: None) -> None:
    said = vfun("train", "wan-s2v", *words(name, "wan-s2v"), "--dry-run")
    assert "No such option" not in said.err, said.err


@pytest.mark.parametrize("name", PENDING)
def test_flags_with_tests_of_their_own_are_no_unknown_options(name: str, vfun: Vfun, empty: None) -> None:
    command, family = SCRIPTS[DECLARED[name][-1]]
    said = vfun(command, family, *words(name, family), "--dry-run")
    assert "No such option" not in said.err


WRONG = [
    ("wan-s2v", "boundary_type", "low", "for wan-s2v it is full: the model has one expert"),
    ("wan-s2v", "motion_frames", "5", "for wan-s2v it is 73: the released model reads so many frames of history"),
    ("wan-fun-control", "tokenizer_max_length", "226", "for wan-fun-control it is 512"),
    ("hunyuanvideo-i2v", "tokenizer_max_length", "512", "for hunyuanvideo-i2v it is 256"),
    ("hunyuanvideo-i2v", "image_embed_interleave", "2", "for hunyuanvideo-i2v it is 4"),
    ("hunyuanvideo-t2v", "num_hidden_layers_to_skip", "0", "for hunyuanvideo-t2v it is 2"),
    ("easyanimate-v5-control", "tokenizer_max_length", "77", "for easyanimate-v5-control it is 256"),
    ("cogvideox-fun", "tokenizer_max_length", "512", "for cogvideox-fun it is 226"),
    ("cogvideox-fun", "train_sampling_steps", "50", "for cogvideox-fun it is 1000"),
    ("wan-s2v", "mixed_precision", "fp16", "its small gradients need a scaled loss"),
    ("wan-s2v", "lr_scheduler", "piecewise_constant", "its steps are rules that no flag"),
    ("wan-s2v", "report_to", "comet_ml", "choose one of: tensorboard, wandb, swanlab, all, none"),
]


@pytest.mark.parametrize(("family", "name", "value", "why"), WRONG)
def test_a_value_that_would_make_another_run_is_refused_with_the_reason(
    family: str, name: str, value: str, why: str, vfun: Vfun, empty: None
) -> None:
    said = vfun("train", family, f"--{name}={value}", "--dry-run")
    assert said.code == 2 and why in said.err, said.err
    assert f"--{name.replace('_', '-')} is " in said.err


def test_a_flag_of_another_familys_scripts_has_no_effect(vfun: Vfun, empty: None) -> None:
    said = vfun("train", "cogvideox-fun", "--motion_frames=5", "--dry-run")
    assert "--motion-frames has no effect: it is no flag of cogvideox-fun's scripts." in said.err and said.code != 2


def test_a_scaled_learning_rate_is_refused_with_the_one_to_type(vfun: Vfun, empty: None) -> None:
    said = vfun(
        "train", "wan-s2v", "--scale_lr", "--learning_rate=2e-05", "--gradient_accumulation_steps=4", "--ddp",
        "--num-processes=8", "--train_batch_size=2", "--dry-run",
    )  # fmt: skip
    assert said.code == 2 and "--learning-rate 0.00128: 2e-05 x 8 x 4 x 2." in said.err, said.err


def test_adapters_of_the_text_encoder_are_refused_with_the_reason(vfun: Vfun, empty: None) -> None:
    said = vfun("lora", "cogvideox-fun", "--train_text_encoder", "--dry-run")
    assert said.code == 2 and "encoders are frozen" in said.err and "Leave it out" in said.err


def test_a_switch_takes_no_value_as_in_argparse_and_another_flag_needs_one(vfun: Vfun, empty: None) -> None:
    assert vfun("train", "wan-s2v", "--random_flip=true", "--dry-run").code == 2
    said = vfun("train", "wan-s2v", "--cache_dir")
    assert said.code == 2 and "requires an argument" in said.err


def test_what_a_flag_means_is_told_without_a_run_for_who_translates_scripts() -> None:
    spec = families.find("wan-s2v")
    assert meaning("motion_frames", "73", spec).kind == "same"
    assert meaning("motion_frames", "72", spec).kind == "refused"
    assert meaning("hub_token", "hf_secret", spec).kind == "idle"
    assert meaning("random_flip", True, spec).kind == "dead"
    scaled = meaning("scale_lr", True, spec)
    assert scaled.kind == "refused" and scaled.hint == "Leave it out, and type the product as --learning-rate."
    for name in FLAGS:
        found = meaning(name, "anything", spec)
        assert found.words.startswith(f"--{name.replace('_', '-')} ") and found.words.endswith(".")
        assert (found.hint is not None) == (found.kind == "refused")
