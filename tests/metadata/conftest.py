"""Clean files, and a function that validates rows over a copy of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_media import SPEECH_FIELDS, encode_video, write_sound

from vfun_cli.metadata.checks import Report, Settings, validate
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.records import read_metadata


@pytest.fixture(scope="session")
def clean_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video with its sound and control, a picture with its control."""
    root = tmp_path_factory.mktemp("clean")
    encode_video(root / "train/1.mp4")
    encode_video(root / "control/1.mp4")
    write_sound(root / "wav/1.wav")
    for name in ("train/2.jpg", "control/2.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(root / name)
    return root


@pytest.fixture
def data(clean_files: Path, tmp_path: Path) -> Path:
    """A copy of the clean files that a test may damage."""
    return Path(shutil.copytree(clean_files, tmp_path / "data"))


@pytest.fixture
def check(data: Path) -> Callable[..., Report]:
    """Write rows as JSON beside the data and validate them."""

    def run(rows: Any, **settings: Any) -> Report:
        path = data / "metadata.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        return validate(
            read_metadata(path),
            settings.pop("fields", SPEECH_FIELDS),
            settings.pop("media_types", ("video",)),
            data,
            needs=settings.pop("needs", ClipNeeds(min_frames=5, stride=2)),
            settings=Settings(threads=1, **settings),
        )

    return run
