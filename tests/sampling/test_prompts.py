"""The originals' validation prompts, and what the paths beside them mean to each family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vfun_cli import families
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.families.detect import read_dims
from vfun_cli.modeling.media.writing import write_png, write_video, write_wav
from vfun_cli.sampling.prompts import videos_of_prompts
from vfun_cli.sampling.rows import Videos


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_png(folder / "picture.png", torch.zeros(3, 64, 64))
    write_video(folder / "control.mp4", torch.zeros(33, 3, 64, 64), 16)  # type: ignore[arg-type]
    write_wav(folder / "sound.wav", np.ones(32000, np.float32), 16000)
    return folder


def videos(family: str, **options: Any) -> Videos | None:
    spec = families.find(family)
    sizes = {"video_sample_size": 100, "video_sample_n_frames": 18}
    return videos_of_prompts(RunConfig(**{**sizes, **options}), spec, read_dims(spec, None))


@pytest.mark.parametrize(
    ("family", "named", "given"),
    [
        ("wan-s2v", {"image_paths": "picture.png", "audio_paths": "sound.wav"}, {"image", "audio"}),
        (
            "wan-s2v",
            {"paths": "control.mp4", "image_paths": "picture.png", "audio_paths": "sound.wav"},
            {"control", "image", "audio"},
        ),
        ("wan-fun-control", {"paths": "control.mp4"}, {"control"}),
        ("easyanimate-v5-control", {"paths": "control.mp4"}, {"control"}),
        ("cogvideox-fun", {"paths": "picture.png"}, {"image"}),
        ("hunyuanvideo-i2v", {"image_paths": "picture.png"}, {"image"}),
        ("hunyuanvideo-t2v", {}, set()),
    ],
)
def test_paths_beside_prompts_mean_what_they_mean_to_the_original(
    family: str, named: dict[str, str], given: set[str], media: Path
) -> None:
    paths = {f"validation_{name}": (str(media / file),) for name, file in named.items()}
    found = videos(family, validation_prompts=("a", "b"), validation_guidance=2.0, **paths)
    assert found is not None and not found.problems
    assert [(video.prompt, set(video.media)) for video in found.videos] == [("a", given), ("b", given)]
    # as large and as long as the clips of the run, on the family's grid and by its rule
    assert {(video.height, video.width) for video in found.videos} == {(96, 96)}
    assert {video.frames for video in found.videos} == {16 if family == "wan-s2v" else 17}
    assert {video.guidance for video in found.videos} == {2.0}


def test_what_the_family_cannot_be_given_is_refused(media: Path) -> None:
    with pytest.raises(ConfigError, match="makes no video from it"):
        videos("hunyuanvideo-t2v", validation_prompts=("a",), validation_audio_paths=(str(media / "sound.wav"),))


def test_media_that_are_not_there_are_problems_of_their_prompts() -> None:
    found = videos("hunyuanvideo-i2v", validation_prompts=("a",), validation_image_paths=("nowhere.png",))
    assert found is not None and [problem.code for problem in found.problems] == ["missing-file"]


@pytest.mark.parametrize("options", [{}, {"validation_prompts": ("a",), "validation_samples": False}])
def test_without_prompts_or_samples_there_are_none(options: dict[str, Any]) -> None:
    assert videos("hunyuanvideo-t2v", **options) is None
