"""Where commands look when nothing is named, before a family and its options are known."""

import os
from pathlib import Path

from vfun_cli.config.options import default_of
from vfun_cli.config.resolve import setting
from vfun_cli.demo.default import OUTPUT_DIR as DEMO_OUTPUT_DIR


def output_dir(*, demo: bool) -> Path:
    """The directory that runs go to: the demo's, or the one of the environment, vfun.toml or the option's default."""
    if demo:
        return DEMO_OUTPUT_DIR
    found: Path = setting("output_dir", os.environ, Path()) or default_of("output_dir")
    return found


def model_directory() -> Path | None:
    """The model that the environment or vfun.toml names."""
    named: Path | None = setting("pretrained_model_name_or_path", os.environ, Path())
    return named
