"""The options in ``state.json`` and ``run.json`` are checked as far as they are read without a run."""

from typing import Any

import pytest

from vfun_cli.checkpoints.state import options

LONG = "x" * 300
CHECK = options("pretrained_model_name_or_path", data="train_data_meta")
WHOLE = {"pretrained_model_name_or_path": "model", "num_processes": 2, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"caption_prefix": LONG, "target_name": [LONG, "q"], "train_mode": None, "vae_path": None},
        {"transformer_path": "a/b.safetensors", "vae_path": "vae", "train_mode": "control"},
        {"train_data_meta": [{"meta": "a.json", "repeats": "0.5", "caption_prefix": LONG}, "b"]},
    ],
)
def test_options_of_a_run_are_taken_whatever_texts_mean(stated: dict[str, Any]) -> None:
    CHECK("config", WHOLE | stated)


@pytest.mark.parametrize(
    "stated",
    [
        *({name: f"a/{LONG}"} for name in ("pretrained_model_name_or_path", "transformer_path", "vae_path")),
        {"vae_path": 7},
        {"train_mode": [1, 2]},
        {"train_mode": "a\0b"},
        {"pretrained_model_name_or_path": None},
    ],
)
def test_what_an_export_reads_of_them_is_a_path_or_text(stated: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(stated))):
        CHECK("config", WHOLE | stated)
