"""``--demo``: option values that point a command at a tiny model and data set, made on first use."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli import console
from vfun_cli.disks.abilities import make_usual
from vfun_cli.families.spec import FamilySpec
from vfun_cli.imports import named

FOLDER = Path("vfun-demo")
OUTPUT_DIR = FOLDER / "output_dir"

BUILDERS = {
    "wan-s2v": "vfun_cli.demo.wan_s2v:build_model",
    "wan-fun-control": "vfun_cli.demo.wan_fun_control:build_model",
    "hunyuanvideo-t2v": "vfun_cli.demo.hunyuanvideo:build_t2v",
    "hunyuanvideo-i2v": "vfun_cli.demo.hunyuanvideo:build_i2v",
    "easyanimate-v5.1-control": "vfun_cli.demo.easyanimate_control:build_v5_1",
    "easyanimate-v5-control": "vfun_cli.demo.easyanimate_control:build_v5",
    "cogvideox-fun": "vfun_cli.demo.cogvideox_fun:build_model",
}
"""The ``module:function`` that writes the tiny model of each family; imported when needed, for it loads torch."""


def make(spec: FamilySpec, folder: Path = FOLDER) -> dict[str, Any]:
    """Option values of the demo of one family; its files are made in the folder if they are not there."""
    model, (_, data) = make_model(spec, folder), _places(spec, folder)
    if not data.is_dir():
        console.hint(f"making the demo's videos in {data}")
        _build_atomically(data, lambda partial: _media(spec, partial))
    return {
        **spec.defaults.demo,
        "validation_sampling_steps": spec.sampling.demo["steps"],
        "pretrained_model_name_or_path": model,
        "train_data_dir": data,
        "train_data_meta": data / "metadata.json",
        "output_dir": OUTPUT_DIR,
    }


def make_model(spec: FamilySpec, folder: Path = FOLDER) -> Path:
    """The directory of a family's tiny model alone, which is made if it is not there."""
    model, _ = _places(spec, folder)
    if not model.is_dir():
        console.hint(f"making the demo's tiny {spec.name} model in {model}")
        _build_atomically(model, lambda partial: _model(spec, partial))
    return model


def is_made(spec: FamilySpec) -> bool:
    """Whether the files of a family's demo are there."""
    return all(place.is_dir() for place in _places(spec, FOLDER))


def _places(spec: FamilySpec, folder: Path) -> tuple[Path, Path]:
    """Of the model and of the data."""
    return folder / spec.name / "model", folder / spec.name / "data"


def builder(spec: FamilySpec) -> Callable[[Path], None]:
    """What writes the tiny model of a family into a folder, in the released layout."""
    build: Callable[[Path], None] = named(BUILDERS[spec.name])
    return build


def _model(spec: FamilySpec, folder: Path) -> None:
    build = builder(spec)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    build(folder)


def _media(spec: FamilySpec, folder: Path) -> None:
    from vfun_cli.demo.media import build_media

    kinds = {field.media for field in spec.fields}
    build_media(folder, control="control" in kinds, audio="audio" in kinds, images="image" in spec.media_types)


def _build_atomically(folder: Path, build: Any) -> None:
    """Build in a folder next to it and rename, so that an interrupted build leaves nothing that looks finished.

    Commands of several machines may build the same one at once; the first that is done counts.
    """
    partial = folder.with_name(f".{folder.name}.partial-{token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        with _quiet():
            build(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                make_usual(file)
        if not folder.exists():
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence libraries' warnings about a tiny random model."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
